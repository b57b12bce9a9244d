"""The trained adapter to a directory that PEFT, the Hub and ``lorax-serve`` read."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch

from lorax_serve.adapter import CONFIG_FILE, match_weights, read, save, undo_broken_save
from lorax_serve.errors import AdapterRejected, TrainingError
from lorax_train.adapters.portable import portable
from lorax_train.config import OutputConfig, SaveDtype
from lorax_train.model.inject import TrainableLoRA
from lorax_train.records.log import LOG_FILE
from lorax_train.records.summary import Summary
from lorax_train.report import serving_commands

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
        # A run that failed leaves its log alone.
        own = {CHECKPOINTS, LOG_FILE}
        others = sorted(path.name for path in out.iterdir() if path.name not in own)
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


def model_card(summary: Summary) -> str:
    """The text of ``README.md``: front matter for the Hub, what the run measured, and how to use
    the adapter. A base model that is not on the Hub is not named in the front matter, where it
    would be refused."""
    front = [
        *([f"base_model: {json.dumps(summary.base_id)}"] if summary.base_id else []),
        "library_name: peft",
        "pipeline_tag: text-generation",
        "tags:",
        "- lora",
        "- lorax-train",
    ]
    parts = [
        "\n".join(["---", *front, "---"]),
        f"# {_escaped(summary.name)}",
        f"A LoRA adapter for `{_code(summary.base)}`, trained with `lorax-train`.",
        _table(summary.figures),
        "The losses are means in nats per learned token, or per pair with `--objective dpo`.",
        "## Data",
        _table(summary.data),
    ]
    if summary.evaluations:
        evaluations = {str(each.step): f"{each.loss:.4f}" for each in summary.evaluations}
        parts += ["## Held-out loss", _table({"after step": "loss", **evaluations}, head=True)]
    parts += ["## Settings", _table(summary.settings)]
    if summary.command:
        parts += ["## Command", _block(summary.command)]
    commands = serving_commands(summary.base_id or summary.base, summary.directory)
    parts += ["## Serving", _block("\n".join(commands))]
    return "\n\n".join(parts) + "\n"


def _table(facts: Mapping[str, str], *, head: bool = False) -> str:
    """Two columns; the first pair is their heads if ``head``."""
    rows = [f"| {_escaped(key)} | {_escaped(value)} |" for key, value in facts.items()]
    first = rows.pop(0) if head else "| | |"
    return "\n".join([first, "|---|---|", *rows])


def _escaped(text: str) -> str:
    """In one line, and nothing in it means anything to Markdown or HTML."""
    text = " ".join(text.split())
    return re.sub(r"([\\`*_{}\[\]<>|#~$&])", r"\\\1", text)


def _code(text: str) -> str:
    return " ".join(text.replace("`", "'").split())


def _block(text: str) -> str:
    fence = "`" * max([3, *(len(ticks) + 1 for ticks in re.findall("`+", text))])
    return f"{fence}sh\n{text}\n{fence}"
