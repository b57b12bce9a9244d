"""One training run from its config to the adapter's files."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from lorax_serve._version import __version__
from lorax_serve.checkpoint.architectures import read_spec
from lorax_serve.checkpoint.fingerprint import base_fingerprint
from lorax_serve.checkpoint.source import resolve_model
from lorax_serve.errors import ModelUnsupported, TrainingError
from lorax_train.adapters.export import check_output, export, model_card
from lorax_train.adapters.portable import check_portable
from lorax_train.adapters.probe import compute_probe
from lorax_train.checkpoints.alike import Alike, begin_alike, check_alike, check_same_task
from lorax_train.checkpoints.checkpoint import Checkpoints
from lorax_train.config import TrainConfig, check_together
from lorax_train.console import Console, Nowhere, size
from lorax_train.data.dataset import Dataset, check_files, prepare
from lorax_train.data.token_store import TokenStore
from lorax_train.distributed import Processes
from lorax_train.loop.estimate import available_memory, estimate
from lorax_train.loop.loss import TargetLoss
from lorax_train.loop.objective import choose_function, choose_objective, try_function
from lorax_train.loop.out_of_memory import is_out_of_memory, out_of_memory
from lorax_train.loop.trainer import Trainer
from lorax_train.loop.training_run import TrainingRecord, TrainingRun
from lorax_train.model.base import check_dense, choose_device, choose_dtype, load_model
from lorax_train.model.checkpointing import checkpoint_layers
from lorax_train.model.fit import check_fit
from lorax_train.model.inject import TrainableLoRA, inject_all, tied_targets
from lorax_train.model.lean_ops import PLAIN, compiled_ops
from lorax_train.model.quantize import check_available, count_parameters
from lorax_train.model.quantized_base import original_weights, quantization_warnings, restorable
from lorax_train.records.log import LOG_FILE, read_curves
from lorax_train.records.page import Report
from lorax_train.records.recording import (
    REPORT_FILE,
    check_recording,
    recorders,
    write_reports,
)
from lorax_train.records.summary import Summary, summarize
from lorax_train.report import (
    segments,
    show_example,
    show_memory,
    show_plan,
    show_probe,
    show_serving,
    show_sharded,
)

__all__ = ["TrainResult", "train", "train_all"]


@dataclass(frozen=True)
class TrainResult:
    """What a run leaves.

    Attributes:
        model: the base with the trained layers in it.
        adapter: the trained layers.
        record: steps, losses and times.
        directory: where the adapter was saved; None if it was given up, or interrupted before the
            first step.
        summary: of the run, if it was saved.
    """

    model: PreTrainedModel
    adapter: TrainableLoRA
    record: TrainingRecord
    directory: Path | None
    summary: Summary | None = None


def train(config: TrainConfig, console: Console | None = None) -> TrainResult:
    """``train_all`` of one adapter."""
    return train_all([config], console)[0]


def train_all(
    configs: Sequence[TrainConfig],
    console: Console | None = None,
    *,
    dry_run: bool = False,
    processes: Processes | None = None,
) -> list[TrainResult]:
    """Train adapters on one base model, all at once, and save them; whatever can be checked is
    checked before the model is loaded.

    Args:
        configs: of each adapter, which must agree in what ``check_together`` looks at.
        console: what is said goes there; default: to stderr, of the first process.
        dry_run: do everything but the training, and return nothing.
        processes: that train together, all of which call this. Only the first one writes, and its
            results alone have a summary.

    Raises:
        TrainingError: when data or settings cannot work, naming the row, flag or tensor; or of
            adapters that were given up, when the others are saved.
        ModelUnsupported: when there is no such base model.
    """
    processes = processes or Processes()
    console = console or Console(sys.stderr if processes.is_first else Nowhere())
    first = configs[0]
    check_together(configs)
    for config in configs:
        with _naming(config):
            if processes.is_first:
                check_output(config.output)
            check_files(config.data)
    if processes.is_first:
        check_recording(configs)
    function = choose_function(first)
    device = choose_device(first.device, processes.local_rank)
    if first.fsdp and processes.local_rank is None:
        raise TrainingError(
            "--fsdp keeps a part of the base in each of several processes, but this one is alone; "
            "start them with torchrun --nproc-per-node N -m lorax_train, or leave it out"
        )
    dtype = choose_dtype(first.dtype, device)
    check_available(first.quantize)
    with processes.machine_first():
        source = resolve_model(first.model)
    check_dense(first.model, source, first.quantize)
    datasets = []
    stores: dict[str, TokenStore] = {}
    # Which may be given to some of the processes only.
    cached = any(processes.gather(any(config.data.cache for config in configs)))
    with processes.machine_first() if cached else nullcontext():
        for config in configs:
            with _naming(config):
                datasets.append(prepare(config, source, console.warn, stores))
    fingerprint = _fingerprint(source, console)
    base = fingerprint or first.model
    check_same_task(processes, configs, datasets, base, dtype, device, dry_run=dry_run)
    checkpoints = None
    if processes.is_first:
        checkpoints = Checkpoints(configs, datasets, base, dtype, console, processes.world)
    with _out_of_memory_explained():
        # Whole on the CPU, where it is to be in pieces on the device.
        place = torch.device("cpu") if first.fsdp else device
        model = load_model(first.model, source, dtype, place, first.quantize)
        if first.quantize != "none":
            for warning in quantization_warnings(first.model, model, source):
                console.warn(warning)
        base_parameters = count_parameters(model)
        for config, data in zip(configs, datasets, strict=True):
            for examples in filter(None, (data.examples, data.held_out)):
                with _naming(config):
                    check_fit(config, model, examples)
        try_function(first, function, model)
        trial = datasets[0].examples[0].rows[0]
        ops = compiled_ops(device, dtype) if first.compile else PLAIN
        loss = TargetLoss.prepare(model, trial, function=function, ops=ops)
        adapters = inject_all(
            model,
            [config.lora for config in configs],
            first.model,
            [config.loop.seed for config in configs],
        )
        for config, adapter in zip(configs, adapters, strict=True):
            if config.output.portable:
                check_portable(adapter.config, adapter.layers, adapter.shapes)
        loss.routing = adapters[0].routing
        objective, before = choose_objective(loss, configs, adapters, processes)
        if any(config.loop.checkpointing for config in configs):
            checkpoint_layers(model, loss.routing)
        for tied in dict.fromkeys(path for each in adapters for path in tied_targets(model, each)):
            console.warn(
                f"{tied} shares its weight with another module, which this adapter leaves alone; "
                "merging it into the base would change both"
            )
        obstacle = _why_not_served(source)
        if obstacle:
            console.warn(f"lorax-serve will refuse this adapter, PEFT will not: {obstacle}")
        runs = [
            TrainingRun(
                adapter, data.examples, data.held_out, config.optimizer, config.loop, config.name
            )
            for adapter, data, config in zip(adapters, datasets, configs, strict=True)
        ]
        listeners = [*before, Alike(processes, first.loop.save_every)]
        if checkpoints is not None:
            listeners += [console, *recorders(configs, console.warn), checkpoints]
        pad_id = datasets[0].tokenizer.pad_id
        trainer = Trainer(objective, runs, pad_id, listeners, processes, repeatable=not first.fsdp)
        for config, run, data in zip(configs, runs, datasets, strict=True):
            show_plan(console, config, run, base_parameters, dtype)
            show_example(console, run.examples[0], data.tokenizer)
        if processes.world > 1:
            console.line(f"processes  {processes.world}, which share the rows of each step")
        need = estimate(model, runs, loss, processes.world)
        show_memory(console, need, available_memory(device), device.type)
        if not loss.head_on_targets:
            console.warn("this model's logits are not its head's alone, so all are computed: slow")
        if first.fsdp:
            # Heavy, and only there where it is asked for.
            from lorax_train.model.sharding import shard_layers

            parts = shard_layers(model, adapters, processes.world, device)
            show_sharded(console, parts.whole, parts.own, processes.world)
        if dry_run:
            console.line("dry run: nothing was trained")
            return []
        if checkpoints is not None:
            checkpoints.resume(runs)
        begin_alike(processes, runs)
        check_alike(processes, runs)
        trainer.train()
    served = obstacle is None
    results = [
        _finish(console, config, model, run, data, source, fingerprint, processes, served=served)
        for config, run, data in zip(configs, runs, datasets, strict=True)
    ]
    reports = [
        _report(result.summary, run, data, served=served)
        for config, run, data, result in zip(configs, runs, datasets, results, strict=True)
        if config.output.report and result.summary is not None
    ]
    processes.first(lambda: write_reports(reports, console.warn))
    for report in reports:
        console.line(f"report in {report.summary.directory / REPORT_FILE}")
    failures = [run.record.failure for run in runs if run.record.failure]
    if failures and not trainer.interrupted:
        saved = "the others are saved" if len(failures) < len(runs) else "nothing was saved"
        raise TrainingError(f"{'; '.join(failures)} ({saved})")
    return results


def _finish(
    console: Console,
    config: TrainConfig,
    model: PreTrainedModel,
    run: TrainingRun,
    data: Dataset,
    source: Path,
    fingerprint: str | None,
    processes: Processes,
    *,
    served: bool,
) -> TrainResult:
    """Save what a run has learned: all processes compute the probe, as a base in pieces needs all
    of them, and the first one writes."""
    record, adapter = run.record, run.adapter
    if record.failure:
        return TrainResult(model, adapter, record, None)
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
    summary = summarize(config, run, data.sha256, fingerprint)
    processes.first(lambda: _save(config, run, metadata, summary))
    if not processes.is_first:
        return TrainResult(model, adapter, record, config.output.directory)
    _conclude(console, config, run, served=served)
    return TrainResult(model, adapter, record, config.output.directory, summary)


def _report(summary: Summary, run: TrainingRun, data: Dataset, *, served: bool) -> Report:
    example, cut = segments(run.examples[0], data.tokenizer)
    curves = read_curves(summary.directory / LOG_FILE)
    return Report(summary, curves, example, cut, served)


def _save(
    config: TrainConfig, run: TrainingRun, metadata: dict[str, str], summary: Summary
) -> None:
    record, kept = run.record, run.kept
    metadata = metadata | {
        "producer": f"lorax-train {__version__}",
        "base_model": config.model,
        "seed": str(config.loop.seed),
        "steps": str(record.steps),
        "step": str(kept.step if kept else record.steps),  # of the weights in the file
        "train_loss": f"{record.train_loss:.6f}",
        "eval_loss": f"{kept.loss:.6f}" if kept else "none",
    }
    out, card = config.output, model_card(summary)
    export(run.adapter, out.directory, out.save_dtype, metadata, card, as_portable=out.portable)


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


def _conclude(console: Console, config: TrainConfig, run: TrainingRun, *, served: bool) -> None:
    record, kept = run.record, run.kept
    held_out = f", held-out {kept.loss:.4f}" if kept else ""
    done = "interrupted; saved what there is:" if record.interrupted else "done:"
    n_bytes = sum(path.stat().st_size for path in config.output.directory.glob("*.safetensors"))
    console.line(
        f"{done} {record.steps} steps in {record.seconds:.1f} s, "
        f"{record.tokens_per_second:.0f} tokens/s; loss {record.train_loss:.4f}{held_out}"
    )
    if kept and kept.step < record.steps:
        console.line(
            f"the adapter is that of step {kept.step}, whose held-out loss is the lowest "
            "(--no-keep-best saves the last)"
        )
    console.line(f"adapter in {config.output.directory} ({size(n_bytes)})")
    if served:
        show_serving(console, config.model, config.output.directory)


@contextmanager
def _naming(config: TrainConfig) -> Iterator[None]:
    """Say in an error whose it is, where several adapters are trained."""
    try:
        yield
    except TrainingError as error:
        if not config.name:
            raise
        raise TrainingError(f"{config.name}: {error}") from error


@contextmanager
def _out_of_memory_explained() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise out_of_memory() from error
