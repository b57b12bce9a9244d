"""Parameters that Elixir's Nx wrote: a map of layers, each a map of tensors by name.

Two forms are read. ``Nx.serialize`` writes ``nx``, a version, the bytes' order, the size of a term,
the term, and then the tensors' bytes, to which the term points. ``:erlang.term_to_binary`` of the
parameters themselves writes a term with the bytes in it, if they are on ``Nx.BinaryBackend``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lorax_serve.errors import TrainingError
from lorax_train.elixir.etf import VERSION, Atom, read_term

__all__ = ["Layers", "read_layers"]

Layers = dict[str, dict[str, torch.Tensor]]

_MAGIC, _NX_VERSION, _HEADER = b"nx", 1, 12
_MAX_FILE = 1 << 30
_MAX_DIMENSIONS = 8
_MAP = "Elixir.Nx.Container.Map"
_DTYPES = {
    ("f", 16): torch.float16,
    ("f", 32): torch.float32,
    ("f", 64): torch.float64,
    ("bf", 16): torch.bfloat16,
}


def read_layers(path: Path) -> Layers:
    """Read the floating-point tensors of a file, by layer and name.

    Others (the state of dropouts) are left out.

    Raises:
        TrainingError: naming the file and what is wrong with it.
    """
    try:
        size = path.stat().st_size
        if not path.is_file() or size > _MAX_FILE:
            raise TrainingError(f"{path} is not a file of at most {_MAX_FILE} bytes")
        data = path.read_bytes()
    except OSError as error:
        raise TrainingError(f"{path} cannot be read: {error.strerror}") from error
    try:
        return _layers(data)
    except TrainingError as error:
        raise TrainingError(f"{path} is no parameters that Elixir's Nx wrote: {error}") from error


def _layers(data: bytes) -> Layers:
    if data[:1] == bytes([VERSION]):
        return _tensors(read_term(data), _struct_tensor)
    if data[:2] != _MAGIC:
        raise TrainingError("it begins neither with nx nor as an Erlang term")
    if len(data) < _HEADER or data[2] != _NX_VERSION or data[3] not in (0, 1):
        raise TrainingError(f"only version {_NX_VERSION} of Nx.serialize's format is read")
    end = _HEADER + int.from_bytes(data[4:_HEADER], "big")
    if end > len(data):
        raise TrainingError("it is cut short")
    order = "little" if data[3] == 0 else "big"
    buffers = memoryview(data)[end:]

    def tensor(term: Any) -> torch.Tensor | None:
        match term:
            case ("t", shape, kind, _, [], int(offset), int(size)):
                if not 0 <= offset <= offset + size <= len(buffers):
                    raise TrainingError("it is cut short: a tensor's bytes are not in it")
                return _tensor(shape, kind, bytes(buffers[offset : offset + size]), order)
        raise TrainingError("where a tensor should be there is something else")

    return _tensors(read_term(data[_HEADER:end]), tensor)


def _tensors(term: Any, tensor: Callable[[Any], torch.Tensor | None]) -> Layers:
    found: Layers = {}
    for layer, content in _pairs(term):
        if layer in found:
            raise TrainingError(f"layer {layer!r} is there twice")
        tensors = ((name, tensor(each)) for name, each in _pairs(content))
        found[layer] = {name: each for name, each in tensors if each is not None}
    return found


def _pairs(term: Any) -> list[tuple[str, Any]]:
    """A map's keys, as text, and values, whichever way it was written."""
    match term:
        case (Atom() as name, list(items), _) if name == _MAP:
            pairs = items
        case dict():
            pairs = list(term.items())
        case _:
            raise TrainingError("where a map should be there is something else")
    found = []
    for pair in pairs:
        match pair:
            case (str() | bytes() as key, value):
                text = key if isinstance(key, str) else key.decode("utf-8", "replace")
                found.append((str(text), value))
            case _:
                raise TrainingError("a map has a key that is no name")
    return found


def _struct_tensor(term: Any) -> torch.Tensor | None:
    """A tensor of ``:erlang.term_to_binary``; whatever order the machine had, it was little."""
    match term:
        case {"__struct__": "Elixir.Nx.Tensor", "shape": shape, "type": kind, "data": data}:
            match data:
                case {"__struct__": "Elixir.Nx.BinaryBackend", "state": bytes(raw)}:
                    return _tensor(shape, kind, raw, "little")
            raise TrainingError(
                "a tensor's numbers are not in it but on a device; write the file with Nx.serialize"
            )
    raise TrainingError("where a tensor should be there is something else")


def _tensor(shape: Any, kind: Any, raw: bytes, order: str) -> torch.Tensor | None:
    match kind:
        case (Atom() as letter, int(bits)):
            dtype = _DTYPES.get((str(letter), bits))
        case _:
            raise TrainingError("a tensor has no type")
    if dtype is None:
        return None
    if (
        not isinstance(shape, tuple)
        or len(shape) > _MAX_DIMENSIONS
        or not all(isinstance(size, int) and 0 < size < 1 << 31 for size in shape)
        or math.prod(shape) * dtype.itemsize != len(raw)
    ):
        raise TrainingError("a tensor's bytes are not those of its shape")
    numbers = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    if order == "big":
        numbers = numbers.view(-1, dtype.itemsize).flip(1).flatten()
    tensor = numbers.view(dtype).reshape(shape)
    if not bool(tensor.isfinite().all()):
        raise TrainingError("a tensor holds NaN or infinity")
    return tensor
