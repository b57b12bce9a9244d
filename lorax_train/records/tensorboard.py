"""A run's figures for TensorBoard, which is an extra."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lorax_serve.errors import TrainingError
from lorax_train.loop.trainer import TrainingListener
from lorax_train.loop.training_run import TrainingRun
from lorax_train.memory import memory_used

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["TensorBoard", "check_tensorboard"]


def check_tensorboard() -> None:
    """Make sure that TensorBoard is there before anything is trained.

    Raises:
        TrainingError: saying how to install it.
    """
    if importlib.util.find_spec("tensorboard") is None:
        raise TrainingError(
            "--tensorboard needs a package that is not installed; run "
            "'pip install lorax-serve[tensorboard]', or leave the flag out"
        )


class TensorBoard(TrainingListener):
    """Writes each run to a directory of its own.

    Args:
        directories: by the adapters' numbers; None for a run that is not to be shown.
    """

    def __init__(self, directories: Sequence[Path | None]) -> None:
        self.directories = directories
        self._writers: dict[int, SummaryWriter] = {}

    def stepped(self, runs: Sequence[TrainingRun]) -> None:
        """Write the step's figures."""
        for run in runs:
            record = run.record
            memory = memory_used(run.parameters[0].device)
            self._write(
                run,
                {
                    "train/loss": record.step_loss,
                    "train/learning_rate": run.optimizer.param_groups[0]["lr"],
                    "train/gradient_norm": run.gradient_norm,
                    "speed/tokens_per_second": record.tokens_per_second,
                    **({} if memory is None else {"memory/GB": memory / 1e9}),
                    **{f"train/{name}": value for name, value in run.figures.items()},
                },
            )

    def evaluated(self, run: TrainingRun, when: str) -> None:
        """Write the held-out loss."""
        figures = {f"held_out/{name}": value for name, value in run.eval_figures.items()}
        self._write(run, {"held_out/loss": run.record.evaluations[-1].loss, **figures})
        self._writers[run.adapter.index].flush()

    def ended(self, runs: Sequence[TrainingRun]) -> None:
        """Close the files."""
        while self._writers:
            self._writers.popitem()[1].close()

    def _write(self, run: TrainingRun, figures: dict[str, float]) -> None:
        index = run.adapter.index
        directory = self.directories[index]
        if directory is None:
            return
        if index not in self._writers:
            # Heavy, and only there where it is asked for.
            from torch.utils.tensorboard import SummaryWriter

            # What an earlier run wrote from this step on is no longer shown.
            purge = run.record.steps if run.record.steps > 1 else 0
            self._writers[index] = SummaryWriter(str(directory), purge_step=purge)
        for name, value in figures.items():
            self._writers[index].add_scalar(name, value, run.record.steps)
