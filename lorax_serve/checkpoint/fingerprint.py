"""A base model's weights by content: whether an adapter meets the weights it was trained on.

64 elements of each tensor are read, one at an uneven place in each 64th part of it, and all
elements of smaller tensors. They are rounded to bfloat16 and hashed with the tensor's name and
shape.

The same: float32 weights and their bfloat16 copy; one file or shards; with or without a stored copy
of a tied head, of GPT-2's ``transformer.`` prefix, and of what a config determines (RoPE's
frequencies, causal masks).

Different: another model, another fine-tune or merge of it (which moves nearly every element of the
tensors it moves), a resized vocabulary, a renamed tensor. A float16 copy is different too: it
rounds twice, and tiny weights away; so is every other quantisation.

Not told apart: a change to few elements of a tensor (an edit of some rows of an embedding), one
below bfloat16's eight bits, and everything outside the weights (RoPE's base, norms' epsilon, the
tokenizer).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from typing import Any

import safetensors
import torch

from lorax_serve.checkpoint.shards import open_shards
from lorax_serve.errors import ModelUnsupported

__all__ = ["base_fingerprint"]

_SAMPLES = 64
_HEAD = "lm_head.weight"
_PREFIX = "transformer."
# Buffers of older checkpoints, which the config determines.
_BUFFERS = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")
# Sums of this fraction fall evenly into the unit interval, and into step with no tensor's rows.
_GOLDEN = 0x9E3779B9


def base_fingerprint(directory: Path) -> str:
    """Identify the weights in a Hugging Face model directory; what it tells apart is above.

    Of 135M parameters it takes 0.1 s, and a time that grows with the number of tensors alone.

    Returns:
        A SHA-256 in hex.

    Raises:
        ModelUnsupported: when there are no safetensors weights, or a file is missing or damaged.
    """
    with ExitStack() as stack:
        tensors = {
            name.removeprefix(_PREFIX): _sample(directory, shard, name)
            for name, shard in open_shards(directory, stack).items()
            if not name.endswith(_BUFFERS)
        }
    if _is_copy(tensors):
        del tensors[_HEAD]
    digest = hashlib.sha256(b"lorax base fingerprint 1\n")
    for name, (shape, samples) in sorted(tensors.items()):
        digest.update(json.dumps([name, shape, len(samples)]).encode() + b"\n" + samples)
    return digest.hexdigest()


def _is_copy(tensors: Mapping[str, tuple[list[int], bytes]]) -> bool:
    """Whether the head is stored a second time under the name of the embedding it is tied to."""
    head = tensors.get(_HEAD)
    return any(name != _HEAD and tensor == head for name, tensor in tensors.items())


def _sample(directory: Path, shard: Any, name: str) -> tuple[list[int], bytes]:
    """The tensor's shape, and its sampled elements as bfloat16's bytes."""
    try:
        tensor: torch.Tensor = shard.get_tensor(name)  # a view: of the file, little is read
    except (safetensors.SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise ModelUnsupported(f"{directory}: {name} cannot be read: {error}") from error
    samples = tensor.reshape(-1)[_places(tensor.numel())].to(torch.bfloat16)
    return list(tensor.shape), samples.view(torch.int16).numpy().astype("<i2").tobytes()


@lru_cache(maxsize=64)
def _places(size: int) -> torch.Tensor:
    """Where a tensor of ``size`` elements is sampled."""
    if size <= _SAMPLES:
        return torch.arange(size)
    # In whole numbers, so that every machine has the same places.
    places = [(i << 32) + ((i + 1) * _GOLDEN) % (1 << 32) for i in range(_SAMPLES)]
    return torch.tensor([place * size // (_SAMPLES << 32) for place in places])
