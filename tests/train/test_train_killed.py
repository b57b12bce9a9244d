"""SIGKILL at any moment costs no more than the steps since the last checkpoint."""

from __future__ import annotations

import dataclasses
import json
import pickle
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorax_train.config import (
    DataConfig,
    InjectionConfig,
    LoopConfig,
    OptimizerConfig,
    OutputConfig,
    TrainConfig,
)

Rows = list[dict[str, Any]]
# Not the card, which tells times and memory.
FILES = ("adapter_config.json", "adapter_model.safetensors")
RECORDS = ("README.md", "log.jsonl", "loss.png", "report.html")
NEVER = 1 << 30
MOMENTS = range(1, 320, 11)


def run_all(
    jobs: list[tuple[list[TrainConfig], int]], tmp_path: Path
) -> list[tuple[bool, dict[Any, Any]]]:
    """Whether each training was killed, and what it said of its steps."""
    (tmp_path / "jobs").write_bytes(pickle.dumps(jobs))
    done = subprocess.run(
        [sys.executable, "-m", "tests.train.killing", str(tmp_path / "jobs")],
        capture_output=True,
        text=True,
        check=False,
    )
    found: list[tuple[bool, dict[Any, Any]]] = []
    said: dict[Any, Any] = {}
    for name, step, *rest in map(json.loads, done.stdout.splitlines()):
        if name != "end":
            said[name, step] = rest
            continue
        assert rest[0] in (0, -signal.SIGKILL), done.stderr
        found.append((step == signal.SIGKILL, said))
        said = {}
    assert len(found) == len(jobs), done.stderr
    return found


def both(
    llama: Path, data: Path, configure: Callable[..., TrainConfig], root: Path
) -> list[TrainConfig]:
    """Two adapters of unlike optimizers, one with early stopping, both with dropout."""
    parts = [
        (OptimizerConfig("adamw", lr=0.02), LoopConfig(max_steps=7, batch_size=4, save_every=1)),
        (
            OptimizerConfig("adam", lr=1.0, weight_decay=0.01),
            LoopConfig(
                epochs=3, batch_size=2, grad_accumulation=2, patience=1, eval_every=2, seed=5
            ),
        ),
    ]
    return [
        dataclasses.replace(
            configure(
                llama,
                DataConfig(data, eval_split=0.25),
                lora=InjectionConfig(r=2, dropout=0.1),
                optimizer=optimizer,
                loop=loop,
                output=OutputConfig(root / f"adapter-{i}", resume=True),
            ),
            name=f"adapter-{i}",
        )
        for i, (optimizer, loop) in enumerate(parts)
    ]


Both = Callable[[Path], list[TrainConfig]]


@pytest.fixture
def both_in(
    llama: Path,
    configure: Callable[..., TrainConfig],
    write_rows: Callable[..., Path],
    pairs: Rows,
) -> Both:
    data = write_rows(pairs)
    return lambda root: both(llama, data, configure, root)


def files_of(configs: list[TrainConfig]) -> list[bytes]:
    return [(each.output.directory / name).read_bytes() for each in configs for name in FILES]


def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits(
    both_in: Both, tmp_path: Path
) -> None:
    draw = random.Random(1)
    whole, cut = both_in(tmp_path / "whole"), both_in(tmp_path / "cut")
    kills = [draw.randrange(20, 90) for _ in range(4)]
    jobs = [(whole, NEVER), *((cut, at) for at in kills), (cut, NEVER)]
    (_, expected), *attempts = run_all(jobs, tmp_path)
    assert [killed for killed, _ in attempts] == [True] * 4 + [False]
    found: dict[Any, Any] = {}
    for _, said in attempts:
        assert said.items() <= expected.items()  # those of steps that were made twice, too
        found |= said
    assert found == expected
    assert files_of(cut) == files_of(whole)
    checkpoints = cut[0].output.directory / "checkpoints"
    left = sorted(path.name for path in checkpoints.parent.iterdir())
    assert left == sorted((*FILES, *RECORDS, "checkpoints"))
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-6", "step-7"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_run_that_is_killed_at_moments_all_along_ends_with_the_same_bits(
    both_in: Both, tmp_path: Path
) -> None:
    whole = both_in(tmp_path / "whole")
    cut = [both_in(tmp_path / f"cut-{at}") for at in MOMENTS]
    jobs = [(whole, NEVER)]
    for at, each in zip(MOMENTS, cut, strict=True):
        jobs += [(each, at), (each, NEVER)]
    (_, expected), *attempts = run_all(jobs, tmp_path)
    for each, first, second in zip(cut, attempts[::2], attempts[1::2], strict=True):
        assert first[1] | second[1] == expected or not first[0]
        assert files_of(each) == files_of(whole)
        # No more is done again than the step and the evaluations since the last checkpoint.
        assert len({step for _, step in first[1].keys() & second[1].keys() if step > 0}) <= 1
    assert attempts[0][0]
    assert not attempts[-2][0], "there are more moments"
