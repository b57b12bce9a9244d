"""The training loop: batches in, trained A and B out. Knows no files and no model names."""

from __future__ import annotations

import math
import random
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch.nn.utils import clip_grad_norm_

from lorax_serve.errors import TrainingError
from lorax_train.batches import Batch, collate, plan_epoch
from lorax_train.config import LoopConfig, OptimizerConfig
from lorax_train.console import Console
from lorax_train.encode import Example
from lorax_train.inject import TrainableLoRA
from lorax_train.loss import TargetLoss, mean_loss

__all__ = ["Trainer", "TrainingRecord", "lr_factor"]

_RECENT_STEPS = 20


@dataclass
class TrainingRecord:
    """What has happened so far."""

    steps: int = 0
    tokens: int = 0
    """Trained on, without padding."""
    seconds: float = 0.0
    """In training steps; evaluation is not counted."""
    eval_losses: list[float] = field(default_factory=list)
    """Held-out loss before training, after each epoch and at the end, in nats a target."""
    interrupted: bool = False
    recent: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=_RECENT_STEPS))
    """Summed loss and number of targets of the latest steps."""

    @property
    def train_loss(self) -> float:
        """Mean loss of the targets of the latest 20 steps, in nats."""
        return sum(loss for loss, _ in self.recent) / max(1, sum(n for _, n in self.recent))

    @property
    def tokens_per_second(self) -> float:
        """Non-padding tokens a second."""
        return self.tokens / self.seconds if self.seconds else 0.0


class Trainer:
    """Trains an adapter on examples, and evaluates it on others."""

    def __init__(
        self,
        adapter: TrainableLoRA,
        loss: TargetLoss,
        examples: Sequence[Example],
        held_out: Sequence[Example],
        optimizer: OptimizerConfig,
        loop: LoopConfig,
        pad_id: int,
    ) -> None:
        self.adapter = adapter
        self.loss = loss
        self.examples = examples
        self.held_out = sorted(held_out, key=lambda example: len(example.tokens))
        self.config = optimizer
        self.loop = loop
        self.pad_id = pad_id
        self.record = TrainingRecord()
        self.parameters = adapter.parameters()
        kind = torch.optim.AdamW if optimizer.name == "adamw" else torch.optim.Adam
        # Fused: one kernel a tensor instead of ten small ones, for hundreds of small tensors.
        self.optimizer = kind(
            self.parameters, lr=optimizer.lr, weight_decay=optimizer.weight_decay, fused=True
        )

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the examples."""
        return math.ceil(len(self.examples) / (self.loop.batch_size * self.loop.grad_accumulation))

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.loop.max_steps or self.loop.epochs * self.steps_per_epoch

    def run(self, console: Console) -> TrainingRecord:
        """Train to the end, or until Ctrl-C, which is recorded and leaves what was learned.

        Raises:
            TrainingError: when the loss or the gradient is no longer a finite number.
        """
        torch.manual_seed(self.loop.seed)  # of dropout
        try:
            self._evaluate(console, "before training")
            console.start(self.total_steps, self.loop.log_every)
            for batches in self._steps():
                self._step(batches)
                record = self.record
                lr = self.optimizer.param_groups[0]["lr"]
                console.step(record.steps, record.train_loss, lr, record.tokens_per_second)
                if record.steps == self.total_steps:
                    self._evaluate(console, "at the end")
                elif record.steps % self.steps_per_epoch == 0:
                    self._evaluate(console, f"epoch {record.steps // self.steps_per_epoch}")
        except KeyboardInterrupt:
            self.record.interrupted = True
        finally:
            console.stop()
        return self.record

    def _steps(self) -> Iterator[list[Batch]]:
        """Each step's batches, until all steps are done."""
        rng = random.Random(f"order {self.loop.seed}")
        while True:
            for step in plan_epoch(
                self.examples, self.loop.batch_size, self.loop.grad_accumulation, rng
            ):
                if self.record.steps == self.total_steps:
                    return
                yield [self._collate(examples) for examples in step]

    def _step(self, batches: Sequence[Batch]) -> None:
        """One optimizer step on the mean loss over all targets of ``batches``.

        Every target weighs the same, in whichever of the batches it is: so accumulation changes
        memory and not the result.
        """
        started = time.perf_counter()
        n_targets = sum(batch.n_targets for batch in batches)
        self.adapter.train(True)
        total = 0.0
        for batch in batches:
            loss = self.loss(batch)
            (loss / n_targets).backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        norm = clip_grad_norm_(self.parameters, self.config.max_grad_norm or math.inf)
        step = self.record.steps + 1
        if not (math.isfinite(total) and math.isfinite(norm.item())):
            what = "gradient" if math.isfinite(total) else "loss"
            raise TrainingError(
                f"step {step}: the {what} is not a finite number, so nothing was saved; try a "
                f"lower --lr (now {self.config.lr:g}), a longer --warmup-ratio, or --dtype float32"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * lr_factor(self.config, step, self.total_steps)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.record.steps = step
        self.record.recent.append((total, n_targets))
        self.record.tokens += sum(batch.n_tokens for batch in batches)
        self.record.seconds += time.perf_counter() - started

    def _evaluate(self, console: Console, when: str) -> None:
        if not self.held_out:
            return
        self.adapter.train(False)
        size = self.loop.batch_size
        starts = range(0, len(self.held_out), size)
        batches = (self._collate(self.held_out[start : start + size]) for start in starts)
        self.record.eval_losses.append(mean_loss(self.loss, batches))
        console.line(f"held-out loss {self.record.eval_losses[-1]:.4f} ({when})")

    def _collate(self, examples: Sequence[Example]) -> Batch:
        return collate(examples, self.pad_id).to(self.parameters[0].device)


def lr_factor(config: OptimizerConfig, step: int, total: int) -> float:
    """The share of ``config.lr`` for ``step`` of 1 to ``total``.

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
