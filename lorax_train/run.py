"""One training run from its config to the adapter's files."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from lorax_serve._version import __version__
from lorax_serve.errors import ModelUnsupported, TrainingError
from lorax_serve.model.architectures import read_spec
from lorax_serve.model.fingerprint import base_fingerprint
from lorax_serve.model.source import resolve_model
from lorax_train.base import (
    Tokenizer,
    choose_device,
    choose_dtype,
    load_model,
    load_tokenizer,
    vocabulary_size,
)
from lorax_train.batches import collate, split
from lorax_train.config import DataConfig, TrainConfig
from lorax_train.console import Console, size
from lorax_train.encode import Example, encode_rows
from lorax_train.estimate import available_memory, estimate
from lorax_train.export import check_output, export, model_card
from lorax_train.inject import TrainableLoRA, inject
from lorax_train.loss import TargetLoss
from lorax_train.probe import compute_probe
from lorax_train.report import show_example, show_memory, show_plan, show_probe, show_serving
from lorax_train.rows import Messages, read_rows
from lorax_train.trainer import Trainer, TrainingRecord

__all__ = ["TrainResult", "train"]


@dataclass(frozen=True)
class TrainResult:
    """What a run leaves.

    Attributes:
        model: the base with the trained layers in it.
        adapter: the trained layers.
        record: steps, losses and times.
        directory: where the adapter was saved; None if it was interrupted before the first step.
    """

    model: PreTrainedModel
    adapter: TrainableLoRA
    record: TrainingRecord
    directory: Path | None


def train(config: TrainConfig, console: Console | None = None) -> TrainResult:
    """Train an adapter and save it; whatever can be checked is checked before the model is loaded.

    Raises:
        TrainingError: when data or settings cannot work, naming the row, flag or tensor.
        ModelUnsupported: when there is no such base model.
    """
    console = console or Console(sys.stderr)
    check_output(config.output)
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    examples, held_out, tokenizer, source = _prepare_data(config, console)
    data_hash = hashlib.sha256(config.data.train.read_bytes()).hexdigest()
    fingerprint = _fingerprint(source, console)
    with _out_of_memory_explained():
        model = load_model(config.model, source, dtype, device)
        base_parameters = sum(p.numel() for p in model.parameters())
        _check_fit(config, model, [*examples, *held_out])
        adapter = inject(model, config.lora, config.model, config.loop.seed)
        obstacle = _why_not_served(source)
        if obstacle:
            console.warn(f"lorax-serve will refuse this adapter, PEFT will not: {obstacle}")
        # Longer rows than one are not needed to see whether both ways give the same logits.
        loss = TargetLoss.check(model, collate(examples[:1], tokenizer.pad_id).to(device))
        trainer = Trainer(
            adapter, loss, examples, held_out, config.optimizer, config.loop, tokenizer.pad_id
        )
        show_plan(console, config, adapter, trainer, base_parameters, dtype)
        show_example(console, examples[0], tokenizer)
        need = estimate(model, adapter, loss, examples, config.loop.batch_size)
        show_memory(console, need, available_memory(device))
        if not loss.head_on_targets:
            console.warn("this model's logits are not its head's alone, so all are computed: slow")
        record = trainer.run(console)
    if record.interrupted and not record.steps:
        console.line("interrupted before the first step; nothing was saved")
        return TrainResult(model, adapter, record, None)
    metadata = {"data_sha256": data_hash}
    if fingerprint is not None:
        saved: torch.dtype = getattr(torch, config.output.save_dtype)
        probe = compute_probe(model, adapter, held_out or examples, saved, fingerprint)
        show_probe(console, probe)
        metadata |= probe.to_metadata()
    _save(config, adapter, record, metadata)
    _conclude(console, config, record, served=obstacle is None)
    return TrainResult(model, adapter, record, config.output.directory)


def _prepare_data(
    config: TrainConfig, console: Console
) -> tuple[list[Example], list[Example], Tokenizer, Path]:
    """Read and encode the rows; returns training and held-out examples, and the model's place."""
    data: DataConfig = config.data
    rows = read_rows(data.train)
    eval_rows = read_rows(data.eval_file) if data.eval_file else []
    if data.eval_split and len(rows) < 2:
        raise TrainingError("--eval-split needs at least two rows; give more, or --eval-data")
    source = resolve_model(config.model)
    chat = any(isinstance(row.content, Messages) for row in (*rows, *eval_rows))
    tokenizer = load_tokenizer(config.model, source, chat=chat)
    examples, warnings = encode_rows(rows, tokenizer, data.max_length)
    held_out: list[Example] = []
    if eval_rows:
        held_out, more = encode_rows(eval_rows, tokenizer, data.max_length)
        warnings += [f"{data.eval_file}: {warning}" for warning in more]
    elif data.eval_split:
        if len(examples) < 2:
            raise TrainingError("--eval-split needs at least two rows that fit --max-length")
        examples, held_out = split(examples, data.eval_split, config.loop.seed)
    for warning in warnings:
        console.warn(warning)
    return examples, held_out, tokenizer, source


def _check_fit(config: TrainConfig, model: PreTrainedModel, examples: list[Example]) -> None:
    longest = max(examples, key=lambda example: len(example.tokens))
    limit = getattr(model.config, "max_position_embeddings", None)
    if isinstance(limit, int) and len(longest.tokens) > limit:
        raise TrainingError(
            f"{longest.where}: {len(longest.tokens)} tokens, but {config.model} has {limit} "
            f"positions; lower --max-length to {limit}"
        )
    vocabulary = vocabulary_size(model)
    highest = max(examples, key=lambda example: max(example.tokens))
    if max(highest.tokens) >= vocabulary:
        raise TrainingError(
            f"{highest.where}: token id {max(highest.tokens)}, but {config.model} has an embedding "
            f"of {vocabulary}; its tokenizer belongs to another model"
        )


def _save(
    config: TrainConfig, adapter: TrainableLoRA, record: TrainingRecord, metadata: dict[str, str]
) -> None:
    eval_loss = f"{record.eval_losses[-1]:.6f}" if record.eval_losses else "none"
    metadata = metadata | {
        "producer": f"lorax-train {__version__}",
        "base_model": config.model,
        "seed": str(config.loop.seed),
        "steps": str(record.steps),
        "train_loss": f"{record.train_loss:.6f}",
        "eval_loss": eval_loss,
    }
    facts = {
        "rank, alpha": f"{adapter.config.r}, {adapter.config.lora_alpha:g}",
        "trained parameters": f"{adapter.n_parameters:,}",
        "steps": str(record.steps) + (" (interrupted)" if record.interrupted else ""),
        "tokens trained on": f"{record.tokens:,}",
        "loss, latest steps": f"{record.train_loss:.4f}",
        "held-out loss before": f"{record.eval_losses[0]:.4f}" if record.eval_losses else "none",
        "held-out loss after": f"{record.eval_losses[-1]:.4f}" if record.eval_losses else "none",
        "learning rate": f"{config.optimizer.lr:g} ({config.optimizer.schedule})",
        "seed": str(config.loop.seed),
        "data (SHA-256)": f"`{metadata['data_sha256']}`",
        "producer": metadata["producer"],
    }
    out = config.output
    card = model_card(config.model, out.directory.resolve().name, facts)
    export(adapter, out.directory, out.save_dtype, metadata, card)


def _why_not_served(source: Path) -> str | None:
    """What the server would say to this model; None if nothing."""
    try:
        read_spec(source)
    except ModelUnsupported as error:
        return str(error)
    return None


def _fingerprint(source: Path, console: Console) -> str | None:
    """Of the base weights; None, and a warning, where only transformers can read them."""
    try:
        return base_fingerprint(source)
    except ModelUnsupported as error:
        console.warn(f"no probe will be stored with the adapter: {error}")
        return None


def _conclude(
    console: Console, config: TrainConfig, record: TrainingRecord, *, served: bool
) -> None:
    held_out = f", held-out {record.eval_losses[-1]:.4f}" if record.eval_losses else ""
    done = "interrupted; saved what there is:" if record.interrupted else "done:"
    n_bytes = sum(path.stat().st_size for path in config.output.directory.glob("*.safetensors"))
    console.line(
        f"{done} {record.steps} steps in {record.seconds:.1f} s, "
        f"{record.tokens_per_second:.0f} tokens/s; loss {record.train_loss:.4f}{held_out}"
    )
    console.line(f"adapter in {config.output.directory} ({size(n_bytes)})")
    if served:
        show_serving(console, config.model, config.output.directory)


@contextmanager
def _out_of_memory_explained() -> Iterator[None]:
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        on_cpu = "allocate memory" in str(error)  # a bare RuntimeError there
        if not on_cpu and not isinstance(error, torch.OutOfMemoryError | MemoryError):
            raise
        raise TrainingError(
            "out of memory; lower --batch-size (and raise --grad-accumulation by as much, for the "
            "same result), lower --max-length, or choose a smaller model"
        ) from error
