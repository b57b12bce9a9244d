"""The training loop: batches in, trained A and B out, for one adapter or many at once.

Knows no files and no model names. In each step, every adapter that is not done has the batches of
its own next step; they go through the frozen model together. Each adapter's loss is the mean over
its own targets, so that it learns what it would learn alone. Several processes share the rows of a
step, and all of them make the same optimizer step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from lorax_serve.errors import TrainingError
from lorax_train.data.batches import Share
from lorax_train.data.encode import Example
from lorax_train.distributed import Processes
from lorax_train.interrupts import interrupts_held
from lorax_train.loop.dealing import deal
from lorax_train.loop.loss import Objective, summed_loss
from lorax_train.loop.out_of_memory import is_out_of_memory, out_of_memory, release
from lorax_train.loop.training_run import TrainingRun

__all__ = ["Trainer", "TrainingListener"]

Steps = Sequence[Sequence[Sequence[Example]]]
"""Each run's batches of a step."""


class TrainingListener:
    """Told of what happens; this one ignores it."""

    def started(self, runs: Sequence[TrainingRun]) -> None:
        """Training begins, or goes on."""

    def stepped(self, runs: Sequence[TrainingRun]) -> None:
        """These runs have made a step."""

    def evaluated(self, run: TrainingRun, when: str) -> None:
        """A run has a new held-out loss."""

    def settled(self, runs: Sequence[TrainingRun]) -> None:
        """A step and the evaluations after it are over; these are all runs of the training."""

    def shrunk(self, runs: Sequence[TrainingRun]) -> None:
        """There was not enough memory: from here on, no batch has more than ``run.rows`` rows."""

    def stopped(self, run: TrainingRun) -> None:
        """A run has ended before its last step: its held-out loss no longer falls, or it was given
        up (``record.failure``)."""

    def ending(self, runs: Sequence[TrainingRun]) -> None:
        """Training is over, and this is no error: it has come to its end, or was interrupted."""

    def ended(self, runs: Sequence[TrainingRun]) -> None:
        """Training is over, however it ended."""


class Trainer:
    """Trains adapters on their examples, and evaluates them on others.

    Args:
        loss: of the model with the adapters in it.
        runs: one for each adapter.
        pad_id: a token for padding, where there must be some.
        listeners: told of what happens.
        processes: that train together.
        repeatable: whether a step for which there was not enough memory can be made again in
            smaller batches; not where processes wait for each other within a step.
    """

    def __init__(
        self,
        loss: Objective,
        runs: Sequence[TrainingRun],
        pad_id: int,
        listeners: Sequence[TrainingListener] = (),
        processes: Processes | None = None,
        *,
        repeatable: bool = True,
    ) -> None:
        self.loss = loss
        self.runs = runs
        self.pad_id = pad_id
        self.listeners = list(listeners)
        self.processes = processes or Processes()
        self.repeatable = repeatable
        self.interrupted = False

    def train(self) -> None:
        """Train to the end, or until Ctrl-C, which is recorded and leaves what was learned.

        Of several runs, one whose loss or gradient is no longer a finite number is given up, which
        its record says, and the others go on.

        Raises:
            TrainingError: when that happens to the only run, or a batch of one row does not fit in
                memory.
        """
        try:
            try:
                with self.processes.signals_held():
                    self._train()
            except KeyboardInterrupt:
                self.interrupted = True
                for run in self.runs:
                    run.record.interrupted = not run.done
            self._tell(lambda listener: listener.ending(self.runs))
        finally:
            self._tell(lambda listener: listener.ended(self.runs))
        for run in self.runs:
            run.take_best()

    def _train(self) -> None:
        for run in self.runs:
            self._evaluate_if_due(run)  # or again, if a run goes on that was killed before it
        self._tell(lambda listener: listener.started(self.runs))
        while active := [run for run in self.runs if not run.done]:
            self.processes.stop_if_asked()
            stepped = self._step(active)
            if stepped:
                self._tell(lambda listener, runs=stepped: listener.stepped(runs))  # type: ignore[misc]
            for run in active:
                self._evaluate_if_due(run)
            self._tell(lambda listener: listener.settled(self.runs))

    def _step(self, runs: Sequence[TrainingRun]) -> list[TrainingRun]:
        """One optimizer step of each run on the mean loss over all targets of its batches; returns
        those that could make it."""
        started = time.perf_counter()
        steps = [run.next_step() for run in runs]
        for run in runs:
            run.adapter.train(True)
        losses = self._shrinking(runs, len(runs), lambda: self._gradients(runs, steps))
        self.processes.add_gradients([each for run in runs for each in run.parameters])
        seconds = time.perf_counter() - started
        with interrupts_held():
            for run, loss, step in zip(runs, losses, steps, strict=True):
                examples = [example for batch in step for example in batch]
                targets = sum(example.n_targets for example in examples)
                tokens = sum(len(example.tokens) for example in examples)
                try:
                    run.update(loss, targets, tokens, seconds)
                except TrainingError as error:
                    self._give_up(run, error)
        return [run for run in runs if not run.record.failure]

    def _give_up(self, run: TrainingRun, error: TrainingError) -> None:
        """End a run of several; what it has computed is its own, so the others lose nothing."""
        if len(self.runs) == 1:
            raise TrainingError(f"{error}; nothing was saved") from error
        run.record.failure = str(error)
        run.optimizer.zero_grad()
        self._tell(lambda listener: listener.stopped(run))

    def _gradients(self, runs: Sequence[TrainingRun], steps: Steps) -> list[float]:
        """Add up the gradients of this process's rows of each run, and return their summed losses.

        Every target weighs the same, in whichever of the batches and processes it is: so
        accumulation, smaller batches than were asked for, and more processes change memory and
        time, and not the result.
        """
        targets = [sum(e.n_targets for batch in step for e in batch) for step in steps]
        cut = [
            [run.cut(step) for run, step in zip(runs, part, strict=True)]
            for part in deal(steps, self.processes.world)
        ]
        passes = max(len(batches) for part in cut for batches in part)
        own, first = cut[self.processes.rank], self.processes.rank * passes
        losses = [0.0] * len(runs)
        routing = self.loss.routing
        for number in range(passes):
            shares = [
                Share(run.adapter.index, batches[number], 1 / n)
                for run, batches, n in zip(runs, own, targets, strict=True)
                if number < len(batches)
            ]
            # Where processes wait for each other in every layer, each must make as many passes. It
            # delays nobody: others are at work on rows that count.
            idle = not shares
            if idle:
                shares = [Share(runs[0].adapter.index, [_shortest(steps[0])], 0.0)]
            routing.draws = {run.adapter.index: run.draw(first + number) for run in runs}
            batch = self.loss.collate(shares, self.pad_id)
            total, each = self.loss(batch)
            total.backward()  # type: ignore[no-untyped-call]
            for span in () if idle else batch.target_spans:
                place = next(i for i, r in enumerate(runs) if r.adapter.index == span.adapter)
                losses[place] += float(each[span.start : span.stop].sum())
        return losses

    def _shrinking(
        self, runs: Sequence[TrainingRun], size: int, compute: Callable[[], list[float]]
    ) -> list[float]:
        """The ``size`` numbers that ``compute`` returns, added up over the processes; while one of
        them has not enough memory for it, all with batches of half as many rows, from its
        beginning."""
        while True:
            values = None
            try:
                values = compute()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if not self.repeatable:
                    raise out_of_memory() from error
            totals = self.processes.agree(values, size)
            if totals is not None:
                return totals
            rows = max(run.rows for run in runs)
            if rows == 1:
                raise out_of_memory(rows)
            for run in runs:
                run.optimizer.zero_grad()
                run.rows = min(run.rows, (rows + 1) // 2)
            release()
            self._tell(lambda listener: listener.shrunk(runs))

    def _evaluate_if_due(self, run: TrainingRun) -> None:
        steps, every = run.record.steps, run.loop.eval_every
        if run.record.failure or any(each.step == steps for each in run.record.evaluations):
            return
        if not steps:
            self._evaluate(run, "before training")
        elif run.done:
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

        total, targets = self._shrinking([run], 2, lambda: self._held_out_sums(run))
        try:
            run.evaluated(total / targets)
        except TrainingError as error:
            self._give_up(run, error)
            return
        self._tell(lambda listener: listener.evaluated(run, when))
        if run.record.stopped_early:
            self._tell(lambda listener: listener.stopped(run))

    def _held_out_sums(self, run: TrainingRun) -> list[float]:
        """The summed loss of this process's held-out rows, and the number of their targets."""

        def collate(rows: Sequence[Example]) -> Any:
            return self.loss.collate([Share(run.adapter.index, rows)], self.pad_id)

        rank, world = self.processes.rank, self.processes.world
        # They are sorted by length, so every so many of them are as long as any others; and the
        # first process has the most of them.
        most, own = (run.held_out[start::world] for start in (0, rank))
        passes, batches = len(run.cut([most])), run.cut([own] if own else [])
        total, targets = summed_loss(self.loss, map(collate, batches))
        for _ in range(passes - len(batches)):
            self.loss(self.loss.collate([Share(run.adapter.index, most[:1], 0.0)], self.pad_id))
        return [total, targets]

    def _tell(self, what: Callable[[TrainingListener], None]) -> None:
        for listener in self.listeners:
            what(listener)


def _shortest(step: Sequence[Sequence[Example]]) -> Example:
    return min((row for batch in step for row in batch), key=lambda row: len(row.tokens))
