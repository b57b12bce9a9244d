"""One adapter's training: its rows in their order, its optimizer, and what has happened so far."""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch.nn.utils import clip_grad_norm_

from lorax_serve.errors import TrainingError
from lorax_train.config import LoopConfig, OptimizerConfig
from lorax_train.data.batches import by_length, plan_epoch
from lorax_train.data.encode import Example
from lorax_train.data.windows import RandomWindows
from lorax_train.model.inject import TrainableLoRA

__all__ = ["Evaluation", "TrainingRecord", "TrainingRun", "lr_factor"]

_RECENT_STEPS = 20


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The held-out loss after a number of steps, in nats a target."""

    step: int
    loss: float


@dataclass
class TrainingRecord:
    """What has happened so far."""

    steps: int = 0
    tokens: int = 0
    """Trained on, without padding."""
    seconds: float = 0.0
    """In training steps; evaluation is not counted. Adapters trained together share them."""
    evaluations: list[Evaluation] = field(default_factory=list)
    """Before training, after each epoch or as often as was asked for, and at the end."""
    stopped_early: bool = False
    interrupted: bool = False
    failure: str = ""
    """Why it was given up, if it was: nothing of it is saved."""
    recent: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=_RECENT_STEPS))
    """Summed loss and number of targets of the latest steps."""

    @property
    def eval_losses(self) -> list[float]:
        """The held-out losses, in nats a target."""
        return [each.loss for each in self.evaluations]

    @property
    def train_loss(self) -> float:
        """Mean loss of the targets of the latest 20 steps, in nats."""
        return sum(loss for loss, _ in self.recent) / max(1, sum(n for _, n in self.recent))

    @property
    def step_loss(self) -> float:
        """Mean loss of the latest step's targets."""
        loss, n = self.recent[-1]
        return loss / n

    @property
    def tokens_per_second(self) -> float:
        """Non-padding tokens a second."""
        return self.tokens / self.seconds if self.seconds else 0.0


class TrainingRun:
    """Knows nothing of the model: the trainer computes the gradients.

    Args:
        adapter: what is trained.
        examples: rows to train on.
        held_out: rows to evaluate on.
        optimizer: and its learning rate over time.
        loop: how long, in what batches.
        name: what messages call it.
    """

    def __init__(
        self,
        adapter: TrainableLoRA,
        examples: Sequence[Example],
        held_out: Sequence[Example],
        optimizer: OptimizerConfig,
        loop: LoopConfig,
        name: str = "",
    ) -> None:
        self.adapter = adapter
        self.examples = examples
        self.held_out = by_length(held_out)
        self.config = optimizer
        self.loop = loop
        self.name = name
        self.rows = loop.batch_size
        """Most rows in a forward pass: as was asked for, or fewer after running out of memory."""
        self.record = TrainingRecord()
        self.parameters = adapter.parameters()
        kind = torch.optim.AdamW if optimizer.name == "adamw" else torch.optim.Adam
        # Fused: one kernel a tensor instead of ten small ones, for hundreds of small tensors.
        self.optimizer = kind(
            self._groups(), lr=optimizer.lr, weight_decay=optimizer.weight_decay, fused=True
        )
        self.best: list[torch.Tensor] | None = None
        """The parameters at the lowest held-out loss of training so far, if that is what will be
        saved: in ``parameters``' order."""
        self.gradient_norm = 0.0
        self.figures: dict[str, float] = {}
        """Of the latest step, beside its loss: what an objective measures."""
        self.eval_figures: dict[str, float] = {}
        """The same of the latest evaluation."""
        self._steps = self._plan()

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the examples."""
        return math.ceil(len(self.examples) / (self.loop.batch_size * self.loop.grad_accumulation))

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.loop.max_steps or self.loop.epochs * self.steps_per_epoch

    @property
    def done(self) -> bool:
        """Whether there is nothing more to train."""
        record = self.record
        return record.stopped_early or bool(record.failure) or record.steps >= self.total_steps

    @property
    def learning_rate(self) -> float:
        """Of the next step."""
        return self.config.lr * lr_factor(self.config, self.record.steps + 1, self.total_steps)

    @property
    def kept(self) -> Evaluation | None:
        """Of the weights that ``take_best`` leaves; None if they were never evaluated."""
        found = self.record.evaluations
        if self.best is not None:
            return min((each for each in found if each.step), key=lambda each: each.loss)
        return found[-1] if found and found[-1].step == self.record.steps else None

    def next_step(self) -> list[list[Example]]:
        """The batches of the next optimizer step."""
        return next(self._steps)

    def cut(self, batches: Sequence[Sequence[Example]]) -> list[Sequence[Example]]:
        """The same rows in batches of no more than ``rows``, as even as can be."""
        parts = []
        for batch in batches:
            n = math.ceil(len(batch) / self.rows)
            bounds = [len(batch) * i // n for i in range(n + 1)]
            parts += [batch[start:stop] for start, stop in pairwise(bounds)]
        return parts

    def skip_to(self, step: int) -> None:
        """Go on after this many steps."""
        self.record.steps = step
        self._steps = self._plan()

    def draw(self, batch: int) -> int:
        """The number of which dropout's masks for a batch of the next step are made."""
        return hash((self.loop.seed, self.record.steps, batch))

    def update(self, loss: float, n_targets: int, n_tokens: int, seconds: float) -> None:
        """Make one optimizer step of the gradients that are there.

        Args:
            loss: summed over the step's targets.
            n_targets, n_tokens: of the step.
            seconds: that it took so far.

        Raises:
            TrainingError: the loss or the gradient is no longer a finite number.
        """
        norm = clip_grad_norm_(self.parameters, self.config.max_grad_norm or math.inf).item()
        step = self.record.steps + 1
        if not (math.isfinite(loss) and math.isfinite(norm)):
            what = "gradient" if math.isfinite(loss) else "loss"
            of = f" of {self.name}" if self.name else ""
            raise TrainingError(
                f"step {step}: the {what}{of} is not a finite number; try a lower "
                f"--lr (now {self.config.lr:g}), a longer --warmup-ratio, or --dtype float32"
            )
        factor = lr_factor(self.config, step, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = group["highest"] * factor
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.gradient_norm = norm
        record = self.record
        record.steps = step
        record.recent.append((loss, n_targets))
        record.tokens += n_tokens
        record.seconds += seconds

    def evaluated(self, loss: float) -> None:
        """Take a held-out loss: it may be the best so far, or the last that is waited for.

        The loss before training counts for patience, but is not the best that is kept: an adapter
        that does nothing is of no use.

        Args:
            loss: of the parameters as they are, in nats a target.

        Raises:
            TrainingError: it is not a finite number.
        """
        record = self.record
        if not math.isfinite(loss):
            of = f" of {self.name}" if self.name else ""
            raise TrainingError(
                f"step {record.steps}: the held-out loss{of} is not a finite number; try a lower "
                f"--lr (now {self.config.lr:g}), or --dtype float32"
            )
        trained = [each.loss for each in record.evaluations if each.step]
        record.evaluations.append(Evaluation(record.steps, loss))
        if self.loop.keep_best and record.steps and loss < min(trained, default=math.inf):
            self.best = [parameter.detach().clone() for parameter in self.parameters]
        patience = self.loop.patience
        if patience is not None:
            losses = record.eval_losses
            latest, earlier = losses[-patience:], losses[:-patience]
            if earlier and min(latest) >= min(earlier):
                record.stopped_early = record.steps < self.total_steps

    def take_best(self) -> None:
        """Put back the parameters of the lowest held-out loss, if they were kept."""
        if self.best is not None:
            with torch.no_grad():
                for parameter, best in zip(self.parameters, self.best, strict=True):
                    parameter.copy_(best)

    def _groups(self) -> list[dict[str, object]]:
        """A and the rest apart: B may have a higher learning rate (LoRA+, arXiv:2402.12354)."""
        a = {id(pair.a) for pair in self.adapter.pairs().values()}
        lr = self.config.lr
        return [
            {"params": [p for p in self.parameters if id(p) in a], "highest": lr},
            {
                "params": [p for p in self.parameters if id(p) not in a],
                "highest": lr * self.config.loraplus_ratio,
            },
        ]

    def _plan(self) -> Iterator[list[list[Example]]]:
        """Each step's batches from the record's step on. Every epoch has an order of its own, so
        that a run can go on anywhere."""
        epoch, skipped = divmod(self.record.steps, self.steps_per_epoch)
        while True:
            rng = random.Random(f"order {self.loop.seed} {epoch}")
            examples = self.examples
            if isinstance(examples, RandomWindows):
                examples = examples.of_epoch(epoch)
            plan = plan_epoch(examples, self.loop.batch_size, self.loop.grad_accumulation, rng)
            for number, step in enumerate(plan):
                if number >= skipped:
                    yield step
            epoch, skipped = epoch + 1, 0


def lr_factor(config: OptimizerConfig, step: int, total: int) -> float:
    """The share of the highest learning rate for ``step`` of 1 to ``total``.

    It rises linearly to 1 at the end of the warm-up, then falls, but for a constant schedule, such
    that the step after the last would have 0.
    """
    warmup = math.ceil(config.warmup_ratio * total)
    if step <= warmup:
        return step / warmup
    if config.schedule == "constant":
        return 1.0
    done = (step - warmup - 1) / (total - warmup)
    return 1.0 - done if config.schedule == "linear" else (1.0 + math.cos(math.pi * done)) / 2
