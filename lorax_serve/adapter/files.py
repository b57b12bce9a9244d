"""An adapter directory on disk: ``adapter_config.json`` and ``adapter_model.safetensors``."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from lorax_serve.adapter.config import LoRAConfig
from lorax_serve.errors import AdapterRejected, RejectReason
from lorax_serve.store.digest import CONFIG_FILE, WEIGHTS_FILE, digest_of_bytes

__all__ = ["CONFIG_FILE", "WEIGHTS_FILE", "AdapterFiles", "read", "save"]

MAX_CONFIG_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """What an adapter directory holds, read once, so that ``digest`` names exactly these tensors.

    Attributes:
        config: the checked config.
        tensors: the weights file's tensors by name, on the CPU, in the file's dtypes.
        digest: SHA-256 (hex) over both files' bytes.
        metadata: the strings in the weights file's header; empty if it has none.
    """

    config: LoRAConfig
    tensors: Mapping[str, torch.Tensor]
    digest: str
    metadata: Mapping[str, str]


def read(directory: str | os.PathLike[str]) -> AdapterFiles:
    """Read an adapter directory that PEFT or ``lorax-train`` wrote.

    Raises:
        AdapterRejected: when a file is missing, damaged, or its config is refused. Whether the
            tensors fit a base model is ``match_weights``'s question.
    """
    root = Path(directory)
    raw_config = _read_bytes(root / CONFIG_FILE, MAX_CONFIG_BYTES)
    try:
        parsed = json.loads(raw_config)
    except (ValueError, RecursionError) as error:
        raise AdapterRejected(
            RejectReason.BAD_CONFIG,
            f"{CONFIG_FILE} is not valid JSON: {error}; save or copy the adapter again",
        ) from error
    config = LoRAConfig.from_dict(parsed)
    raw_weights = _read_bytes(root / WEIGHTS_FILE)
    try:
        tensors = safetensors.torch.load(raw_weights)
        metadata = _metadata(raw_weights)
    except (safetensors.SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise AdapterRejected(
            RejectReason.BAD_FILE,
            f"{WEIGHTS_FILE} is not a whole safetensors file: {error}; save or copy the adapter "
            "again",
        ) from error
    digest = digest_of_bytes(raw_config, raw_weights)
    return AdapterFiles(config, tensors, digest, metadata)


def save(
    directory: str | os.PathLike[str],
    config: LoRAConfig,
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write an adapter that PEFT and this server read back; each file appears whole or not at all.

    Args:
        directory: created if absent; the two files in it are replaced.
        config: written as ``adapter_config.json``.
        tensors: by PEFT's tensor names (``weights.tensor_name``), written as they are.
        metadata: extra strings for the safetensors header (provenance, and the probe).
    """
    root = Path(directory)
    root.mkdir(parents=True, exist_ok=True)
    header = {"format": "pt", **(metadata or {})}
    data = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    _replace(root / WEIGHTS_FILE, _sorted_header(safetensors.torch.save(data, header)))
    _replace(root / CONFIG_FILE, json.dumps(config.to_dict(), indent=2).encode() + b"\n")


def _metadata(raw: bytes) -> dict[str, str]:
    """The header's strings; that it is whole and holds strings, safetensors has checked."""
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")].decode())
    return header.get("__metadata__") or {}


def _sorted_header(raw: bytes) -> bytes:
    """The same file with its header's keys in order.

    safetensors writes the metadata in random order, and the same adapter must have one digest.
    """
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + raw[8 + length :]


def _read_bytes(path: Path, limit: int | None = None) -> bytes:
    try:
        # Without O_NONBLOCK, opening a named pipe waits for a writer that may never come.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as f:
            status = os.fstat(f.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise AdapterRejected(RejectReason.BAD_FILE, f"{path.name} is not a regular file")
            if limit is not None and status.st_size > limit:
                raise AdapterRejected(
                    RejectReason.BAD_CONFIG, f"{path.name} is larger than {limit} bytes"
                )
            return f.read()
    except FileNotFoundError as error:
        found = (
            ", ".join(sorted(p.name for p in path.parent.iterdir())[:8])
            if (path.parent.is_dir())
            else "no such directory"
        )
        raise AdapterRejected(
            RejectReason.MISSING_FILE,
            f"there is no {path.name} in {path.parent.name}/ (found: {found or 'nothing'})",
        ) from error
    except OSError as error:
        raise AdapterRejected(
            RejectReason.BAD_FILE, f"{path.name} cannot be read: {error.strerror}"
        ) from error


def _replace(path: Path, data: bytes) -> None:
    staged = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with staged.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)
