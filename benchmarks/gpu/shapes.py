"""The models that are measured, by shape alone, and how much of each part is run on them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["BANDWIDTH", "PEAK_FLOPS", "SHAPES", "Shape", "Sizes"]

BANDWIDTH = 3.0e12
"""Bytes a second that an H100's memory gives a good kernel; its data sheet says 3.35e12."""

PEAK_FLOPS = 989e12
"""Of an H100 in bfloat16, without sparsity."""

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is run. The defaults are for an H100, minutes in all.

    Attributes:
        context: tokens of a sequence that decodes, the one that is computed included.
        rows: KV rows, the largest batch; ``batches`` are those measured.
        ranks: the first is the one that most parts use.
        distinct: adapters in a batch, beside one for each row.
        steps, rounds: timed steps in a round, and rounds, of each case.
        prompts: sequences of one length that are computed in one step, and the length.
        streams, stream_tokens: what runs while adapters load, and how long.
        lengths: the bounds of S-LoRA's prompts and outputs, in tokens.
        populations: how many adapters its requests are spread over.
        requests: of each of its runs.
        peer_batch, peer_adapters, peer_tokens: of the comparison with PEFT.
        peer_requests: of the comparison with continuous batching: how many, prompt, output.
    """

    context: int = 512
    rows: int = 128
    batches: tuple[int, ...] = (1, 8, 32, 128)
    ranks: tuple[int, ...] = (16, 64)
    distinct: tuple[int, ...] = (1, 8, 32)
    steps: int = 12
    rounds: int = 2
    max_length: int = 1088
    kv_tokens: int = 128 * 640
    prefill_tokens: int = 2048
    prompts: tuple[tuple[int, int], ...] = ((1, 128), (1, 512), (4, 512), (2, 1024))
    loads: int = 8
    load_prompt: int = 64
    streams: int = 32
    stream_tokens: int = 300
    load_every: int = 10
    lengths: tuple[int, int] = (8, 128)
    populations: tuple[int, ...] = (5, 100, 1000)
    requests: int = 1000
    slora_ranks: tuple[int, ...] = (8, 12, 16)
    peer_batch: int = 32
    peer_adapters: int = 8
    peer_tokens: int = 12
    peer_requests: tuple[int, int, int] = (64, 256, 128)
    kernel_rows: tuple[int, ...] = (1, 32, 128)
    kernel_repeats: int = 8


@dataclass(frozen=True, slots=True)
class Shape:
    """A model without weights.

    Attributes:
        config: of transformers' ``LlamaConfig``.
        sizes: how much is run on it.
    """

    name: str
    config: Mapping[str, Any]
    sizes: Sizes = Sizes()


_SMALL = Sizes(
    context=24,
    rows=8,
    batches=(1, 4),
    ranks=(4, 8),
    distinct=(1, 2),
    steps=2,
    rounds=2,
    max_length=128,
    kv_tokens=8 * 128,
    prefill_tokens=64,
    prompts=((1, 16), (2, 16)),
    loads=2,
    load_prompt=8,
    streams=3,
    stream_tokens=110,
    load_every=4,
    lengths=(4, 8),
    populations=(2, 10),
    requests=12,
    slora_ranks=(2, 4),
    peer_batch=3,
    peer_adapters=2,
    peer_tokens=3,
    peer_requests=(4, 12, 6),
    kernel_rows=(1, 4),
    kernel_repeats=1,
)

SHAPES = {
    shape.name: shape
    for shape in (
        Shape(
            "8b",  # Llama-3.1-8B
            {
                "vocab_size": 128256,
                "hidden_size": 4096,
                "intermediate_size": 14336,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "head_dim": 128,
                "max_position_embeddings": 131072,
                "rms_norm_eps": 1e-5,
                "rope_parameters": {**_LLAMA3_ROPE, "factor": 8.0},
                "tie_word_embeddings": False,
            },
        ),
        Shape(
            "1b",  # Llama-3.2-1B
            {
                "vocab_size": 128256,
                "hidden_size": 2048,
                "intermediate_size": 8192,
                "num_hidden_layers": 16,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "head_dim": 64,
                "max_position_embeddings": 131072,
                "rms_norm_eps": 1e-5,
                "rope_parameters": {**_LLAMA3_ROPE, "factor": 32.0},
                "tie_word_embeddings": True,
            },
        ),
        Shape(
            "tiny",  # to see on a CPU that all of it runs
            {
                "vocab_size": 256,
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 16,
                "max_position_embeddings": 2048,
                "tie_word_embeddings": False,
            },
            _SMALL,
        ),
    )
}
