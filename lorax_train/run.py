"""One training run from its config to the adapter's files."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
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
from lorax_train.base import choose_device, choose_dtype, load_model
from lorax_train.config import TrainConfig
from lorax_train.console import Console, size
from lorax_train.dataset import Dataset, check_fit, prepare
from lorax_train.estimate import available_memory, estimate
from lorax_train.export import check_output, export, model_card
from lorax_train.inject import TrainableLoRA, inject_all
from lorax_train.loss import TargetLoss
from lorax_train.probe import compute_probe
from lorax_train.quantize import check_available, count_parameters
from lorax_train.quantized_base import original_weights, quantization_warnings, restorable
from lorax_train.report import show_example, show_memory, show_plan, show_probe, show_serving
from lorax_train.trainer import Trainer
from lorax_train.training_run import TrainingRecord, TrainingRun

__all__ = ["TrainResult", "train", "train_all"]


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
    """``train_all`` of one adapter."""
    return train_all([config], console)[0]


def train_all(configs: Sequence[TrainConfig], console: Console | None = None) -> list[TrainResult]:
    """Train adapters on one base model, all at once, and save them; whatever can be checked is
    checked before the model is loaded.

    Args:
        configs: of each adapter. Model, device, dtype and quantize are the first one's.
        console: what is said goes there; default: to stderr.

    Raises:
        TrainingError: when data or settings cannot work, naming the row, flag or tensor.
        ModelUnsupported: when there is no such base model.
    """
    console = console or Console(sys.stderr)
    first = configs[0]
    for config in configs:
        check_output(config.output)
    device = choose_device(first.device)
    dtype = choose_dtype(first.dtype, device)
    check_available(first.quantize)
    source = resolve_model(first.model)
    datasets = [prepare(config, source, console) for config in configs]
    fingerprint = _fingerprint(source, console)
    with _out_of_memory_explained():
        model = load_model(first.model, source, dtype, device, first.quantize)
        if first.quantize != "none":
            for warning in quantization_warnings(first.model, model, source):
                console.warn(warning)
        base_parameters = count_parameters(model)
        for config, data in zip(configs, datasets, strict=True):
            check_fit(config, model, [*data.examples, *data.held_out])
        loss = TargetLoss.prepare(model, datasets[0].examples[0])
        adapters = inject_all(
            model,
            [config.lora for config in configs],
            first.model,
            [config.loop.seed for config in configs],
        )
        loss.routing = adapters[0].routing
        obstacle = _why_not_served(source)
        if obstacle:
            console.warn(f"lorax-serve will refuse this adapter, PEFT will not: {obstacle}")
        runs = [
            TrainingRun(
                adapter, data.examples, data.held_out, config.optimizer, config.loop, config.name
            )
            for adapter, data, config in zip(adapters, datasets, configs, strict=True)
        ]
        trainer = Trainer(loss, runs, datasets[0].tokenizer.pad_id, [console])
        for config, run, data in zip(configs, runs, datasets, strict=True):
            show_plan(console, config, run, base_parameters, dtype)
            show_example(console, run.examples[0], data.tokenizer)
        need = estimate(model, runs, loss)
        show_memory(console, need, available_memory(device))
        if not loss.head_on_targets:
            console.warn("this model's logits are not its head's alone, so all are computed: slow")
        trainer.train()
    return [
        _finish(console, config, model, run, data, source, fingerprint, served=obstacle is None)
        for config, run, data in zip(configs, runs, datasets, strict=True)
    ]


def _finish(
    console: Console,
    config: TrainConfig,
    model: PreTrainedModel,
    run: TrainingRun,
    data: Dataset,
    source: Path,
    fingerprint: str | None,
    *,
    served: bool,
) -> TrainResult:
    """Save what a run has learned."""
    record, adapter = run.record, run.adapter
    if record.interrupted and not record.steps:
        console.line("interrupted before the first step; nothing was saved")
        return TrainResult(model, adapter, record, None)
    metadata = {"data_sha256": data.sha256}
    if fingerprint is not None and restorable(model):
        saved: torch.dtype = getattr(torch, config.output.save_dtype)
        original = original_weights(model, source)
        examples = data.held_out or data.examples
        probe = compute_probe(model, adapter, examples, saved, fingerprint, original)
        show_probe(console, probe)
        metadata |= probe.to_metadata()
    _save(config, adapter, record, metadata)
    _conclude(console, config, record, served=served)
    return TrainResult(model, adapter, record, config.output.directory)


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
