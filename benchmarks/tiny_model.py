"""Random models of a few thousand parameters, for tests and for the local cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

__all__ = ["TINY_GPT2", "TINY_LLAMA", "save_tiny_model"]

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
