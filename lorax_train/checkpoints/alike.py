"""That all processes of a training do the same: one task, one beginning, and ever after the same
bits of what is trained. Where they do not, it is an error and never another result."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch

from lorax_serve.errors import TrainingError
from lorax_train.checkpoints.identity import differences, identity
from lorax_train.checkpoints.state import restore, state_of, tensors_of
from lorax_train.config import TrainConfig
from lorax_train.data.dataset import Dataset
from lorax_train.distributed import Processes
from lorax_train.loop.trainer import TrainingListener
from lorax_train.loop.training_run import TrainingRun

__all__ = ["Alike", "begin_alike", "check_alike", "check_same_task"]


def check_same_task(
    processes: Processes,
    configs: Sequence[TrainConfig],
    datasets: Sequence[Dataset],
    model: str,
    dtype: torch.dtype,
    device: torch.device,
    *,
    dry_run: bool = False,
) -> None:
    """Make sure that all processes have the same settings, rows and base model.

    Args:
        processes: that train together.
        configs, datasets: of each adapter, in this process.
        model: identifies the base's weights.
        dtype: of the base.
        device: of this process; which one is its own, but all are of a kind.
        dry_run: whether nothing is to be trained.

    Raises:
        TrainingError: naming what differs, and the data's path.
    """
    if processes.world == 1:
        return
    name = str(dtype).removeprefix("torch.")
    own: list[dict[str, Any]] = [
        {
            **identity(config, data, model, name),
            # On these the result does not depend, but what processes wait for does.
            "--device": device.type,
            "--dry-run": dry_run,
            "--fsdp": config.fsdp,
            "--batch-size": config.loop.batch_size,
            "--checkpointing": config.loop.checkpointing,
            "--save-every": config.loop.save_every,
            "torch": torch.__version__,
        }
        for config, data in zip(configs, datasets, strict=True)
    ]
    first, *others = processes.gather(own)
    for rank, other in enumerate(others, 1):
        found = [] if len(other) == len(first) else ["the number of adapters"]
        for config, here, there in zip(configs, first, other, strict=False):
            of = f"{config.name}: " if config.name else ""
            found += [f"{of}{each}" for each in differences(here, there, "{} is {} and {}")]
        if found:
            paths = dict.fromkeys(str(config.data.train) for config in configs)
            raise TrainingError(
                f"processes 0 and {rank} are to train different things: {'; '.join(found)}. Give "
                f"all of them the same flags and files ({', '.join(paths)})"
            )


def begin_alike(processes: Processes, runs: Sequence[TrainingRun]) -> None:
    """Have the runs of all processes be as those of the first: so the others need no checkpoint to
    go on from, and decompositions that give other signs on other machines are no matter."""
    if processes.world == 1:
        return
    states = processes.first(
        lambda: [
            (state_of(run), {name: each.cpu() for name, each in tensors_of(run).items()})
            for run in runs
        ]
    )
    if not processes.is_first:
        for run, (state, tensors) in zip(runs, states, strict=True):
            restore(run, state, tensors)


def check_alike(processes: Processes, runs: Sequence[TrainingRun]) -> None:
    """Make sure that what is trained is the same in all processes, to the last bit.

    Raises:
        TrainingError: it is not.
    """
    if processes.world == 1:
        return
    digest = hashlib.sha256()
    for run in runs:
        for parameter in run.parameters:
            digest.update(parameter.detach().cpu().contiguous().numpy().tobytes())
    found = processes.gather(digest.hexdigest())
    other = next((rank for rank, each in enumerate(found) if each != found[0]), None)
    if other is not None:
        raise TrainingError(
            f"after step {max(run.record.steps for run in runs)} process {other} has other values "
            "of A and B than process 0, so nothing was saved; start all processes on machines of "
            "one kind, with the same packages, and look for faulty memory"
        )


class Alike(TrainingListener):
    """``check_alike`` before each checkpoint, and before anything is made of the result.

    Args:
        processes: that train together.
        every: steps between two checkpoints; None: there are none.
    """

    def __init__(self, processes: Processes, every: int | None) -> None:
        self.processes = processes
        self.every = every

    def settled(self, runs: Sequence[TrainingRun]) -> None:
        """Check if it is time for it."""
        step = max(run.record.steps for run in runs)
        if self.every is not None and step % self.every == 0:
            check_alike(self.processes, runs)

    def ending(self, runs: Sequence[TrainingRun]) -> None:
        """Check what will be saved."""
        check_alike(self.processes, runs)
