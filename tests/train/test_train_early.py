"""When a run ends before its last step, and whose weights it leaves."""

from __future__ import annotations

import io
import math
import os
import signal
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from lorax_serve.adapter import read
from lorax_serve.errors import TrainingError
from lorax_train.config import (
    DataConfig,
    InjectionConfig,
    LoopConfig,
    OptimizerConfig,
    TrainConfig,
)
from lorax_train.console import Console
from lorax_train.data.encode import Example
from lorax_train.interrupts import interrupts_held, terminations_interrupt
from lorax_train.loop.training_run import TrainingRun
from lorax_train.model.base import load_model
from lorax_train.model.inject import inject
from lorax_train.run import TrainResult, train

Rows = list[dict[str, Any]]
Learn = Callable[..., tuple[TrainResult, str]]


@pytest.fixture
def new_run(llama: Path) -> Callable[..., TrainingRun]:
    """``new_run(**loop)``: a run of twelve steps whose model is not looked at."""
    model = load_model("tiny", llama, torch.float32, torch.device("cpu"))
    adapter = inject(model, InjectionConfig(r=1, targets="q_proj"), "tiny", seed=0)
    row = Example((1, 2), (False, True), "row")

    def make(**loop: Any) -> TrainingRun:
        return TrainingRun(
            adapter, [row] * 4, [row], OptimizerConfig(), LoopConfig(max_steps=12, **loop), "mine"
        )

    return make


def evaluate(run: TrainingRun, losses: Sequence[float]) -> int:
    """The number of evaluations, one before training and one a step, until the run is done."""
    for step, loss in enumerate(losses):
        run.record.steps = step
        for parameter in run.parameters:
            parameter.data.fill_(step)
        run.evaluated(loss)
        if run.done:
            return step
    return len(losses)


@pytest.mark.parametrize(
    ("patience", "losses", "stops"),
    [
        (1, [5, 4, 3, 3], 3),  # as low is not lower
        (1, [5, 6], 1),  # the loss before training is one that must be gone below
        (2, [5, 4, 4.5, 3, 3.5, 3.2], 5),
        (2, [5, 4, 4.5, 3.9, 4, 3.8], 6),  # a lower one in time
        (2, [5, 4, 6, 4], 3),
        (3, [5, 6, 7, 8], 3),
        (3, [5, 6, 7, 4, 4, 4, 4], 6),
        (None, [5, 6, 7, 8, 9], 5),
    ],
)
def test_patience_is_the_number_of_evaluations_without_a_lower_loss(
    patience: int | None, losses: list[float], stops: int, new_run: Callable[..., TrainingRun]
) -> None:
    run = new_run(patience=patience)
    assert evaluate(run, losses) == stops
    assert run.record.stopped_early == (stops < len(losses))


def test_a_run_that_is_at_its_end_has_not_stopped_early(
    new_run: Callable[..., TrainingRun],
) -> None:
    run = new_run(patience=1)
    evaluate(run, [5])
    run.record.steps = 12
    run.evaluated(6)
    assert run.done
    assert not run.record.stopped_early


@pytest.mark.parametrize(
    ("losses", "best"),
    [
        ([5, 4, 3, 3.5], 2),
        ([5, 4, 3, 3], 2),  # the first of equals
        ([5, 6, 7], 1),  # not the adapter that does nothing
        ([5], None),
        ([5, 4, 3], 2),
    ],
)
def test_the_best_of_training_is_taken(
    losses: list[float], best: int | None, new_run: Callable[..., TrainingRun]
) -> None:
    run = new_run()
    evaluate(run, losses)
    assert run.kept is not None
    assert run.kept.step == (best or 0)
    latest = len(losses) - 1
    run.take_best()
    for parameter in run.parameters:
        assert (parameter == (latest if best is None else best)).all()


def test_the_last_can_be_kept_instead(new_run: Callable[..., TrainingRun]) -> None:
    run = new_run(keep_best=False)
    evaluate(run, [5, 3, 4])
    run.take_best()
    assert run.kept is not None
    assert run.kept.step == 2
    assert all((parameter == 2).all() for parameter in run.parameters)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_held_out_loss_that_is_no_number_ends_the_run(
    loss: float, new_run: Callable[..., TrainingRun]
) -> None:
    run = new_run()
    evaluate(run, [5, 4])
    with pytest.raises(TrainingError, match="step 1: the held-out loss of mine is not a finite nu"):
        run.evaluated(loss)


@pytest.fixture
def learn(
    llama: Path, configure: Callable[..., TrainConfig], write_rows: Callable[..., Path], pairs: Rows
) -> Learn:
    data = DataConfig(write_rows(pairs), eval_split=0.25)

    class Stopping(Console):
        stop = 0

        def stepped(self, runs: Sequence[TrainingRun]) -> None:
            super().stepped(runs)
            if runs[0].record.steps == self.stop:
                runs[0].best = None  # what there is is what is saved
                raise KeyboardInterrupt

    def learn_it(lr: float, out: str, stop: int = 0, **loop: Any) -> tuple[TrainResult, str]:
        console = Stopping(io.StringIO())
        console.stop = stop
        config = configure(llama, data, out=out, lr=lr, loop=LoopConfig(batch_size=4, **loop))
        result = train(config, console)
        assert isinstance(console.stream, io.StringIO)
        return result, console.stream.getvalue()

    return learn_it


def test_a_run_that_overfits_stops_and_saves_its_best(learn: Learn) -> None:
    result, said = learn(0.1, "early", max_steps=60, eval_every=1, patience=4)
    record = result.record
    losses = record.eval_losses
    best = 1 + losses[1:].index(min(losses[1:]))
    assert record.stopped_early
    assert record.steps == best + 4 < 60
    assert f"stopped after step {record.steps}: the held-out loss has not fallen in 4 ev" in said
    assert result.directory is not None
    saved = read(result.directory).tensors
    best_of_all, _ = learn(0.1, "best", max_steps=60, eval_every=1, patience=4, stop=best)
    for name, tensor in best_of_all.adapter.tensors(torch.float32).items():
        assert torch.equal(saved[name], tensor)


def test_ctrl_c_waits_for_what_must_happen_as_a_whole() -> None:
    done = []

    def work() -> None:
        with interrupts_held():
            os.kill(os.getpid(), signal.SIGINT)
            done.append("all of it")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == ["all of it"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with pytest.raises(ValueError, match="mine"), interrupts_held():
        raise ValueError("mine")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_sigterm_acts_as_ctrl_c_where_it_is_asked_for() -> None:
    done = []

    def work() -> None:
        with terminations_interrupt(), interrupts_held():
            os.kill(os.getpid(), signal.SIGTERM)
            done.append("all of it")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == ["all of it"]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_interrupts_are_left_alone_in_other_threads() -> None:
    seen = []

    def work() -> None:
        with interrupts_held():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]


def test_ctrl_c_amid_an_update_leaves_a_whole_step(
    learn: Learn, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = learn(0.01, "whole", max_steps=2, keep_best=False)
    real, calls = torch.optim.AdamW.step, 0

    def step(self: Any, *rest: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, *rest)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    result, said = learn(0.01, "cut", max_steps=9, keep_best=False)
    assert result.record.interrupted
    assert result.record.steps == 2
    assert "checkpoint of step 2; --resume goes on from it" in said
    assert whole.record.steps == 2
    assert result.record.recent[0] == whole.record.recent[0]
