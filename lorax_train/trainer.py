"""The training loop: batches in, trained A and B out, for one adapter or many at once.

Knows no files and no model names. In each step, every adapter that is not done has the batches of
its own next step; they go through the frozen model together. Each adapter's loss is the mean over
its own targets, so that it learns what it would learn alone.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import zip_longest

import torch

from lorax_train.batches import Share
from lorax_train.loss import Objective, mean_loss
from lorax_train.training_run import TrainingRun

__all__ = ["Trainer", "TrainingListener"]


class TrainingListener:
    """Told of what happens; this one ignores it."""

    def started(self, runs: Sequence[TrainingRun]) -> None:
        """Training begins, or goes on."""

    def stepped(self, runs: Sequence[TrainingRun]) -> None:
        """These runs have made a step."""

    def evaluated(self, run: TrainingRun, when: str) -> None:
        """A run has a new held-out loss."""

    def stopped(self, run: TrainingRun) -> None:
        """A run has ended before its last step, since its held-out loss no longer falls."""

    def ended(self, runs: Sequence[TrainingRun]) -> None:
        """Training is over, however it ended."""


class Trainer:
    """Trains adapters on their examples, and evaluates them on others.

    Args:
        loss: of the model with the adapters in it.
        runs: one for each adapter.
        pad_id: a token for padding, where there must be some.
        listeners: told of what happens.
    """

    def __init__(
        self,
        loss: Objective,
        runs: Sequence[TrainingRun],
        pad_id: int,
        listeners: Sequence[TrainingListener] = (),
    ) -> None:
        self.loss = loss
        self.runs = runs
        self.pad_id = pad_id
        self.listeners = list(listeners)
        self.interrupted = False

    def train(self) -> None:
        """Train to the end, or until Ctrl-C, which is recorded and leaves what was learned.

        Raises:
            TrainingError: when a loss or gradient is no longer a finite number.
        """
        try:
            for run in self.runs:
                if not run.record.steps:
                    self._evaluate(run, "before training")
            for listener in self.listeners:
                listener.started(self.runs)
            while active := [run for run in self.runs if not run.done]:
                self._step(active)
                for listener in self.listeners:
                    listener.stepped(active)
                for run in active:
                    self._evaluate_if_due(run)
        except KeyboardInterrupt:
            self.interrupted = True
            for run in self.runs:
                run.record.interrupted = not run.done
        finally:
            for listener in self.listeners:
                listener.ended(self.runs)
        for run in self.runs:
            run.take_best()

    def _step(self, runs: Sequence[TrainingRun]) -> None:
        """One optimizer step of each run on the mean loss over all targets of its batches.

        Every target weighs the same, in whichever of the batches it is: so accumulation changes
        memory and not the result.
        """
        started = time.perf_counter()
        steps = [run.next_step() for run in runs]
        targets = [sum(e.n_targets for batch in step for e in batch) for step in steps]
        losses = [0.0] * len(runs)
        for run in runs:
            run.adapter.train(True)
        routing = self.loss.routing
        for number, batches in enumerate(zip_longest(*steps, fillvalue=())):
            shares = [
                Share(run.adapter.index, batch, 1 / n)
                for run, batch, n in zip(runs, batches, targets, strict=True)
                if batch
            ]
            routing.draws = {run.adapter.index: run.draw(number) for run in runs}
            batch = self.loss.collate(shares, self.pad_id)
            total, each = self.loss(batch)
            total.backward()  # type: ignore[no-untyped-call]
            for span in batch.target_spans:
                place = next(i for i, r in enumerate(runs) if r.adapter.index == span.adapter)
                losses[place] += float(each[span.start : span.stop].sum())
        seconds = time.perf_counter() - started
        for run, loss, n, step in zip(runs, losses, targets, steps, strict=True):
            tokens = sum(len(e.tokens) for batch in step for e in batch)
            run.update(loss, n, tokens, seconds)

    def _evaluate_if_due(self, run: TrainingRun) -> None:
        steps, every = run.record.steps, run.loop.eval_every
        if run.done:
            self._evaluate(run, "at the end")
        elif every is not None and steps % every == 0:
            self._evaluate(run, f"step {steps}")
        elif every is None and steps % run.steps_per_epoch == 0:
            self._evaluate(run, f"epoch {steps // run.steps_per_epoch}")

    @torch.no_grad()
    def _evaluate(self, run: TrainingRun, when: str) -> None:
        if not run.held_out:
            return
        run.adapter.train(False)
        size = run.loop.batch_size
        shares = (
            Share(run.adapter.index, run.held_out[start : start + size])
            for start in range(0, len(run.held_out), size)
        )
        batches = (self.loss.collate([share], self.pad_id) for share in shares)
        run.evaluated(mean_loss(self.loss, batches))
        for listener in self.listeners:
            listener.evaluated(run, when)
            if run.record.stopped_early:
                listener.stopped(run)
