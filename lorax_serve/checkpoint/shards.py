"""The tensors of a checkpoint by name, over however many safetensors files it has."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import safetensors

from lorax_serve.errors import ModelUnsupported

__all__ = ["open_shards"]

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


def open_shards(
    directory: Path, stack: ExitStack, backend: Literal["mmap", "pread"] = "mmap"
) -> dict[str, Any]:
    """Map the weight files of a Hugging Face model directory; nothing but headers is read.

    Args:
        directory: with ``model.safetensors``, or its index and shards.
        stack: closes the files.
        backend: ``pread`` reads each tensor into memory of its own, which is given back with it.
            The pages of a mapped file stay with the process once they were touched.

    Returns:
        The open file of each tensor's name; ``get_tensor`` of it gives a view of the mapped file.

    Raises:
        ModelUnsupported: when there are no such files, or one is missing or damaged.
    """
    shard_of: dict[str, Any] = {}
    for path in _files(directory):
        try:
            file = safetensors.safe_open(path, framework="pt", backend=backend)
            shard = stack.enter_context(file)
        except (OSError, safetensors.SafetensorError) as error:
            raise ModelUnsupported(f"{path} is not a whole safetensors file: {error}") from error
        shard_of |= dict.fromkeys(shard.keys(), shard)
    return shard_of


def _files(directory: Path) -> list[Path]:
    if (directory / _INDEX).is_file():
        index = json.loads((directory / _INDEX).read_text())
        return sorted({directory / name for name in index["weight_map"].values()})
    if (directory / _SINGLE).is_file():
        return [directory / _SINGLE]
    raise ModelUnsupported(
        f"{directory} has neither {_SINGLE} nor {_INDEX}; only safetensors weights are read"
    )
