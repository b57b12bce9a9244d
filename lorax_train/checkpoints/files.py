"""Checkpoints on disk: ``step-N`` directories of JSON, safetensors and a list of digests.

A checkpoint is written under another name, synced, and renamed: one that has its name is whole,
whatever happened to the process or the disk. Earlier ones are deleted only after that. Nothing in
it is code: there is no pickle.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

__all__ = [
    "Checkpoint",
    "Damaged",
    "delete_checkpoint",
    "delete_leftovers",
    "list_checkpoints",
    "read_checkpoint",
    "write_checkpoint",
]

_STATE, _DIGESTS = "state.json", "SHA256SUMS"
_NAME = re.compile(r"step-(\d+)")
# Not "step-N", so that nothing takes it for a checkpoint.
_STAGED, _LEAVING = ".step-{}.new", ".step-{}.old"


class Damaged(Exception):
    """A checkpoint that is not what was written; the message says in what."""


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds.

    Attributes:
        state: of JSON's types; ``adapters`` is their number, which is added when it is written.
        tensors: for each adapter, by name.
    """

    state: dict[str, Any]
    tensors: Sequence[Mapping[str, torch.Tensor]]


def list_checkpoints(root: Path) -> list[tuple[int, Path]]:
    """Steps and directories, whole or not, in the order of their steps."""
    if not root.is_dir():
        return []
    found = [(_NAME.fullmatch(path.name), path) for path in root.iterdir() if path.is_dir()]
    return sorted((int(match[1]), path) for match, path in found if match)


def write_checkpoint(root: Path, step: int, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint, durably.

    Args:
        root: the directory of checkpoints, made if absent. One of the same step is replaced.
        step: names it.
        checkpoint: what to write.

    Returns:
        Its directory.

    Raises:
        OSError: the disk is full or fails. No other checkpoint has been touched.
    """
    root.mkdir(parents=True, exist_ok=True)
    staged, final = root / _STAGED.format(step), root / f"step-{step}"
    leaving = root / _LEAVING.format(step)
    delete_leftovers(root)
    try:
        staged.mkdir()
        state = json.dumps(
            checkpoint.state | {"adapters": len(checkpoint.tensors)}, indent=1, allow_nan=False
        )
        sums = [_write(staged / _STATE, f"{state}\n".encode())]
        for number, tensors in enumerate(checkpoint.tensors):
            data = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            sums.append(_write(staged / _tensors_file(number), safetensors.torch.save(data)))
        _write(staged / _DIGESTS, "".join(sums).encode())
        _sync(staged)
        if final.exists():
            final.replace(leaving)
        staged.replace(final)
        _sync(root)
    except BaseException:
        if leaving.exists() and not final.exists():
            leaving.replace(final)
        shutil.rmtree(staged, ignore_errors=True)
        raise
    shutil.rmtree(leaving, ignore_errors=True)
    return final


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint that is whole.

    Raises:
        Damaged: a file is missing, cut short or changed.
    """
    try:
        *lines, end = (path / _DIGESTS).read_bytes().decode("ascii").split("\n")
        if end:
            raise Damaged(f"{_DIGESTS} is cut short")
        pairs = (line.split("  ") for line in lines)
        digests = {name: digest for digest, name in pairs}
        raw = {name: (path / name).read_bytes() for name in digests}
        for name, data in raw.items():
            if hashlib.sha256(data).hexdigest() != digests[name]:
                raise Damaged(f"{name} is not what was written")
        state = json.loads(raw[_STATE])
        names = [_tensors_file(number) for number in range(state["adapters"])]
        return Checkpoint(state, [safetensors.torch.load(raw[name]) for name in names])
    except OSError as error:
        where = Path(error.filename).name if error.filename else path.name
        raise Damaged(f"{where} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, safetensors.SafetensorError) as error:
        raise Damaged(f"{_DIGESTS} is not what was written") from error


def delete_checkpoint(path: Path) -> None:
    """Delete it such that what is left, if this fails, is not taken for a checkpoint."""
    leaving = path.with_name(f".{path.name}.old")
    shutil.rmtree(leaving, ignore_errors=True)
    path.replace(leaving)
    shutil.rmtree(leaving)


def delete_leftovers(root: Path) -> None:
    """Delete what processes left that were killed while they wrote or deleted."""
    for path in (*root.glob(".step-*.new"), *root.glob(".step-*.old")):
        shutil.rmtree(path, ignore_errors=True)


def _tensors_file(number: int) -> str:
    return f"adapter-{number}.safetensors"


def _write(path: Path, data: bytes) -> str:
    """Write durably; returns the line for the list of digests, as ``sha256sum`` has it."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return f"{hashlib.sha256(data).hexdigest()}  {path.name}\n"


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
