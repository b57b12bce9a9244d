"""A run that was cut off and goes on ends with the same bits as one that was not."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from lorax_serve.errors import TrainingError
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
from lorax_train.run import TrainResult, train, train_all

Rows = list[dict[str, Any]]
Configure = Callable[..., TrainConfig]
WriteRows = Callable[..., Path]
# Not the card, which tells times and memory.
FILES = ("adapter_config.json", "adapter_model.safetensors")


class Logging(Console):
    """Keeps each step's loss and gradient, and presses Ctrl-C after a step."""

    def __init__(self, stop_after: int | None = None) -> None:
        super().__init__(io.StringIO())
        self.steps: dict[tuple[str, int], tuple[float, float]] = {}
        self.stop_after = stop_after

    @property
    def text(self) -> str:
        assert isinstance(self.stream, io.StringIO)
        return self.stream.getvalue()

    def stepped(self, runs: Sequence[TrainingRun]) -> None:
        super().stepped(runs)
        for run in runs:
            self.steps[run.name, run.record.steps] = run.record.step_loss, run.gradient_norm
        if max(run.record.steps for run in runs) == self.stop_after:
            raise KeyboardInterrupt


def to(config: TrainConfig, directory: Path, **output: Any) -> TrainConfig:
    return dataclasses.replace(config, output=OutputConfig(directory, **output))


def files_of(result: TrainResult) -> list[bytes]:
    assert result.directory is not None
    return [(result.directory / name).read_bytes() for name in FILES]


LOOPS = {
    "plain": LoopConfig(max_steps=7, batch_size=4, save_every=2),
    "accumulation": LoopConfig(epochs=3, batch_size=3, grad_accumulation=2, save_every=1),
    "patience": LoopConfig(epochs=9, batch_size=6, eval_every=2, patience=2, save_every=3),
    "no checkpoints but at ctrl-c": LoopConfig(max_steps=5, batch_size=5, eval_every=2),
}


@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
@pytest.mark.parametrize("init", ["kaiming", "pissa"])
def test_what_goes_on_after_ctrl_c_has_the_same_bits(
    loop: LoopConfig,
    optimizer: str,
    init: str,
    llama: Path,
    configure: Configure,
    write_rows: WriteRows,
    pairs: Rows,
    tmp_path: Path,
) -> None:
    config = configure(
        llama,
        DataConfig(write_rows(pairs), eval_split=0.25),
        lora=InjectionConfig(r=2, dropout=0.1, init=init, dora=init == "pissa"),  # type: ignore[arg-type]
        optimizer=OptimizerConfig(name=optimizer, lr=0.03, weight_decay=0.1),  # type: ignore[arg-type]
        loop=loop,
    )
    whole = Logging()
    expected = train(to(config, tmp_path / "whole" / "same"), whole)
    out = tmp_path / "cut" / "same"
    steps: dict[tuple[str, int], tuple[float, float]] = {}
    for stop in (1, 4, None):
        console = Logging(stop)
        result = train(to(config, out, resume=True), console)
        assert not steps.keys() & console.steps.keys()
        steps |= console.steps
        assert result.record.interrupted == (stop is not None)
    assert steps == whole.steps
    assert result.record.evaluations == expected.record.evaluations
    assert result.record.recent == expected.record.recent
    assert files_of(result) == files_of(expected)
    again = Logging()
    assert files_of(train(to(config, out, resume=True), again)) == files_of(expected)
    assert not again.steps
    assert f"done already, after step {expected.record.steps}" in again.text


def test_adapters_trained_together_go_on_together(
    llama: Path, configure: Configure, write_rows: WriteRows, pairs: Rows, tmp_path: Path
) -> None:
    def configs(root: str, **output: Any) -> list[TrainConfig]:
        return [
            dataclasses.replace(
                configure(
                    llama,
                    DataConfig(write_rows(pairs), eval_split=0.25),
                    lora=InjectionConfig(r=rank, dropout=0.1),
                    loop=LoopConfig(
                        max_steps=steps, batch_size=rows, seed=rank, patience=1, eval_every=3
                    ),
                    output=OutputConfig(tmp_path / root / f"r{rank}", **output),
                    optimizer=OptimizerConfig(lr=lr),
                ),
                name=f"r{rank}",
            )
            for rank, steps, rows, lr in ((2, 3, 4, 0.01), (4, 8, 2, 0.02), (1, 8, 4, 10.0))
        ]

    whole = Logging()
    expected = train_all(configs("whole"), whole)
    assert [result.record.steps for result in expected] == [3, 8, 3]
    assert expected[2].record.stopped_early
    steps: dict[tuple[str, int], tuple[float, float]] = {}
    for stop in (2, 5, None):
        console = Logging(stop)
        results = train_all(configs("cut", resume=True), console)
        steps |= console.steps
    assert steps == whole.steps
    assert [files_of(each) for each in results] == [files_of(each) for each in expected]
    changed = configs("cut", resume=True)
    changed[1] = dataclasses.replace(changed[1], lora=InjectionConfig(r=3, dropout=0.1))
    with pytest.raises(TrainingError, match="r4: --r was 4 and is 3"):
        train_all(changed, Logging())
    with pytest.raises(TrainingError, match="there were 3 adapters and are 2"):
        train_all(configs("cut", resume=True)[:2], Logging())
