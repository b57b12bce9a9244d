"""What a finished run is, in words and figures: for the model card and the page."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lorax_serve._version import __version__
from lorax_serve.checkpoint.source import EMBEDDED_MODEL
from lorax_train.config import TrainConfig
from lorax_train.console import size
from lorax_train.loop.training_run import Evaluation, TrainingRun
from lorax_train.memory import peak_memory

__all__ = ["Summary", "hub_id", "summarize"]

_EMBEDDED_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"


@dataclass(frozen=True, slots=True)
class Summary:
    """One adapter's run.

    Attributes:
        name: of the adapter.
        directory: that it is saved in.
        base: the base model as it was given.
        base_id: its id on the Hub; None if it has none.
        data: what it was trained on.
        settings: every field of the config but for the output's, by ``part.field``.
        figures: what was measured.
        evaluations: the held-out losses by step.
        saved: which of them is of the weights that were saved; None if none is.
        command: that started the run; empty if none did.
    """

    name: str
    directory: Path
    base: str
    base_id: str | None
    data: Mapping[str, str]
    settings: Mapping[str, str]
    figures: Mapping[str, str]
    evaluations: tuple[Evaluation, ...]
    saved: Evaluation | None
    command: str


def summarize(
    config: TrainConfig, run: TrainingRun, sha256: str, fingerprint: str | None
) -> Summary:
    """Describe a run that is over.

    Args:
        config: that it was made of.
        run: with the weights that are saved.
        sha256: of the training file.
        fingerprint: of the base's weights, if it has one.
    """
    record, adapter, saved = run.record, run.adapter, run.kept
    directory = config.output.directory
    steps = f"{record.steps} of {run.total_steps}" if record.stopped_early else str(record.steps)
    ended = " (interrupted)" if record.interrupted else ""
    ended = " (the held-out loss no longer fell)" if record.stopped_early else ended
    peak = peak_memory(run.parameters[0].device)
    figures = {
        "rank, alpha": f"{adapter.config.r}, {adapter.config.lora_alpha:g}",
        "trained parameters": f"{adapter.n_parameters:,}",
        "steps": steps + ended,
        "tokens trained on": f"{record.tokens:,}",
        "tokens a second": f"{record.tokens_per_second:,.0f}",
        "seconds in steps": f"{record.seconds:,.1f}",
        "peak memory": "unknown" if peak is None else size(peak),
        "loss, latest steps": f"{record.train_loss:.4f}",
        "held-out loss before": f"{record.eval_losses[0]:.4f}" if record.eval_losses else "none",
        "held-out loss after": f"{saved.loss:.4f} (step {saved.step})" if saved else "none",
    }
    for prefix, values in (("latest", run.figures), ("held-out", run.eval_figures)):
        figures |= {f"{prefix} {k.replace('_', ' ')}": f"{v:.4f}" for k, v in values.items()}
    return Summary(
        name=directory.resolve().name,
        directory=directory,
        base=config.model,
        base_id=hub_id(config.model),
        data={
            "file": str(config.data.train),
            "SHA-256": sha256,
            "rows trained on": f"{len(run.examples):,}",
            "rows held out": f"{len(run.held_out):,}",
            "base weights' fingerprint": fingerprint or "none",
            "producer": f"lorax-train {__version__}",
        },
        settings=_settings(config),
        figures=figures,
        evaluations=tuple(record.evaluations),
        saved=saved,
        command=config.command,
    )


def hub_id(spec: str) -> str | None:
    """The id on the Hub of the model that ``--model`` names; None for files."""
    if spec == EMBEDDED_MODEL:
        return _EMBEDDED_HUB_ID
    if spec.endswith(".gguf") or Path(spec).exists() or spec.startswith(("/", ".", "~")):
        return None
    return spec.partition("@")[0]


def _settings(config: TrainConfig) -> dict[str, str]:
    names = ("model", "device", "dtype", "quantize")
    found = {name: str(getattr(config, name)) for name in names}
    for part in dataclasses.fields(config):
        value = getattr(config, part.name)
        if part.name != "output" and dataclasses.is_dataclass(value):
            for each in dataclasses.fields(value):
                found[f"{part.name}.{each.name}"] = str(getattr(value, each.name))
    return found
