"""Makers of tiny models and of PEFT adapters, for golden tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from lorax_serve.kernels.build import INSTRUCTION_SETS, compiler, cpu_lacks, instruction_sets


def _without(instruction_set: str | None = None) -> str:
    """Why kernels cannot be built and run here; empty if they can. A compiler that fails on them
    is no reason: their tests fail then."""
    if compiler() is None:
        return "there is no C++ compiler"
    if instruction_set is not None and cpu_lacks(instruction_set):
        return f"the CPU has no {', '.join(cpu_lacks(instruction_set))}"
    return "" if instruction_sets() else "not an x86 CPU with AVX2"


needs_kernels = pytest.mark.skipif(bool(_without()), reason=_without())
each_kernels = pytest.mark.parametrize(
    "kernels", ["torch", pytest.param("compiled", marks=needs_kernels), "paged"]
)
each_instruction_set = pytest.mark.parametrize(
    "instruction_set",
    [
        pytest.param(name, marks=pytest.mark.skipif(bool(_without(name)), reason=_without(name)))
        for name in INSTRUCTION_SETS
    ],
)

TINY_LLAMA = LlamaConfig(
    vocab_size=128,
    hidden_size=48,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=256,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
    tie_word_embeddings=False,
)
TINY_GPT2 = GPT2Config(
    vocab_size=128,
    n_embd=48,
    n_layer=2,
    n_head=6,
    n_positions=256,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)


def save_tiny_model(directory: Path, config: PreTrainedConfig, seed: int = 7) -> None:
    """Write a random model of ``config`` in float32, and a tokenizer of words ``w0 .. w127``.

    Weights are larger than transformers' own initialisation makes them, so that logits differ
    visibly and a mistake cannot hide in noise.
    """
    torch.manual_seed(seed)
    auto: Any = AutoModelForCausalLM
    model = auto.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.12)
            elif name.endswith(".weight"):  # of a norm
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=0.1)
    model.save_pretrained(directory)
    words = {f"w{i}": i for i in range(128)}
    backend = Tokenizer(models.WordLevel(words, unk_token="w3"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast: Any = PreTrainedTokenizerFast
    tokenizer = fast(
        tokenizer_object=backend,
        # Whole words only: as a plain special token, w1 would be found inside w10.
        bos_token=AddedToken("w1", single_word=True, special=True),
        eos_token=AddedToken("w2", single_word=True, special=True),
        pad_token=AddedToken("w0", single_word=True, special=True),
        unk_token=AddedToken("w3", single_word=True, special=True),
    )
    tokenizer.chat_template = (
        "{% for m in messages %}w4 {{ m['role'] }} {{ m['content'] }} w2 {% endfor %}"
        "{% if add_generation_prompt %}w4 {% endif %}"
    )
    tokenizer.save_pretrained(directory)


def save_peft_adapter(model: Path, directory: Path, **config: Any) -> Path:
    """Have PEFT write an adapter for ``model`` with random, non-zero A and B."""
    from peft import LoraConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    peft_model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **config))
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.15)
    peft_model.save_pretrained(directory)
    return directory
