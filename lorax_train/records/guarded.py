"""Keeps a run going when what records it fails."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lorax_train.loop.trainer import TrainingListener
from lorax_train.loop.training_run import TrainingRun

__all__ = ["Guarded"]


class Guarded(TrainingListener):
    """Passes on what happens to a listener until that fails; then warns once and passes no more.

    Args:
        listener: that writes somewhere.
        what: it writes, for the warning.
        warn: shows the warning.
    """

    def __init__(self, listener: TrainingListener, what: str, warn: Callable[[str], None]) -> None:
        self.listener = listener
        self.what = what
        self.warn = warn
        self.failed = False

    def started(self, runs: Sequence[TrainingRun]) -> None:
        """Pass it on."""
        self._try(lambda: self.listener.started(runs))

    def stepped(self, runs: Sequence[TrainingRun]) -> None:
        """Pass it on."""
        self._try(lambda: self.listener.stepped(runs))

    def evaluated(self, run: TrainingRun, when: str) -> None:
        """Pass it on."""
        self._try(lambda: self.listener.evaluated(run, when))

    def stopped(self, run: TrainingRun) -> None:
        """Pass it on."""
        self._try(lambda: self.listener.stopped(run))

    def ended(self, runs: Sequence[TrainingRun]) -> None:
        """Pass it on."""
        self._try(lambda: self.listener.ended(runs))

    def _try(self, what: Callable[[], None]) -> None:
        if self.failed:
            return
        try:
            what()
        except Exception as error:  # a full disk, or whatever a library raises
            self.failed = True
            self.warn(f"{self.what} cannot be written any more, training goes on: {error}")
