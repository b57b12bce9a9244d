"""Trainings on a full disk, run as ``python -m tests.train.filling DISK MODEL DATA PLAIN ROOM...``.

DISK is a small file system of its own, and empty. For each ROOM, in bytes, an adapter is trained
there, then another one in its place, amid which all but that room is taken; then the room is given
back and the training is resumed. What was found is printed as JSON, a line for each.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lorax_serve.adapter import read
from lorax_serve.errors import TrainingError
from lorax_train.checkpoints.files import list_checkpoints, read_checkpoint
from lorax_train.config import (
    DataConfig,
    InjectionConfig,
    LoopConfig,
    OptimizerConfig,
    OutputConfig,
    TrainConfig,
)
from lorax_train.console import Console
from lorax_train.loop.training_run import TrainingRun
from lorax_train.run import train

STEPS, EVERY, FILLED_AFTER = 8, 2, 5
WEIGHTS = "adapter_model.safetensors"


class Filling(Console):
    """Takes the room of a disk after a step."""

    def __init__(self, disk: Path, room: int) -> None:
        super().__init__(io.StringIO())
        self.filler, self.room = disk / "filler", room

    def stepped(self, runs: Sequence[TrainingRun]) -> None:
        super().stepped(runs)
        if runs[0].record.steps == FILLED_AFTER:
            with self.filler.open("wb", buffering=0) as file:
                try:
                    while True:
                        file.write(bytes(4096))
                except OSError:
                    os.ftruncate(file.fileno(), max(0, file.tell() - self.room))


def config(model: Path, data: Path, out: Path, steps: int, **output: Any) -> TrainConfig:
    return TrainConfig(
        DataConfig(data, eval_split=0.25),
        OutputConfig(out, report=False, **output),
        model=str(model),
        device="cpu",
        dtype="float32",
        lora=InjectionConfig(r=4),
        optimizer=OptimizerConfig(lr=1e-2),
        loop=LoopConfig(max_steps=steps, batch_size=4, save_every=EVERY if steps > 1 else None),
    )


def fill(disk: Path, model: Path, data: Path, plain: Path, room: int) -> dict[str, Any]:
    out, error = disk / "out", ""
    train(config(model, data, out, 1), Console(io.StringIO()))
    before = read(out).digest
    console = Filling(disk, room)
    try:
        train(config(model, data, out, STEPS), console)
    except TrainingError as caught:
        error = str(caught)
    files = read(out)  # which refuses what is not whole
    for _, path in (checkpoints := list_checkpoints(out / "checkpoints")):
        read_checkpoint(path)
    console.filler.unlink()
    train(config(model, data, out, STEPS, resume=True), Console(io.StringIO()))
    found = {
        "room": room,
        "error": error,
        "said": console.stream.getvalue() if isinstance(console.stream, io.StringIO) else "",
        "adapter": "old" if files.digest == before else files.metadata["steps"],
        "checkpoints": [step for step, _ in checkpoints],
        "same": (out / WEIGHTS).read_bytes() == (plain / WEIGHTS).read_bytes(),
        "left": sorted(path.name for path in (out / "checkpoints").iterdir()),
    }
    shutil.rmtree(out)
    return found


def main() -> None:
    torch.set_num_threads(1)
    disk, model, data, plain = map(Path, sys.argv[1:5])
    train(config(model, data, plain, STEPS), Console(io.StringIO()))
    for room in map(int, sys.argv[5:]):
        print(json.dumps(fill(disk, model, data, plain, room)), flush=True)


if __name__ == "__main__":
    main()
