"""The trained adapter to a directory that PEFT, the Hub and ``lorax-serve`` read."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch

from lorax_serve.adapter import CONFIG_FILE, match_weights, read, save, undo_broken_save
from lorax_serve.errors import AdapterRejected, TrainingError
from lorax_train.config import OutputConfig, SaveDtype
from lorax_train.inject import TrainableLoRA
from lorax_train.portable import portable

__all__ = ["CHECKPOINTS", "check_output", "export", "model_card"]

CHECKPOINTS = "checkpoints"
"""The directory of checkpoints in an adapter's directory."""


def check_output(output: OutputConfig) -> None:
    """Make sure, before anything is computed, that the adapter can be written.

    Raises:
        TrainingError: when ``--out`` is a file, cannot be written, or is a directory that holds
            something else than an adapter and ``--overwrite`` is not given.
    """
    out = output.directory
    if out.exists() and not out.is_dir():
        raise TrainingError(f"--out {out} is a file; name a directory")
    nearest = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise TrainingError(f"--out {out} cannot be written: no write permission for {nearest}")
    if out.is_dir():
        undo_broken_save(out)
    if out.is_dir() and not output.overwrite:
        others = sorted(path.name for path in out.iterdir() if path.name != CHECKPOINTS)
        if others and CONFIG_FILE not in others:
            raise TrainingError(
                f"--out {out} holds something else than an adapter ({', '.join(others[:3])}); "
                "choose another directory, or add --overwrite to write into it"
            )


def export(
    adapter: TrainableLoRA,
    directory: Path,
    dtype: SaveDtype,
    metadata: dict[str, str],
    card: str,
    *,
    as_portable: bool = False,
) -> None:
    """Write config, weights and model card, and read them back with the server's reader.

    Args:
        adapter: what was trained.
        directory: created if absent; an adapter in it is replaced.
        dtype: of A and B in the file.
        metadata: strings for the header of the weights file.
        card: the text of ``README.md``.
        as_portable: whether to write the form of ``portable.portable``.

    Raises:
        TrainingError: when the files cannot be written, or the server's reader refuses them.
    """
    saved = torch.float32 if dtype == "float32" else torch.bfloat16
    config = adapter.config
    if as_portable:
        exact = adapter.tensors(torch.float32)
        weights = match_weights(config, exact, adapter.shapes)
        config, exact = portable(config, weights, adapter.shapes)
        tensors = {name: tensor.to(saved) for name, tensor in exact.items()}
    else:
        tensors = adapter.tensors(saved)
    try:
        save(directory, config, tensors, metadata, card)
    except OSError as error:
        raise TrainingError(
            f"--out {directory} cannot be written: {error.strerror}; an adapter that was there "
            "before is still whole. Make room or mend the disk, then run the command again, with "
            "--resume if there are checkpoints"
        ) from error
    try:
        files = read(directory)
        match_weights(files.config, files.tensors, adapter.shapes)
    except AdapterRejected as error:
        raise TrainingError(f"the adapter in {directory} cannot be served: {error}") from error


def model_card(base: str, name: str, facts: dict[str, str]) -> str:
    """The text of ``README.md``: front matter for the Hub, and what the run measured."""
    rows = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    return f"""---
base_model: {json.dumps(base)}
library_name: peft
pipeline_tag: text-generation
tags:
- lora
---

# {name}

A LoRA adapter for `{base}`, trained with `lorax-train`.

| | |
|---|---|
{rows}

The losses are mean cross-entropies in nats per learned token.
"""
