"""SmolLM2's greedy tokens against transformers', 20 prompts of 64 new tokens, in fp32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorax_serve.config import EngineConfig
from lorax_serve.core import Batch, SamplingParams, Sequence
from lorax_serve.model.runner import ModelRunner

PROMPTS = [
    "The capital of France is",
    "Once upon a time there was a small robot who",
    "def fibonacci(n):",
    "The three primary colours are",
    "Water boils at",
    "In 1969, the first humans",
    "SELECT name FROM users WHERE",
    "To make a good cup of tea, you should",
    "La Révolution française a commencé en",
    "The mitochondria is",
    "Dear Sir or Madam,\n\nI am writing to",
    "A list of fruits:\n1. Apple\n2.",
    "The derivative of x squared is",
    "Shakespeare wrote",
    "import torch\n\nclass Model(",
    "If it rains tomorrow, we will",
    "The largest planet in the solar system",
    "Photosynthesis is the process by which",
    "Q: What is 12 times 12?\nA:",
    "Roses are red, violets are blue,",
]
NEW_TOKENS = 64


def test_greedy_tokens_equal_transformers(embedded_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(embedded_model, padding_side="left")
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    model: Any = AutoModelForCausalLM.from_pretrained(embedded_model, dtype=torch.float32)
    inputs = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    # Without an EOS all rows run to the end, on both sides.
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        reference = model.generate(
            **inputs, do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=0
        )[:, inputs["input_ids"].shape[1] :]
    del model
    runner = ModelRunner(EngineConfig(dtype="float32", max_sequence_length=256))
    sequences = [
        Sequence(i, list(ids), len(ids), None, SamplingParams(), 99, 0, frozenset(), kv_slot=i)
        for i, ids in enumerate(prompts)
    ]
    batch = Batch(prefills=[(s, len(s.tokens)) for s in sequences])
    for _ in range(NEW_TOKENS):
        for sequence, sample in runner.run(batch):
            assert sample.token_id is not None
            sequence.computed = len(sequence.tokens)
            sequence.tokens.append(sample.token_id)
        batch = Batch(decodes=sequences)
    for prompt, sequence, want in zip(PROMPTS, sequences, reference.tolist(), strict=True):
        assert sequence.tokens[sequence.prompt_length :] == want, prompt
