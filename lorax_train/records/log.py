"""``log.jsonl``: one JSON object a line for each step and each evaluation.

Events, all with ``step`` (steps made so far) and ``epoch`` (passes over the data so far):

- ``start``: ``total_steps``, ``rows``, ``held_out_rows``, ``time`` (ISO 8601, UTC); again when a
  run is resumed, and then lines of later steps above it no longer count;
- ``step``: ``loss`` (of this step), ``lr``, ``gradient_norm`` (before clipping), ``tokens`` and
  ``seconds`` (so far), ``tokens_per_second`` (of this step), ``memory_bytes``, and what the
  objective measures;
- ``evaluation``: ``loss`` on the held-out rows, ``when``, and what the objective measures;
- ``end``: ``interrupted``, ``stopped_early``, and ``failure``, why the run was given up.

A number that is not finite is written as null, so that every line is JSON.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from lorax_train.loop.trainer import TrainingListener
from lorax_train.loop.training_run import TrainingRun
from lorax_train.memory import memory_used

__all__ = ["LOG_FILE", "Curves", "JsonLog", "read_curves"]

LOG_FILE = "log.jsonl"

Points = list[tuple[int, float]]


class JsonLog(TrainingListener):
    """Writes each run's events to a file of its own, and flushes every line.

    Nothing is written before the first step. The file of an earlier run is replaced, but a resumed
    run appends to it.

    Args:
        paths: the runs' files, by the adapters' numbers.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths
        self._files: dict[int, IO[bytes]] = {}
        self._waiting: dict[int, list[bytes]] = {}
        self._resumed: set[int] = set()
        self._before: dict[int, tuple[int, float]] = {}

    def started(self, runs: Sequence[TrainingRun]) -> None:
        """Note where each run stands."""
        for run in runs:
            record, index = run.record, run.adapter.index
            if record.steps:
                self._resumed.add(index)
            self._before[index] = record.tokens, record.seconds
            self._write(
                run,
                "start",
                total_steps=run.total_steps,
                rows=len(run.examples),
                held_out_rows=len(run.held_out),
                time=datetime.now(UTC).isoformat(timespec="seconds"),
            )

    def stepped(self, runs: Sequence[TrainingRun]) -> None:
        """Write a line for each run."""
        for run in runs:
            record, index = run.record, run.adapter.index
            tokens, seconds = self._before.get(index, (0, 0.0))
            self._before[index] = record.tokens, record.seconds
            took = record.seconds - seconds
            self._open(run)
            self._write(
                run,
                "step",
                loss=record.step_loss,
                lr=run.optimizer.param_groups[0]["lr"],
                gradient_norm=run.gradient_norm,
                tokens=record.tokens,
                seconds=round(record.seconds, 4),
                tokens_per_second=(record.tokens - tokens) / took if took > 0 else None,
                memory_bytes=memory_used(run.parameters[0].device),
                **run.figures,
            )

    def evaluated(self, run: TrainingRun, when: str) -> None:
        """Write the held-out loss."""
        loss = run.record.evaluations[-1].loss
        self._write(run, "evaluation", loss=loss, when=when, **run.eval_figures)

    def ended(self, runs: Sequence[TrainingRun]) -> None:
        """Write how each run ended, and close the files."""
        for run in runs:
            record = run.record
            self._write(
                run,
                "end",
                interrupted=record.interrupted,
                stopped_early=record.stopped_early,
                failure=record.failure,
            )
        for file in self._files.values():
            file.close()
        self._files.clear()
        self._waiting.clear()

    def _open(self, run: TrainingRun) -> None:
        index = run.adapter.index
        if index in self._files:
            return
        path = self.paths[index]
        path.parent.mkdir(parents=True, exist_ok=True)
        torn = False
        if index in self._resumed and path.exists():
            torn = not path.read_bytes().endswith(b"\n")
        file = path.open("ab" if index in self._resumed else "wb", buffering=0)
        self._files[index] = file
        file.write((b"\n" if torn else b"") + b"".join(self._waiting.pop(index, [])))

    def _write(self, run: TrainingRun, event: str, **fields: Any) -> None:
        record, index = run.record, run.adapter.index
        epoch = round(record.steps / run.steps_per_epoch, 4)
        found = {"event": event, "step": record.steps, "epoch": epoch, **fields}
        values = {key: _finite(value) for key, value in found.items()}
        line = json.dumps(values, allow_nan=False).encode() + b"\n"
        if index in self._files:
            self._files[index].write(line)
        else:
            self._waiting.setdefault(index, []).append(line)


@dataclass(frozen=True, slots=True)
class Curves:
    """Losses by step, in nats a target."""

    train: Points = field(default_factory=list)
    held_out: Points = field(default_factory=list)


def read_curves(path: Path) -> Curves:
    """The losses in a log; none where it is absent, and damaged lines are passed over."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return Curves()
    found: dict[str, dict[int, float]] = {"step": {}, "evaluation": {}}
    for row in _rows(lines):
        event, step, loss = row.get("event"), row.get("step"), row.get("loss")
        if not isinstance(step, int):
            continue
        if event == "start":
            found = {
                kind: {at: loss for at, loss in points.items() if at <= step}
                for kind, points in found.items()
            }
        elif event in found and isinstance(loss, int | float):
            found[event][step] = float(loss)
    return Curves(sorted(found["step"].items()), sorted(found["evaluation"].items()))


def _rows(lines: Iterable[bytes]) -> Iterable[dict[str, Any]]:
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:  # the last line of a run that was killed
            continue
        if isinstance(row, dict):
            yield row


def _finite(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value
