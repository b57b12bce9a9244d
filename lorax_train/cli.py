"""``lorax-train``: the command line, which is ``TrainConfig`` in flags."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args

from lorax_serve._version import __version__
from lorax_serve.errors import LoraxError, TrainingError
from lorax_train import config as c

__all__ = ["main", "parse"]

_INTERRUPTED = 130

# Flags' values by "part.field" of TrainConfig; what the user gives wins over them.
_PRESETS: dict[str, dict[str, Any]] = {
    # The recipe of the Elixir library lorax: its alpha of 2 is twice r, as by default here.
    "elixir": {
        "lora.r": 1,
        "lora.targets": "qkv",
        "lora.init": "gaussian",
        "optimizer.name": "adam",
        "optimizer.lr": 3e-4,
        "optimizer.schedule": "constant",
        "optimizer.warmup_ratio": 0.0,
    }
}

_PARTS: dict[str, type[Any]] = {
    "data": c.DataConfig,
    "output": c.OutputConfig,
    "lora": c.InjectionConfig,
    "optimizer": c.OptimizerConfig,
    "loop": c.LoopConfig,
    "": c.TrainConfig,
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise TrainingError(message)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        0 when the adapter is saved, 2 after an error of use (one line on stderr), 130 after Ctrl-C,
        which saves what was learned.
    """
    try:
        config = parse(argv)
        _let_idle_threads_sleep()
        # Heavy imports only now, so that --help and a wrong flag answer at once.
        from transformers.utils import logging as hf_logging

        from lorax_train.run import train

        hide_bars: Callable[[], None] = hf_logging.disable_progress_bar
        hide_bars()
        result = train(config)
    except LoraxError as error:
        text = " ".join(str(error).split())
        print(f"lorax-train: error: {text}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("lorax-train: interrupted; nothing was saved", file=sys.stderr)
        return _INTERRUPTED
    return _INTERRUPTED if result.record.interrupted else 0


def _let_idle_threads_sleep() -> None:
    """Have OpenMP's threads sleep where they would spin; to be called before torch is imported.

    Where another process has one of two cores, spinning made a step of smollm2-135m take 6 to 12
    seconds instead of 0.6, because every operation waits for the thread that was descheduled.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def parse(argv: Sequence[str] | None = None) -> c.TrainConfig:
    """Turn arguments into a config; flags win over a preset, and that over the defaults.

    Raises:
        TrainingError: naming the flag.
    """
    given = vars(_parser().parse_args(argv))
    values = {**_PRESETS.get(given.pop("preset", ""), {}), **given}
    parts: dict[str, dict[str, Any]] = {part: {} for part in _PARTS}
    for key, value in values.items():
        part, _, name = key.rpartition(".")
        parts[part][name] = value
    top = parts.pop("")
    return c.TrainConfig(**{part: _PARTS[part](**parts[part]) for part in parts}, **top)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="lorax-train",
        description="Train a LoRA adapter on a frozen language model.",
        epilog="A row of FILE is a JSON object with text, with prompt and completion, or with "
        "messages (a list of objects with role and content).",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"lorax-train {__version__}")
    parser.add_argument(
        "--preset",
        choices=sorted(_PRESETS),
        help="elixir: the Elixir lorax's recipe (r 1, alpha 2, qkv, gaussian, Adam at 3e-4)",
    )
    add = _adder(parser)
    add("--model", "model", "smollm2-135m, a .gguf file, a directory or a Hub id", metavar="M")
    add("--data", "data.train", "rows to train on", type=Path, metavar="FILE", required=True)
    add("--out", "output.directory", "the adapter's directory", type=Path, required=True)
    add("--overwrite", "output.overwrite", "write into a directory of other files", switch=True)
    add("--save-dtype", "output.save_dtype", "of A and B in the file", of=c.SaveDtype)

    add = _adder(parser.add_argument_group("data"))
    add("--eval-data", "data.eval_file", "held-out rows", type=Path, metavar="FILE")
    add("--eval-split", "data.eval_split", "share of the rows to hold out instead", type=float)
    add("--max-length", "data.max_length", "most tokens in a row", type=int)

    add = _adder(parser.add_argument_group("LoRA"))
    add("--r", "lora.r", "rank", type=int)
    add("--alpha", "lora.alpha", "scale is alpha / r (default: 2 x r)", type=float)
    add("--dropout", "lora.dropout", "on the LoRA branch", type=float)
    add("--targets", "lora.targets", "all-linear, qkv, names with commas, or regex:...")
    add("--rslora", "lora.rslora", "scale by alpha / sqrt(r)", switch=True)
    add("--init", "lora.init", "of A", of=c.Init)

    training = parser.add_argument_group("training")
    add = _adder(training.add_mutually_exclusive_group())
    add("--epochs", "loop.epochs", "passes over the rows", type=int)
    add("--max-steps", "loop.max_steps", "optimizer steps, instead of --epochs", type=int)
    add = _adder(training)
    add("--batch-size", "loop.batch_size", "rows in a forward pass", type=int)
    add("--grad-accumulation", "loop.grad_accumulation", "forward passes in a step", type=int)
    add("--optimizer", "optimizer.name", "", of=c.Optimizer)
    add("--lr", "optimizer.lr", "highest learning rate", type=float)
    add("--weight-decay", "optimizer.weight_decay", "", type=float)
    add("--schedule", "optimizer.schedule", "of the learning rate", of=c.Schedule)
    add("--warmup-ratio", "optimizer.warmup_ratio", "share of steps of warm-up", type=float)
    add("--max-grad-norm", "optimizer.max_grad_norm", "clip to it; 0: never", type=float)
    add("--seed", "loop.seed", "", type=int)
    add("--device", "device", "", of=c.Device)
    add("--dtype", "dtype", "of the frozen base", of=c.DtypeName)
    add("--quantize", "quantize", "keep the base's linear layers in 4 or 8 bits", of=c.Quantize)
    add("--log-every", "loop.log_every", "steps between lines without a terminal", type=int)
    return parser


def _adder(group: Any) -> Callable[..., None]:
    """``group.add_argument``, with the default from the config's field in the help."""

    def add(flag: str, field: str, text: str, *, of: object = None, **options: Any) -> None:
        if options.pop("switch", False):
            options["action"] = "store_true"
        elif of is not None:
            options["choices"] = get_args(of)
        else:
            options.setdefault("metavar", field.rpartition(".")[2].upper())
        default = _default(field)
        shown = "" if default is None or default is False else f"(default: {default})"
        group.add_argument(flag, dest=field, help=f"{text} {shown}".strip(), **options)

    return add


def _default(field: str) -> object:
    part, _, name = field.rpartition(".")
    spec = next(spec for spec in dataclasses.fields(_PARTS[part]) if spec.name == name)
    return None if spec.default is dataclasses.MISSING else spec.default
