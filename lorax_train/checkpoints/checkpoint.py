"""Checkpoints of a training, and going on from one: on the CPU with the same bits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lorax_serve._version import __version__
from lorax_serve.errors import TrainingError
from lorax_train.adapters.export import CHECKPOINTS
from lorax_train.checkpoints.files import (
    Checkpoint,
    Damaged,
    delete_checkpoint,
    delete_leftovers,
    list_checkpoints,
    read_checkpoint,
    write_checkpoint,
)
from lorax_train.checkpoints.identity import ADDED_LATER, differences, identity
from lorax_train.checkpoints.state import restore, state_of, tensors_of
from lorax_train.config import TrainConfig
from lorax_train.console import Console
from lorax_train.data.dataset import Dataset
from lorax_train.loop.trainer import TrainingListener
from lorax_train.loop.training_run import TrainingRun

__all__ = ["Checkpoints"]

_FORMAT = 1


class Checkpoints(TrainingListener):
    """Writes checkpoints of all runs of a training at once, and goes on from one.

    They are below the first adapter's directory. One is written every so many steps, when the
    training is interrupted, and, if there are others or they were asked for, at its end. A disk
    that is full is warned of, and the training goes on.

    Args:
        configs: of each adapter. What is said of checkpoints is the first one's.
        datasets: of each adapter.
        model: identifies the base's weights.
        dtype: of the base.
        console: what is said goes there.
        processes: how many train together; the first one has this.

    Raises:
        TrainingError: a checkpoint is there and it is not said what to do with it; or the one to go
            on from is of another training.
    """

    def __init__(
        self,
        configs: Sequence[TrainConfig],
        datasets: Sequence[Dataset],
        model: str,
        dtype: torch.dtype,
        console: Console,
        processes: int = 1,
    ) -> None:
        output = configs[0].output
        self.root = output.directory / CHECKPOINTS
        self.console = console
        self._processes = processes
        self._every = configs[0].loop.save_every
        self._keep = output.keep_checkpoints
        self._resuming = output.resume is not False
        self._identities = [
            identity(config, data, model, str(dtype).removeprefix("torch."))
            for config, data in zip(configs, datasets, strict=True)
        ]
        self._names = [f"{config.name}: " if config.name else "" for config in configs]
        self._written: list[int] = []
        """Steps of this training's checkpoints, in their order."""
        self._found: Checkpoint | None = None
        if output.resume is not False:
            self._found = self._find(output.resume)
        elif not output.overwrite and (others := list_checkpoints(self.root)):
            raise TrainingError(
                f"--out {output.directory} has a checkpoint of step {others[-1][0]}; add --resume "
                "to go on from it, or --overwrite to begin anew and lose it"
            )

    def resume(self, runs: Sequence[TrainingRun]) -> bool:
        """Have the runs be as they were at the checkpoint, if there is one to go on from.

        Returns:
            Whether there was one.

        Raises:
            TrainingError: its tensors do not fit the adapters.
        """
        if self._found is None:
            return False
        found, self._found = self._found, None
        for run, state, tensors in zip(runs, found.state["runs"], found.tensors, strict=True):
            try:
                restore(run, state, dict(tensors))
            except ValueError as error:
                raise TrainingError(f"--resume: {error}; add --overwrite instead") from error
        step = found.state["step"]
        if all(run.done for run in runs):
            self.console.line(f"resume     done already, after step {step}; saving its result")
        else:
            self.console.line(f"resume     after step {step}")
        return True

    def settled(self, runs: Sequence[TrainingRun]) -> None:
        """Write one if it is time for it."""
        step = _step(runs)
        if self._every is not None and step % self._every == 0:
            self._write(runs)

    def ending(self, runs: Sequence[TrainingRun]) -> None:
        """Write a last one, of all that was learned."""
        if all(run.record.failure for run in runs):
            return
        if all(run.done for run in runs):
            if self._every or self._resuming or list_checkpoints(self.root):
                self._write(runs)
        elif any(run.record.interrupted for run in runs) and _step(runs):
            self._write(runs)
            if _step(runs) in self._written:
                self.console.line(f"checkpoint of step {_step(runs)}; --resume goes on from it")

    def _write(self, runs: Sequence[TrainingRun]) -> None:
        step = _step(runs)
        if not step or step in self._written:
            return
        state = _environment(runs[0], self._processes) | {
            "format": _FORMAT,
            "producer": f"lorax-train {__version__}",
            "step": step,
            "identities": self._identities,
            "runs": [state_of(run) for run in runs],
        }
        try:
            write_checkpoint(self.root, step, Checkpoint(state, [tensors_of(run) for run in runs]))
        except OSError as error:
            earlier = f"that of step {self._written[-1]} is whole" if self._written else "none yet"
            self.console.warn(
                f"no checkpoint of step {step}: {self.root} cannot be written: {error.strerror} "
                f"({earlier}); make room there, the training goes on"
            )
            return
        self._written.append(step)
        self._delete_others()

    def _delete_others(self) -> None:
        self._written = self._written[-self._keep :]
        try:
            for step, path in list_checkpoints(self.root):
                if step not in self._written:
                    delete_checkpoint(path)
        except OSError as error:
            self.console.warn(f"an old checkpoint in {self.root} cannot be deleted: {error}")

    def _find(self, resume: Path | bool) -> Checkpoint | None:
        """The newest that is whole, of this training."""
        where = self.root if isinstance(resume, bool) else resume
        delete_leftovers(self.root)
        one = list_checkpoints(where.parent) if where.name.startswith("step-") else []
        chosen = [each for each in one if each[1].name == where.name]
        if not chosen:
            chosen = list_checkpoints(where) or list_checkpoints(where / CHECKPOINTS)
        if not chosen and not isinstance(resume, bool):
            raise TrainingError(f"--resume {where}: there is no checkpoint")
        for step, path in reversed(chosen):
            try:
                found = read_checkpoint(path)
            except Damaged as error:
                self.console.warn(f"{path} is damaged and left out: {error}")
                continue
            self._check(found.state, path)
            if path.parent.absolute() == self.root.absolute():
                # Those before it are of the same training.
                self._written = [each for each, _ in chosen if each <= step][-self._keep :]
            return found
        if not isinstance(resume, bool):
            raise TrainingError(f"--resume {where}: no checkpoint there is whole")
        self.console.line(f"resume     no checkpoint in {self.root}: beginning anew")
        return None

    def _check(self, state: dict[str, Any], path: Path) -> None:
        if state["format"] != _FORMAT:
            raise TrainingError(
                f"--resume: {path} was written by {state['producer']}, whose checkpoints are of "
                "another format; go on with that version, or leave out --resume and add --overwrite"
            )
        before = state["identities"]
        if len(before) != len(self._identities):
            found = [f"there were {len(before)} adapters and are {len(self._identities)}"]
        else:
            pairs = zip(before, self._identities, self._names, strict=True)
            found = [
                name + each
                for old, new, name in pairs
                for each in differences({**ADDED_LATER, **old}, new)
            ]
        if found:
            raise TrainingError(
                f"--resume: {path} is of another training: {'; '.join(found)}. Give "
                "what it was begun with, or leave out --resume and add --overwrite to begin anew"
            )
        now = _environment(None, self._processes)
        earlier = {"processes": 1, **state}  # older checkpoints do not say
        other = [
            f"{key} was {earlier[key]} and is {now[key]}" for key in now if now[key] != earlier[key]
        ]
        if other:
            self.console.warn(f"going on, but not with the same bits: {'; '.join(other)}")


def _step(runs: Sequence[TrainingRun]) -> int:
    return max(run.record.steps for run in runs)


def _environment(run: TrainingRun | None, processes: int) -> dict[str, Any]:
    """What the order of additions depends on, beside what is computed."""
    found: dict[str, Any] = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "processes": processes,
    }
    if run is not None:
        found["device"] = run.parameters[0].device.type
    return found
