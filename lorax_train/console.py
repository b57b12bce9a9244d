"""What a run says to the person who started it: lines, warnings, and how far it is."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import NoReturn, TextIO

from tqdm import tqdm

from lorax_train.loop.trainer import TrainingListener
from lorax_train.loop.training_run import TrainingRun
from lorax_train.memory import memory_used

__all__ = ["Console", "Nowhere", "size"]

_SHOWN_RUNS = 4


class Console(TrainingListener):
    """Writes to one stream: a progress bar if it is a terminal, else a line every few steps."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.is_terminal = stream.isatty()
        self._bar: tqdm[NoReturn] | None = None

    def line(self, text: str = "") -> None:
        """Write a line, above the progress bar if there is one."""
        if self._bar is None:
            print(text, file=self.stream, flush=True)
        else:
            self._bar.write(text, file=self.stream)

    def warn(self, text: str) -> None:
        """Write a warning."""
        self.line(f"lorax-train: warning: {text}")

    def quiet(self, text: str) -> str:
        """Set ``text`` apart as of less weight: dim in a terminal, in ⟦⟧ elsewhere."""
        return f"\x1b[2m{text}\x1b[22m" if self.is_terminal else f"⟦{text}⟧"

    def started(self, runs: Sequence[TrainingRun]) -> None:
        """Begin to show progress."""
        if self.is_terminal:
            total = max(run.total_steps for run in runs)
            done = min(run.record.steps for run in runs)
            self._bar = tqdm(total=total, initial=done, file=self.stream, unit="step")

    def stepped(self, runs: Sequence[TrainingRun]) -> None:
        """Show how far these runs are; the loss is the mean of the latest steps, in nats."""
        speed = f"{sum(run.record.tokens_per_second for run in runs):.0f} tok/s"
        used = memory_used(runs[0].parameters[0].device)
        memory = [] if used is None else [size(used)]
        if self._bar is not None:
            rates = [_rate(run) for run in runs] if len(runs) == 1 else []
            text = ", ".join([_losses(runs), *rates, speed, *memory])
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update()
            return
        for run in runs:
            step = run.record.steps
            if step % run.loop.log_every == 0 or step in (1, run.total_steps):
                parts = [
                    f"{_named(run)}step {step}/{run.total_steps}",
                    f"loss {run.record.train_loss:.3f}",
                    *_figures(run.figures),
                    _rate(run),
                    speed,
                    *memory,
                ]
                self.line("  ".join(parts))

    def evaluated(self, run: TrainingRun, when: str) -> None:
        """Show a held-out loss."""
        loss = run.record.evaluations[-1].loss
        figures = "".join(f", {figure}" for figure in _figures(run.eval_figures))
        self.line(f"{_named(run)}held-out loss {loss:.4f}{figures} ({when})")

    def shrunk(self, runs: Sequence[TrainingRun]) -> None:
        """Warn of a lack of memory that was got round."""
        rows = max(run.rows for run in runs)
        self.warn(
            f"out of memory; going on with batches of {rows} {'rows' if rows > 1 else 'row'}, and "
            "more of them in a step, for the same result"
        )

    def stopped(self, run: TrainingRun) -> None:
        """Say that a run has ended early."""
        if run.record.failure:
            self.warn(f"{run.record.failure}; this adapter is given up")
            return
        self.line(
            f"{_named(run)}stopped after step {run.record.steps}: the held-out loss has not fallen "
            f"in {run.loop.patience} evaluations"
        )

    def ended(self, runs: Sequence[TrainingRun]) -> None:
        """Take the progress bar away from under the lines to come."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class Nowhere(io.StringIO):
    """A stream for what is said already by another process."""

    def write(self, text: str) -> int:
        """Forget it."""
        return len(text)


def _losses(runs: Sequence[TrainingRun]) -> str:
    """Of one run all there is, of a few each one's losses, of many the lowest and the highest."""
    losses = [run.record.train_loss for run in runs]
    if len(runs) > _SHOWN_RUNS:
        return f"loss {min(losses):.3f} to {max(losses):.3f} of {len(runs)} adapters"
    parts = []
    for run, loss in zip(runs, losses, strict=True):
        held_out = run.record.eval_losses[-1:]
        found = f"{loss:.3f}" + "".join(f" (held out {each:.3f})" for each in held_out)
        parts.append(f"{run.name} {found}" if run.name and len(runs) > 1 else found)
    figures = _figures(runs[0].figures) if len(runs) == 1 else []
    return ", ".join(["loss " + "; ".join(parts), *figures])


def _rate(run: TrainingRun) -> str:
    return f"lr {run.optimizer.param_groups[0]['lr']:.1e}"


def _figures(figures: Mapping[str, float]) -> list[str]:
    return [f"{name.replace('_', ' ')} {value:.3f}" for name, value in figures.items()]


def _named(run: TrainingRun) -> str:
    return f"{run.name}: " if run.name else ""


def size(n_bytes: float) -> str:
    """A size for people: ``4.9 MB``."""
    for unit in ("B", "kB", "MB"):
        if n_bytes < 1000:
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.2f} GB"
