"""What is shown before the first step and after the last."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import torch

from lorax_serve.adapter.probe import Probe
from lorax_train.config import TrainConfig
from lorax_train.console import Console, size
from lorax_train.data.batches import count_targets, lengths
from lorax_train.data.encode import Example
from lorax_train.data.tokenizer import Tokenizer
from lorax_train.loop.estimate import MemoryEstimate
from lorax_train.loop.training_run import TrainingRun

__all__ = [
    "mark",
    "segments",
    "serving_commands",
    "show_example",
    "show_memory",
    "show_plan",
    "show_probe",
    "show_serving",
    "show_sharded",
]

_SHOWN_TOKENS = 200


def show_plan(
    console: Console,
    config: TrainConfig,
    run: TrainingRun,
    base_parameters: int,
    dtype: torch.dtype,
) -> None:
    """What is trained, on what, and for how long."""
    adapter = run.adapter
    n = adapter.n_parameters
    total = n + base_parameters
    file_bytes = n * (4 if config.output.save_dtype == "float32" else 2)
    lora, loop = adapter.config, config.loop
    tokens = int(lengths(run.examples).sum())
    targets = count_targets(run.examples)
    rows = f"{len(run.examples)} to train on"
    rows += f", {len(run.held_out)} held out" if run.held_out else ""
    device = run.parameters[0].device.type
    named = f"{config.name}: " if config.name else ""
    scale = adapter.config.scale_for(next(iter(adapter.layers)))
    stored = "" if config.quantize == "none" else f"linear layers in {config.quantize}, "
    dtype_name = str(dtype).removeprefix("torch.")
    console.line(f"model      {config.model} ({stored}{dtype_name} on {device})")
    console.line(
        f"adapter    {named}rank {lora.r}, alpha {lora.lora_alpha:g}, scale {scale:g}, on "
        f"{len(adapter.layers)} modules: {', '.join(_shorten(lora.target_modules))}"
    )
    console.line(f"parameters {n:,} trainable of {total:,} ({n / total:.2%}), {size(file_bytes)}")
    console.line(f"rows       {rows}; {tokens:,} tokens, {targets:,} of them learned")
    console.line(
        f"steps      {run.total_steps} of {loop.batch_size * loop.grad_accumulation} rows "
        f"({run.steps_per_epoch} an epoch)"
    )


def show_example(console: Console, example: Example, tokenizer: Tokenizer) -> None:
    """One row as the model sees it."""
    legend = "dim" if console.is_terminal else "in ⟦⟧"
    console.line(f"example    {example.where}; what is {legend} is read, the rest is learned:")
    console.line(mark(console, example, tokenizer))


def mark(console: Console, example: Example, tokenizer: Tokenizer) -> str:
    """The decoded row, with what is not learned set apart; a long one is cut short."""
    parts, left = segments(example, tokenizer)
    marked = [text if trained else console.quiet(text) for text, trained in parts]
    return "".join(marked) + (f" … ({left} more tokens)" if left else "")


def segments(example: Example, tokenizer: Tokenizer) -> tuple[list[tuple[str, bool]], int]:
    """The decoded row in pieces, each with whether it is learned, and how many tokens are cut."""
    shown = list(zip(example.tokens, example.trained, strict=True))[:_SHOWN_TOKENS]
    parts = [
        (tokenizer.decode([token for token, _ in group]), trained)
        for trained, group in groupby(shown, key=lambda pair: pair[1])
    ]
    return parts, len(example.tokens) - len(shown)


def show_memory(
    console: Console, need: MemoryEstimate, available: int | None, device: str = "cpu"
) -> None:
    """The memory estimate; a warning with what to change if there is not enough.

    On a GPU, an allocation fails, and the trainer goes on with smaller batches. On a CPU, the
    system kills the process instead, so this is the only warning that there can be.
    """
    end = ", and the system may kill it without a word" if device == "cpu" else ""
    console.line(
        f"memory     about {size(need.total)}: weights {size(need.weights)} (loaded), adapter and "
        f"gradients {size(need.adapter)}, optimizer {size(need.optimizer)}, activations "
        f"{size(need.activations)} and logits {size(need.logits)} of the largest batch"
    )
    free = "an unknown amount" if available is None else size(available)
    console.line(
        "           (if the longest rows share a batch; torch takes a few hundred MB on top); "
        f"{size(need.to_come)} to come, {free} available"
    )
    if available is not None and need.to_come > available:
        console.warn(
            f"the run is likely to need {size(need.to_come - available)} more memory than there "
            f"is{end}; lower --batch-size (and raise --grad-accumulation by as much, for the same "
            "result), or lower --max-length"
        )


def show_sharded(console: Console, whole: int, own: int, processes: int) -> None:
    """How much of the base each process has, in bytes."""
    console.line(
        f"sharded    the {size(whole)} of the base's layers over {processes} processes, "
        f"{size(own)} in this one; the rest of the base is whole in each"
    )


def show_probe(console: Console, probe: Probe) -> None:
    """What is stored for the server's check; a warning if the check will not see much."""
    console.line(
        f"probe      {len(probe.token_ids)} tokens, stored for the server's check; the adapter "
        f"moves the logits after them by up to {probe.effect:.3g}"
    )
    if probe.effect <= probe.tolerance("bfloat16"):
        console.warn(
            "the adapter hardly differs from the base model, so a server in bfloat16 could not see "
            "a wrong scale; train longer, or with a higher --lr"
        )


def show_serving(console: Console, model: str, directory: Path) -> None:
    """The commands that serve and try the adapter."""
    console.line("serve it with:")
    for command in serving_commands(model, directory):
        console.line(f"  {command}")


def serving_commands(model: str, directory: Path) -> list[str]:
    """What to type to serve the adapter, and to ask it."""
    out = directory.resolve()
    parent, name = shlex.quote(str(out.parent)), shlex.quote(out.name)
    return [
        f"lorax-serve --model {shlex.quote(model)} --adapters {parent}",
        f'lorax generate --adapter {name} "PROMPT"',
    ]


def _shorten(names: Sequence[str], shown: int = 8) -> list[str]:
    more = [f"{len(names) - shown} more"] if len(names) > shown else []
    return [*names[:shown], *more]
