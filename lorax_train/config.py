"""What a training run is told, as frozen dataclasses. Every default of ``lorax-train`` is here.

Each class checks its own values, so that a config that exists is one that can be run. The messages
name the command line's flags.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from lorax_serve.checkpoint.source import EMBEDDED_MODEL
from lorax_serve.errors import TrainingError

__all__ = [
    "DataConfig",
    "Device",
    "DtypeName",
    "InjectionConfig",
    "LoopConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "OutputConfig",
    "Quantize",
    "TextMode",
    "TrainConfig",
    "check_together",
    "parse_layers",
]

Init = Literal["kaiming", "gaussian", "pissa"]
ObjectiveName = Literal["sft", "dpo"]
Optimizer = Literal["adamw", "adam"]
Schedule = Literal["cosine", "linear", "constant"]
Device = Literal["auto", "cpu", "cuda"]
DtypeName = Literal["auto", "bfloat16", "float32"]
Quantize = Literal["none", "nf4", "int8"]
SaveDtype = Literal["float32", "bfloat16"]
TextMode = Literal["lines", "file", "windows"]

# Of a text that is read in windows, unless it is said otherwise: the ancestor's split.
_WINDOWS_HELD_OUT = 0.1


@dataclass(frozen=True, slots=True)
class InjectionConfig:
    """The LoRA layers: how many, of what size, and how they start."""

    r: int = 16
    """Rank of the update: A is ``[r, in]`` and B is ``[out, r]``."""
    alpha: float | None = None
    """The update is scaled by ``alpha / r``; None means ``2 * r``."""
    dropout: float = 0.0
    """Probability of zeroing an element of the LoRA branch's input, in training only."""
    targets: str = "all-linear"
    """``all-linear``, ``qkv``, ``regex:`` and an expression, or a comma list of module names, of
    which ``query``, ``key`` and ``value`` stand for what the model calls these."""
    layers: tuple[int, ...] = ()
    """Numbers of the layers that get LoRA; empty: all of them."""
    rslora: bool = False
    """Scale by ``alpha / sqrt(r)`` instead (arXiv:2312.03732)."""
    dora: bool = False
    """Train the lengths of the weight's rows apart from their directions (arXiv:2402.09353)."""
    init: Init = "kaiming"
    """How A starts (``inject.init_a``), with B at zero; ``pissa``: both at the principal part of
    the weight (arXiv:2404.02948)."""

    def __post_init__(self) -> None:
        _at_least("--r", self.r, 1)
        if self.alpha is not None:
            _finite("--alpha", self.alpha, above=0.0)
        _finite("--dropout", self.dropout, at_least=0.0, below=1.0)
        for layer in self.layers:
            _at_least("--layers", layer, 0)
        _one_of("--init", self.init, get_args(Init))

    @property
    def lora_alpha(self) -> float:
        """Alpha as it is applied and written."""
        alpha = 2 * self.r if self.alpha is None else self.alpha
        return int(alpha) if float(alpha).is_integer() else alpha


@dataclass(frozen=True, slots=True)
class DataConfig:
    """Where the rows are, and how much of them is used."""

    train: Path
    """A .jsonl, .parquet or .txt file, or a directory of them. Rows have ``text``, ``prompt`` and
    ``completion``, or ``messages``, with or without ``tools``; for DPO ``prompt``, ``chosen`` and
    ``rejected``."""
    eval_file: Path | None = None
    """Held-out rows in a file or directory of their own."""
    eval_split: float | None = None
    """Share of the training rows to hold out instead, chosen by the seed; of windows, the end of
    the text. None: 0, but 0.1 for windows."""
    max_length: int = 512
    """Most tokens in a row."""
    text_mode: TextMode = "lines"
    """What a row of .txt files is: a line, a file, or a window of tokens of all of them in a row,
    at a random place."""
    window: int = 256
    """Tokens in a window."""
    cache: Path | None = None
    """A directory in which the tokens are kept for the next run; None: a temporary one."""

    def __post_init__(self) -> None:
        _at_least("--max-length", self.max_length, 2)
        _at_least("--window", self.window, 2)
        _one_of("--text-mode", self.text_mode, get_args(TextMode))
        if self.eval_split is not None:
            _finite("--eval-split", self.eval_split, at_least=0.0, below=1.0)
        if self.eval_file is not None and self.eval_split:
            raise TrainingError("--eval-data and --eval-split exclude each other; give one of them")

    def held_out_share(self, *, windows: bool) -> float:
        """The share of the training data that is held out."""
        if self.eval_file is not None:
            return 0.0
        default = _WINDOWS_HELD_OUT if windows else 0.0
        return default if self.eval_split is None else self.eval_split


@dataclass(frozen=True, slots=True)
class ObjectiveConfig:
    """What is made small."""

    name: ObjectiveName = "sft"
    """``sft``: the loss of the tokens to learn; ``dpo``: direct preference optimization
    (arXiv:2305.18290) on rows with ``prompt``, ``chosen`` and ``rejected``."""
    beta: float = 0.1
    """DPO's: the greater, the closer the adapter stays to the base model."""
    loss: str | None = None
    """``module:function`` or ``file.py:function`` of ``loss.LossFunction``'s form, instead of the
    cross-entropy."""

    def __post_init__(self) -> None:
        _one_of("--objective", self.name, get_args(ObjectiveName))
        _finite("--beta", self.beta, above=0.0)
        if self.name == "dpo" and self.loss is not None:
            raise TrainingError(
                "--loss and --objective dpo exclude each other: DPO is made of log-probabilities; "
                "give one of them"
            )


@dataclass(frozen=True, slots=True)
class OptimizerConfig:
    """The optimizer and the learning rate over time."""

    name: Optimizer = "adamw"
    lr: float = 2e-4
    """The highest learning rate, reached after the warm-up."""
    weight_decay: float = 0.0
    """Decoupled for adamw; for adam it is added to the gradient."""
    schedule: Schedule = "cosine"
    """From ``lr`` down to 0 along half a cosine or a line, or unchanged."""
    warmup_ratio: float = 0.03
    """Share of all steps in which the learning rate rises linearly."""
    max_grad_norm: float = 1.0
    """Gradients of a greater norm are scaled down to it; 0 leaves them alone."""
    loraplus_ratio: float = 1.0
    """How many times A's learning rate B has (LoRA+, arXiv:2402.12354)."""

    def __post_init__(self) -> None:
        _one_of("--optimizer", self.name, get_args(Optimizer))
        _one_of("--schedule", self.schedule, get_args(Schedule))
        _finite("--lr", self.lr, above=0.0)
        _finite("--weight-decay", self.weight_decay, at_least=0.0)
        _finite("--warmup-ratio", self.warmup_ratio, at_least=0.0, below=1.0)
        _finite("--max-grad-norm", self.max_grad_norm, at_least=0.0)
        _finite("--loraplus-ratio", self.loraplus_ratio, above=0.0)


@dataclass(frozen=True, slots=True)
class LoopConfig:
    """How long, in what batches, and from which seed."""

    epochs: int = 3
    """Passes over the data."""
    max_steps: int | None = None
    """Optimizer steps; given, it decides instead of ``epochs``."""
    batch_size: int = 8
    """Rows in one forward pass."""
    grad_accumulation: int = 1
    """Forward passes in one optimizer step."""
    seed: int = 0
    """Of A's start, the dropout, the split and the order of the rows."""
    log_every: int = 10
    """Steps between two lines of progress where the output is no terminal."""
    eval_every: int | None = None
    """Steps between two evaluations on held-out rows; None: after each epoch."""
    patience: int | None = None
    """Stop after so many evaluations without a lower held-out loss; None: never."""
    keep_best: bool = True
    """Save the weights of the lowest held-out loss, if there are held-out rows, not the last."""
    save_every: int | None = None
    """Steps between two checkpoints, from which ``--resume`` goes on; None: none are written."""
    checkpointing: bool = False
    """Compute each layer again for the gradient: less memory, a third more time."""

    def __post_init__(self) -> None:
        for flag, value in (
            ("--epochs", self.epochs),
            ("--batch-size", self.batch_size),
            ("--grad-accumulation", self.grad_accumulation),
            ("--log-every", self.log_every),
        ):
            _at_least(flag, value, 1)
        for flag, optional in (
            ("--max-steps", self.max_steps),
            ("--eval-every", self.eval_every),
            ("--patience", self.patience),
            ("--save-every", self.save_every),
        ):
            if optional is not None:
                _at_least(flag, optional, 1)
        _at_least("--seed", self.seed, 0)
        if self.seed >= 1 << 63:
            raise TrainingError(f"--seed must be below 2**63, not {self.seed}")


@dataclass(frozen=True, slots=True)
class OutputConfig:
    """Where the adapter goes."""

    directory: Path
    """The adapter's directory; its last name is the adapter's name."""
    overwrite: bool = False
    """Whether a directory that holds something else than an adapter may be written into."""
    save_dtype: SaveDtype = "float32"
    """Of A and B in the file."""
    portable: bool = False
    """Whether the scale is folded into B, for loaders that read little of the config."""
    resume: Path | bool = False
    """Go on from the newest whole checkpoint in the directory, if there is one; or from this one,
    or the newest in this directory."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints are kept."""
    tensorboard: Path | None = None
    """A directory for TensorBoard's files; None: none are written."""
    report: bool = True
    """Whether ``loss.png`` and ``report.html`` are put beside the adapter."""

    def __post_init__(self) -> None:
        _at_least("--keep-checkpoints", self.keep_checkpoints, 1)
        _one_of("--save-dtype", self.save_dtype, get_args(SaveDtype))


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """Everything that a training run is told."""

    data: DataConfig
    output: OutputConfig
    model: str = EMBEDDED_MODEL
    """Anything that ``lorax_serve.checkpoint.source.resolve_model`` takes."""
    device: Device = "auto"
    """``auto`` is cuda where there is one."""
    dtype: DtypeName = "auto"
    """Of the frozen base; ``auto`` is bfloat16 where the hardware multiplies it."""
    quantize: Quantize = "none"
    """How the base's linear layers are kept in training (QLoRA, arXiv:2305.14314)."""
    compile: bool = False
    """Whether norms and gated MLPs are computed by what torch.compile makes of them."""
    fsdp: bool = False
    """Keep the base's decoder layers in pieces, one in each of several processes."""
    lora: InjectionConfig = field(default_factory=InjectionConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    name: str = ""
    """What messages call the adapter, where several are trained at once."""
    command: str = field(default="", compare=False)
    """The command line that this comes from, for the records; empty if from none."""

    def __post_init__(self) -> None:
        _one_of("--device", self.device, get_args(Device))
        _one_of("--dtype", self.dtype, get_args(DtypeName))
        _one_of("--quantize", self.quantize, get_args(Quantize))
        if self.fsdp and self.quantize != "none":
            raise TrainingError(
                "--fsdp and --quantize exclude each other: a quantised base stays whole in each "
                "process; give one of them"
            )
        windows = self.data.text_mode == "windows"
        if self.data.eval_file is None and not self.data.held_out_share(windows=windows):
            self.check_evaluation("")
        if self.output.portable and self.lora.dora:
            raise TrainingError("--portable and --dora exclude each other: plain loaders have none")

    def check_evaluation(self, why: str) -> None:
        """Make sure that nothing is asked for that needs held-out rows, where there are none.

        Args:
            why: there are none, for the message; empty: none were asked for.

        Raises:
            TrainingError: naming the flag that needs them.
        """
        for flag, value in (
            ("--eval-every", self.loop.eval_every),
            ("--patience", self.loop.patience),
        ):
            if value is not None:
                reason = f", but {why}" if why else ""
                raise TrainingError(
                    f"{flag} needs rows to evaluate on{reason}; give --eval-split or --eval-data"
                )


def parse_layers(text: str) -> tuple[int, ...]:
    """Layer numbers from ``0,3-5``, each once, in order.

    Raises:
        TrainingError: when it is something else.
    """
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first:
            raise TrainingError(
                f"--layers {text!r}: expected numbers and ranges with commas between them, such as "
                "0,3-5"
            )
        found.update(range(first, last + 1))
    return tuple(sorted(found))


def check_together(configs: Sequence[TrainConfig]) -> None:
    """Make sure that these adapters can be trained at once.

    Raises:
        TrainingError: naming what they must share, or must not.
    """
    first = configs[0]
    names: set[str] = set()
    directories: dict[Path, str] = {}
    for config in configs:
        for field_name in ("model", "device", "dtype", "quantize", "compile", "fsdp"):
            if getattr(config, field_name) != getattr(first, field_name):
                raise TrainingError(
                    f"{config.name}: {field_name} must be the same for all adapters that are "
                    "trained at once"
                )
        if _objective(config) != _objective(first):  # one pass computes all of them
            raise TrainingError(
                "adapters that are trained at once need one objective: "
                f"{first.name} has {_objective(first)}, {config.name} has {_objective(config)}; "
                "train them one after another"
            )
        if config.name in names:
            raise TrainingError(f"two adapters are named {config.name!r}; rename one")
        names.add(config.name)
        directory = config.output.directory.resolve()
        if directory in directories:
            raise TrainingError(
                f"{config.name}: --out {config.output.directory} is that of "
                f"{directories[directory]} too; choose another"
            )
        directories[directory] = config.name


def _objective(config: TrainConfig) -> str:
    loss = config.objective.loss
    return f"--objective {config.objective.name}" + (f" --loss {loss}" if loss else "")


def _at_least(flag: str, value: int, least: int) -> None:
    if value < least:
        raise TrainingError(f"{flag} must be at least {least}, not {value}")


def _one_of(flag: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise TrainingError(f"{flag} must be one of {', '.join(choices)}, not {value!r}")


def _finite(
    flag: str,
    value: float,
    *,
    at_least: float = -math.inf,
    above: float = -math.inf,
    below: float = math.inf,
) -> None:
    if math.isfinite(value) and at_least <= value and above < value < below:
        return
    bounds = [f"at least {at_least:g}"] if math.isfinite(at_least) else []
    bounds += [f"above {above:g}"] if math.isfinite(above) else []
    bounds += [f"below {below:g}"] if math.isfinite(below) else []
    raise TrainingError(f"{flag} must be a number {' and '.join(bounds)}, not {value}")
