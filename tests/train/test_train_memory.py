"""Running out of memory: halved batches, the same losses; and what is known of it beforehand."""

from __future__ import annotations

import dataclasses
import io
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from lorax_serve.errors import TrainingError
from lorax_train.config import DataConfig, LoopConfig, OutputConfig, TrainConfig
from lorax_train.console import Console
from lorax_train.data.batches import Batch
from lorax_train.loop.estimate import MemoryEstimate, _free_of_container
from lorax_train.loop.loss import TargetLoss
from lorax_train.loop.training_run import TrainingRun
from lorax_train.report import show_memory
from lorax_train.run import TrainResult, train, train_all

Rows = list[dict[str, Any]]
ERRORS = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ..."),
]
Train = Callable[..., tuple[list[TrainResult], dict[tuple[str, int], float], str]]


class Losses(Console):
    def __init__(self, stop: int) -> None:
        self.losses: dict[tuple[str, int], float] = {}
        self.stop = stop
        super().__init__(io.StringIO())

    def stepped(self, runs: Sequence[TrainingRun]) -> None:
        for run in runs:
            self.losses[run.name, run.record.steps] = run.record.step_loss
        if runs[0].record.steps == self.stop:
            raise KeyboardInterrupt


@pytest.fixture
def learn(
    llama: Path, configure: Callable[..., TrainConfig], write_rows: Callable[..., Path], pairs: Rows
) -> Train:
    data = DataConfig(write_rows(pairs), eval_split=0.25)

    def learn_it(loops: Sequence[LoopConfig], stop: int = 0, **output: Any) -> Any:
        configs = []
        for i, loop in enumerate(loops):
            config = configure(llama, data, out=f"out-{i}", loop=loop)
            where = OutputConfig(config.output.directory, **{"overwrite": True} | output)
            configs.append(dataclasses.replace(config, output=where, name=f"adapter {i}"))
        console = Losses(stop)
        results = train_all(configs, console)
        assert isinstance(console.stream, io.StringIO)
        return results, console.losses, console.stream.getvalue()

    return learn_it


def limit(
    monkeypatch: pytest.MonkeyPatch, tokens: int, error: Exception, after: int = 0
) -> list[int]:
    """Have batches of more tokens fail in their backward pass; returns the sizes that did not."""
    real, seen, calls = TargetLoss.__call__, [], 0

    class Failing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *dy: Any) -> Any:
            raise error

    def call(self: TargetLoss, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal calls
        calls += 1
        total, each = real(self, batch)
        if batch.n_tokens > tokens and calls > after:
            if not torch.is_grad_enabled():
                raise error
            function: Any = Failing
            return function.apply(total), each
        seen.append(batch.n_tokens)
        return total, each

    monkeypatch.setattr(TargetLoss, "__call__", call)
    return seen


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("after", [0, 9])
def test_smaller_batches_give_the_same_losses(
    error: Exception, after: int, learn: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    loops = [LoopConfig(max_steps=5, batch_size=6, grad_accumulation=2, eval_every=2)]
    results, expected, said = learn(loops)
    assert "out of memory" not in said
    seen = limit(monkeypatch, 45, error, after)
    shrunk, losses, said = learn(loops)
    assert "out of memory; going on with batches of 3 rows" in said
    assert losses == pytest.approx(expected, rel=1e-4)
    assert shrunk[0].record.eval_losses == pytest.approx(results[0].record.eval_losses, rel=1e-4)
    assert max(seen[after + 1 :]) <= 45
    assert shrunk[0].record.tokens == results[0].record.tokens
    for name, tensor in results[0].adapter.tensors(torch.float32).items():
        theirs = shrunk[0].adapter.tensors(torch.float32)[name]
        torch.testing.assert_close(theirs, tensor, atol=2e-4, rtol=1e-3)


def test_adapters_together_shrink_together(learn: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    loops = [LoopConfig(max_steps=4, batch_size=4), LoopConfig(max_steps=3, batch_size=2, seed=1)]
    _, expected, _ = learn(loops)
    seen = limit(monkeypatch, 45, ERRORS[0])
    _, losses, said = learn(loops)
    assert said.count("going on with batches of") == 1
    assert losses == pytest.approx(expected, rel=1e-4)
    assert max(seen) <= 45


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_if_one_row_is_too_much_it_is_said_what_to_change(
    error: Exception, learn: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit(monkeypatch, 5, error)
    with pytest.raises(TrainingError, match="with a single row in a batch; lower --max-length"):
        learn([LoopConfig(max_steps=2, batch_size=3)])


def test_another_error_is_no_lack_of_memory(learn: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    limit(monkeypatch, 5, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        learn([LoopConfig(max_steps=2, batch_size=3)])


def test_a_run_goes_on_with_the_smaller_batches(
    learn: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    loops = [LoopConfig(max_steps=5, batch_size=6)]
    limit(monkeypatch, 45, ERRORS[0])
    _, expected, _ = learn(loops)
    _, before, said = learn(loops, stop=2, resume=True)
    assert "going on with batches of 3 rows" in said
    _, after, said = learn(loops, resume=True)
    assert "out of memory" not in said
    assert sorted(step for _, step in after) == [3, 4, 5]
    assert before | after == expected  # with the same bits


def test_the_optimizers_lack_of_memory_says_what_to_change(
    llama: Path,
    configure: Callable[..., TrainConfig],
    write_rows: Callable[..., Path],
    pairs: Rows,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(self: object, *rest: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(torch.optim.AdamW, "step", full)
    with pytest.raises(TrainingError, match="out of memory; lower --batch-size"):
        train(configure(llama, write_rows(pairs)), Console(io.StringIO()))


def test_that_a_process_would_be_killed_is_said_beforehand() -> None:
    need = MemoryEstimate(weights=100, adapter=1, optimizer=2, activations=3, logits=4)
    for device, killed in (("cpu", True), ("cuda", False)):
        stream = io.StringIO()
        show_memory(Console(stream), need, 9, device)
        assert "1 B more memory than there is" in stream.getvalue()
        assert ("the system may kill it without a word" in stream.getvalue()) == killed


def group(path: Path, limit: str, used: int, cache: int, v1: bool = False) -> None:
    path.mkdir(parents=True, exist_ok=True)
    names = ("limit_in_bytes", "usage_in_bytes") if v1 else ("max", "current")
    (path / f"memory.{names[0]}").write_text(f"{limit}\n")
    (path / f"memory.{names[1]}").write_text(f"{used}\n")
    (path / "memory.stat").write_text(f"anon 1\n{'total_' if v1 else ''}inactive_file {cache}\n")


def test_the_narrowest_limit_of_all_control_groups_counts(tmp_path: Path) -> None:
    root, own = tmp_path / "cgroup", tmp_path / "own"
    assert _free_of_container(root, own) is None
    own.write_text("0::/user.slice/job.scope\n")
    group(root / "user.slice", "1000", 600, 100)
    group(root / "user.slice" / "job.scope", "max", 10, 0)
    assert _free_of_container(root, own) == 500
    group(root / "user.slice" / "job.scope", "300", 200, 50)
    assert _free_of_container(root, own) == 150
    group(root / "user.slice" / "job.scope", "300", 400, 50)
    assert _free_of_container(root, own) == 0
    own.write_text("0::/not/seen/from/here\n")  # as in a container
    group(root, "70", 0, 0)
    assert _free_of_container(root, own) == 70


def test_control_groups_of_version_1_count_too(tmp_path: Path) -> None:
    root, own = tmp_path / "cgroup", tmp_path / "own"
    own.write_text("9:cpu:/x\n4:memory:/job\n0::/\n")
    group(root / "memory" / "job", "1000", 300, 50, v1=True)
    group(root / "memory", str((1 << 63) - 4096), 300, 50, v1=True)
    assert _free_of_container(root, own) == 750


@pytest.mark.slow
@pytest.mark.parametrize("sizes", ["4 128 4 256 0", "8 256 4 512 0", "8 256 4 512 0.1"])
def test_the_estimate_is_within_twice_of_what_is_used(sizes: str) -> None:
    command = [sys.executable, "-m", "tests.train.peak", *sizes.split()]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    estimated, used = map(int, said.split())
    assert 0.5 < used / estimated < 2
