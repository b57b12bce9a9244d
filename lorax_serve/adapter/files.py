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
from lorax_serve.store.disk import fsync

__all__ = [
    "CARD_FILE",
    "CONFIG_FILE",
    "WEIGHTS_FILE",
    "AdapterFiles",
    "read",
    "save",
    "undo_broken_save",
]

CARD_FILE = "README.md"
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
    card: str | None = None,
) -> None:
    """Write an adapter that PEFT and this server read back, all of it or, after an error, nothing.

    Everything is on disk under other names before anything is replaced. A process that is killed
    leaves the old adapter or the new one; if their configs differ, there is an instant at which it
    leaves neither (see ``undo_broken_save``), but never a config with the other's weights.

    Args:
        directory: created if absent; the files in it are replaced.
        config: written as ``adapter_config.json``.
        tensors: by PEFT's tensor names (``weights.tensor_name``), written as they are.
        metadata: extra strings for the safetensors header (provenance, and the probe).
        card: the text of ``README.md``; None leaves that file alone.

    Raises:
        OSError: the disk is full or fails; what was there before is there still.
    """
    root = Path(directory)
    root.mkdir(parents=True, exist_ok=True)
    _settle(root)
    header = {"format": "pt", **(metadata or {})}
    data = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    files = {
        CONFIG_FILE: json.dumps(config.to_dict(), indent=2).encode() + b"\n",
        WEIGHTS_FILE: _sorted_header(safetensors.torch.save(data, header)),
    }
    if card is not None:
        files[CARD_FILE] = card.encode()
    _replace_all(root, files)


def undo_broken_save(directory: str | os.PathLike[str]) -> None:
    """Put back what a ``save`` had set aside when it was killed, and delete what it had staged.

    Nobody may be saving there at the same time.
    """
    root = Path(directory)
    _settle(root)
    for name in (WEIGHTS_FILE, CONFIG_FILE, CARD_FILE):
        for path in root.glob(f".{name}.*.tmp"):
            path.unlink()


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


def _replace_all(root: Path, files: Mapping[str, bytes]) -> None:
    """Replace all files or, after an error, none.

    Only the first step takes space. Weights under a config that stays need no more than a rename.
    Otherwise both leave before the new ones come, since no rename replaces two files at once. The
    config comes first: a directory with a config alone is known for one that is to have an adapter.
    """
    staged = {name: root / f".{name}.{os.getpid()}.tmp" for name in files}
    try:
        for name, data in files.items():
            _write_durably(staged[name], data)
        if not _holds(root / CONFIG_FILE, files[CONFIG_FILE]):
            for name in (CONFIG_FILE, WEIGHTS_FILE):
                if (root / name).exists():
                    (root / name).replace(_aside(root / name))
        for name, path in staged.items():
            path.replace(root / name)
        fsync(root)
    except BaseException:
        _put_back(root)
        raise
    finally:
        for path in staged.values():
            path.unlink(missing_ok=True)
    _settle(root)


def _settle(root: Path) -> None:
    """Have nothing set aside: an adapter that is there is what counts."""
    if not all((root / name).exists() for name in (CONFIG_FILE, WEIGHTS_FILE)):
        _put_back(root)
    for name in (WEIGHTS_FILE, CONFIG_FILE):
        _aside(root / name).unlink(missing_ok=True)


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def _put_back(root: Path) -> None:
    for name in (WEIGHTS_FILE, CONFIG_FILE):
        if _aside(root / name).exists():
            _aside(root / name).replace(root / name)


def _holds(path: Path, data: bytes) -> bool:
    return path.is_file() and path.read_bytes() == data


def _write_durably(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
