"""``lorax-train``: the command line, which is ``TrainConfig`` in flags."""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, get_args

from lorax_serve._version import __version__
from lorax_serve.errors import LoraxError, TrainingError
from lorax_train import config as c
from lorax_train.commands import COMMANDS, run_command
from lorax_train.config_file import ADAPTERS, ConfigFile, dump, read_config
from lorax_train.interrupts import terminations_interrupt
from lorax_train.threads import let_idle_threads_sleep

__all__ = ["Command", "main", "parse", "read_command"]

_FAILED = 2
_INTERRUPTED = 130

# Flags' values by "part.field" of TrainConfig; what the user gives wins over them.
_PRESETS: dict[str, dict[str, Any]] = {
    # The guide of the Elixir library lorax: its alpha of 4 is twice r, as by default here.
    "elixir": {
        "data.text_mode": "windows",
        "data.window": 256,
        "lora.r": 2,
        "lora.dropout": 0.05,
        "lora.targets": "qkv",
        "lora.init": "gaussian",
        "optimizer.name": "adam",
        "optimizer.lr": 3e-4,
        "optimizer.schedule": "constant",
        "optimizer.warmup_ratio": 0.0,
        "optimizer.max_grad_norm": 0.0,
        "loop.batch_size": 2,
        "loop.max_steps": 300,
        "loop.seed": 1337,
    }
}
# Of two such fields, the one that is given nearer to the command line puts the other aside.
_INSTEAD = (("loop.epochs", "loop.max_steps"), ("data.eval_file", "data.eval_split"))
_REQUIRED = {"data.train": "--data", "output.directory": "--out"}

_PARTS: dict[str, type[Any]] = {
    "data": c.DataConfig,
    "output": c.OutputConfig,
    "lora": c.InjectionConfig,
    "optimizer": c.OptimizerConfig,
    "loop": c.LoopConfig,
    "objective": c.ObjectiveConfig,
    "": c.TrainConfig,
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise TrainingError(message)


@dataclass(frozen=True)
class Command:
    """What the command line asks for.

    Attributes:
        configs: of each adapter; all of them are trained at once.
        dry_run: whether to do everything but the training.
        print_config: whether to print the configs and do nothing.
    """

    configs: list[c.TrainConfig]
    dry_run: bool = False
    print_config: bool = False


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        0 when the adapters are saved, 2 after an error of use (one line on stderr, of all
        processes), 130 after Ctrl-C or SIGTERM, which save what was learned. Of a subcommand, what
        ``run_command`` returns.
    """
    given = sys.argv[1:] if argv is None else argv
    # Of several processes on a machine, one speaks: all of them are told the same.
    speaks = os.environ.get("LOCAL_RANK", "0") == "0"
    if given and given[0] in COMMANDS:
        let_idle_threads_sleep()
        return run_command(given)
    try:
        command = read_command(argv)
        if command.print_config:
            if not speaks:
                return 0
            print(dump([_flags_of(config) for config in command.configs]), end="")
            return 0
        let_idle_threads_sleep()
        # Heavy imports only now, so that --help and a wrong flag answer at once.
        from transformers.utils import logging as hf_logging

        from lorax_train.distributed import OtherProcessFailed, join_processes
        from lorax_train.run import train_all

        hide_bars: Callable[[], None] = hf_logging.disable_progress_bar
        hide_bars()
        try:
            with terminations_interrupt(), join_processes() as processes:
                speaks = True  # from here on, whoever fails first
                if not processes.is_first:
                    silence: Callable[[], None] = hf_logging.set_verbosity_error
                    silence()
                    warnings.simplefilter("ignore")
                results = train_all(command.configs, dry_run=command.dry_run, processes=processes)
        except OtherProcessFailed:
            return _FAILED
    except LoraxError as error:
        text = " ".join(str(error).split())
        if speaks:
            print(f"lorax-train: error: {text}", file=sys.stderr)
        return _FAILED
    except KeyboardInterrupt:
        print("lorax-train: interrupted; nothing was saved", file=sys.stderr)
        return _INTERRUPTED
    return _INTERRUPTED if any(result.record.interrupted for result in results) else 0


def parse(argv: Sequence[str] | None = None) -> c.TrainConfig:
    """``read_command`` of one adapter."""
    return read_command(argv).configs[0]


def read_command(argv: Sequence[str] | None = None) -> Command:
    """Turn arguments, and the file that ``--config`` names, into configs.

    Flags win over an adapter's entry in the file, that over the rest of the file, that over a
    preset, and that over the defaults.

    Raises:
        TrainingError: naming the flag, or the file and its key.
    """
    parser = _parser()
    arguments = sys.argv[1:] if argv is None else argv
    flags = vars(parser.parse_args(arguments))
    flags["command"] = shlex.join(["lorax-train", *arguments])
    asked = {key: flags.pop(key, False) for key in ("dry_run", "print_config")}
    path = flags.pop("config", None)
    file = ConfigFile({}) if path is None else read_config(path, _in_files(parser))
    preset = flags.pop("preset", file.values.pop("preset", ""))
    below = _over(_PRESETS.get(preset, {}), file.values)
    if file.entries is None:
        return Command([_config(_over(below, flags))], **asked)
    configs = []
    for index, entry in enumerate(file.entries):
        out: Path = entry.get("output.directory", Path())
        name: str = entry.get("name", out.name)
        try:
            configs.append(_config(_of_sweep(name, below, entry, flags)))
        except TrainingError as error:
            label = f" ({name})" if name else ""
            raise TrainingError(f"--config {path}: {ADAPTERS}[{index}]{label}: {error}") from error
    try:
        c.check_together(configs)
    except TrainingError as error:
        raise TrainingError(f"--config {path}: {ADAPTERS}: {error}") from error
    return Command(configs, **asked)


def _of_sweep(
    name: str, below: Mapping[str, Any], entry: Mapping[str, Any], flags: Mapping[str, Any]
) -> dict[str, Any]:
    """An entry's values. A directory that is given for all of them is where each has its own."""
    if not name:
        raise TrainingError("give it a name, or out")
    values = _over(_over(below, entry), {"name": name} | dict(flags))
    common = flags.get("output.directory")
    if common is None and "output.directory" not in entry:
        common = below.get("output.directory")
    if common is not None:
        if Path(name).name != name:
            raise TrainingError("its name cannot be that of a directory; rename it, or give out")
        values["output.directory"] = common / name
    return values


def _over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """The values of both; those ``above`` win."""
    aside = {
        field
        for pair in _INSTEAD
        for field, other in (pair, pair[::-1])
        if other in above and field not in above
    }
    return {**{key: value for key, value in below.items() if key not in aside}, **above}


def _config(values: Mapping[str, Any]) -> c.TrainConfig:
    if missing := [flag for field, flag in _REQUIRED.items() if field not in values]:
        raise TrainingError(f"the following arguments are required: {', '.join(missing)}")
    if "loop.epochs" in values and "loop.max_steps" in values:
        raise TrainingError("--epochs and --max-steps exclude each other; give one of them")
    parts: dict[str, dict[str, Any]] = {part: {} for part in _PARTS}
    for key, value in values.items():
        part, _, name = key.rpartition(".")
        parts[part][name] = value
    top = parts.pop("")
    return c.TrainConfig(**{part: _PARTS[part](**parts[part]) for part in parts}, **top)


def _in_files(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """The flags that may be in a file: those of a config's fields, and the preset; not what is said
    of one start alone."""
    fields = {spec.name for spec in dataclasses.fields(c.TrainConfig)} | {"preset"}
    return [
        action
        for action in parser._actions
        if (action.dest in fields or "." in action.dest) and action.dest != "output.resume"
    ]


def _flags_of(config: c.TrainConfig) -> dict[str, Any]:
    """A config's values, but for those that are not given, by their names in a file."""
    out: dict[str, Any] = {}
    for action in _in_files(_parser()):
        if action.dest == "preset":
            continue
        part, _, field = action.dest.rpartition(".")
        value = getattr(getattr(config, part) if part else config, field)
        instead = config.loop.max_steps is not None and action.dest == "loop.epochs"
        if value not in (None, "", ()) and not instead:
            out[action.option_strings[0].removeprefix("--").replace("-", "_")] = value
    return out


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="lorax-train",
        description="Train a LoRA adapter on a frozen language model. Beside training: "
        f"lorax-train {{{','.join(COMMANDS)}}} --help.",
        epilog="A row has text, prompt and completion, or messages (a list of objects with role "
        "and content) with or without tools; for --objective dpo it has prompt, chosen and "
        "rejected. PATH is a .jsonl, .parquet or .txt file, or a directory of them.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"lorax-train {__version__}")
    parser.add_argument(
        "--preset",
        choices=sorted(_PRESETS),
        help="elixir: the guide of the Elixir lorax (r 2, alpha 4, qkv, gaussian, Adam at 3e-4, "
        "300 steps of 2 random windows of 256 tokens)",
    )
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="flags in YAML (lr: 2e-4); flags win"
    )
    parser.add_argument(
        "--print-config", action="store_true", help="print what results, as YAML, and exit"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="do everything but the training, and exit"
    )
    add = _adder(parser)
    add("--model", "model", "smollm2-135m, a .gguf file, a directory or a Hub id", metavar="M")
    add("--data", "data.train", "rows to train on", type=Path, metavar="PATH")
    add("--out", "output.directory", "the adapter's directory", type=Path)
    add("--name", "name", "what messages call the adapter")
    add("--overwrite", "output.overwrite", "write into a directory of other files", switch=True)
    add("--save-dtype", "output.save_dtype", "of A and B in the file", of=c.SaveDtype)
    add("--portable", "output.portable", "fold the scale into B, for llama.cpp, vLLM", switch=True)
    add("--save-every", "loop.save_every", "steps between two checkpoints", type=int)
    add("--keep-checkpoints", "output.keep_checkpoints", "how many of the newest", type=int)
    add(
        "--resume",
        "output.resume",
        "go on from the newest checkpoint, if there is one; or from this one",
        type=Path,
        nargs="?",
        const=True,
        metavar="DIR",
    )
    add(
        "--report",
        "output.report",
        "loss.png and report.html beside the adapter",
        action=argparse.BooleanOptionalAction,
    )
    add("--tensorboard", "output.tensorboard", "write its files here", type=Path, metavar="DIR")

    add = _adder(parser.add_argument_group("data"))
    add("--eval-data", "data.eval_file", "held-out rows", type=Path, metavar="PATH")
    add(
        "--eval-split",
        "data.eval_split",
        "share of the rows to hold out instead (default: 0; 0.1 of windows)",
        type=float,
    )
    add("--max-length", "data.max_length", "most tokens in a row", type=int)
    add("--text-mode", "data.text_mode", "what a row of .txt files is", of=c.TextMode)
    add("--window", "data.window", "tokens in a window", type=int)
    add("--cache", "data.cache", "where tokens are kept for the next run", type=Path, metavar="DIR")

    add = _adder(parser.add_argument_group("LoRA"))
    add("--r", "lora.r", "rank", type=int)
    add("--alpha", "lora.alpha", "scale is alpha / r (default: 2 x r)", type=float)
    add("--dropout", "lora.dropout", "on the LoRA branch", type=float)
    add("--targets", "lora.targets", "all-linear, qkv, names with commas, or regex:...")
    add("--layers", "lora.layers", "only these, such as 0,3-5", type=c.parse_layers)
    add("--rslora", "lora.rslora", "scale by alpha / sqrt(r)", switch=True)
    add("--dora", "lora.dora", "train the lengths of the weight's rows apart", switch=True)
    add("--init", "lora.init", "of A; pissa: of A and B, from the weight", of=c.Init)

    add = _adder(parser.add_argument_group("objective"))
    add("--objective", "objective.name", "sft: next tokens; dpo: preferences", of=c.ObjectiveName)
    add("--beta", "objective.beta", "dpo: how close to stay to the base model", type=float)
    add(
        "--loss",
        "objective.loss",
        "of each token instead of the cross-entropy: module:function or file.py:function",
        metavar="WHERE",
    )

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
    add("--loraplus-ratio", "optimizer.loraplus_ratio", "B's rate over A's (LoRA+)", type=float)
    add("--eval-every", "loop.eval_every", "steps; default: each epoch", type=int)
    add("--patience", "loop.patience", "stop after so many evaluations without gain", type=int)
    add(
        "--keep-best",
        "loop.keep_best",
        "save the weights of the lowest held-out loss",
        action=argparse.BooleanOptionalAction,
    )
    add("--checkpointing", "loop.checkpointing", "less memory, a third more time", switch=True)
    add("--seed", "loop.seed", "", type=int)
    add("--device", "device", "", of=c.Device)
    add("--dtype", "dtype", "of the frozen base", of=c.DtypeName)
    add("--quantize", "quantize", "keep the base's linear layers in 4 or 8 bits", of=c.Quantize)
    add(
        "--compile",
        "compile",
        "norms and gated MLPs through torch.compile: a few seconds more at the start",
        switch=True,
    )
    add("--fsdp", "fsdp", "keep a part of the base in each process of torchrun", switch=True)
    add("--log-every", "loop.log_every", "steps between lines without a terminal", type=int)
    return parser


def _adder(group: Any) -> Callable[..., None]:
    """``group.add_argument``, with the default from the config's field in the help."""

    def add(flag: str, field: str, text: str, *, of: object = None, **options: Any) -> None:
        if "switch" in options:
            del options["switch"]
            options["action"] = "store_true"
        elif of is not None:
            options["choices"] = get_args(of)
        elif "action" not in options:
            options.setdefault("metavar", field.rpartition(".")[2].upper())
        default = _default(field)
        plain = default is None or isinstance(default, bool) or default == ()
        shown = "" if plain else f"(default: {default})"
        group.add_argument(flag, dest=field, help=f"{text} {shown}".strip(), **options)

    return add


def _default(field: str) -> object:
    part, _, name = field.rpartition(".")
    spec = next(spec for spec in dataclasses.fields(_PARTS[part]) if spec.name == name)
    return None if spec.default is dataclasses.MISSING else spec.default
