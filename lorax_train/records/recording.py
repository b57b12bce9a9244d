"""What records the runs of one training: chosen by the configs, written beside the adapters."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path

from lorax_train.config import TrainConfig
from lorax_train.loop.trainer import TrainingListener
from lorax_train.records.curves import to_png
from lorax_train.records.files import write_whole
from lorax_train.records.guarded import Guarded
from lorax_train.records.log import LOG_FILE, JsonLog
from lorax_train.records.page import Report, render_page
from lorax_train.records.tensorboard import TensorBoard, check_tensorboard

__all__ = ["PLOT_FILE", "REPORT_FILE", "check_recording", "recorders", "write_reports"]

PLOT_FILE = "loss.png"
REPORT_FILE = "report.html"

Warn = Callable[[str], None]


def check_recording(configs: Sequence[TrainConfig]) -> None:
    """Make sure, before anything is computed, that what is asked for can be written.

    Raises:
        TrainingError: naming the flag.
    """
    if any(config.output.tensorboard for config in configs):
        check_tensorboard()


def recorders(configs: Sequence[TrainConfig], warn: Warn) -> list[TrainingListener]:
    """Listeners for the log and TensorBoard. If they fail, they warn, and training goes on.

    Args:
        configs: in the order of the adapters' numbers.
        warn: shows a warning.
    """
    log = JsonLog([config.output.directory / LOG_FILE for config in configs])
    found: list[TrainingListener] = [Guarded(log, LOG_FILE, warn)]
    if any(config.output.tensorboard for config in configs):
        board = TensorBoard([_board_of(config) for config in configs])
        found.append(Guarded(board, "TensorBoard's files", warn))
    return found


def write_reports(reports: Sequence[Report], warn: Warn) -> None:
    """Write ``loss.png`` and ``report.html`` beside each adapter; what fails is warned of.

    Args:
        reports: of the adapters that were saved.
        warn: shows a warning.
    """
    plots = importlib.util.find_spec("matplotlib") is not None
    if reports and not plots:
        warn(
            f"no {PLOT_FILE} is drawn, since matplotlib is not installed; run "
            f"'pip install lorax-serve[report]' for it ({REPORT_FILE} has the curves too)"
        )
    for report in reports:
        directory, name = report.summary.directory, report.summary.name
        if plots:
            _attempt(directory / PLOT_FILE, lambda r=report, n=name: to_png(r.curves, n), warn)  # type: ignore[misc]
        _attempt(
            directory / REPORT_FILE,
            lambda r=report: render_page(r, reports).encode("utf-8", "replace"),  # type: ignore[misc]
            warn,
        )


def _attempt(path: Path, make: Callable[[], bytes], warn: Warn) -> None:
    try:
        write_whole(path, make())
    except Exception as error:  # a full disk, or whatever a library raises: the adapter is saved
        warn(f"{path} could not be written: {error}")


def _board_of(config: TrainConfig) -> Path | None:
    board = config.output.tensorboard
    return board and board / (config.name or config.output.directory.resolve().name)
