"""Trainings that are killed at their work, run as ``python -m tests.train.killing JOBS``.

JOBS is a pickle of configs and numbers: for each job, a forked child trains by the configs and dies
at that number of the moments that count: before and after whatever syncs, renames or deletes a
file, and after each step and evaluation. Children print losses in hexadecimal as they go.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from lorax_train.config import TrainConfig
from lorax_train.console import Console
from lorax_train.loop.training_run import TrainingRun
from lorax_train.run import train_all


class Killed(Console):
    def __init__(self, at: int) -> None:
        super().__init__(io.StringIO())
        self.left = at
        for where, name in ((os, "fsync"), (Path, "replace"), (Path, "unlink"), (os, "rmdir")):
            setattr(where, name, self.counting(getattr(where, name)))

    def count(self) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def counting(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            self.count()
            result = real(*args, **options)
            self.count()
            return result

        return call

    def stepped(self, runs: Sequence[TrainingRun]) -> None:
        for run in runs:
            say([run.name, run.record.steps, run.record.step_loss.hex(), run.gradient_norm.hex()])
        self.count()

    def evaluated(self, run: TrainingRun, when: str) -> None:
        evaluation = run.record.evaluations[-1]
        say([run.name, -evaluation.step - 1, evaluation.loss.hex(), ""])
        self.count()


def say(message: list[Any]) -> None:
    print(json.dumps(message), flush=True)


def main() -> None:
    torch.set_num_threads(1)
    jobs: list[tuple[list[TrainConfig], int]] = pickle.loads(Path(sys.argv[1]).read_bytes())
    for configs, at in jobs:
        child = os.fork()
        if child == 0:
            train_all(configs, Killed(at))
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        say(["end", os.WTERMSIG(status), os.waitstatus_to_exitcode(status), ""])


if __name__ == "__main__":
    main()
