from __future__ import annotations

import gc
import io
import random
from pathlib import Path

import pytest
import torch

from lorax_train.config import InjectionConfig, LoopConfig, OptimizerConfig
from lorax_train.console import Console, size
from lorax_train.data.batches import Share, Span, collate, plan_epoch, split
from lorax_train.data.encode import Example
from lorax_train.loop.estimate import MemoryEstimate, available_memory, estimate
from lorax_train.loop.loss import TargetLoss
from lorax_train.loop.training_run import TrainingRun, lr_factor
from lorax_train.model.base import choose_dtype, load_model
from lorax_train.model.inject import TrainableLoRA, inject
from lorax_train.report import show_memory

CPU = torch.device("cpu")


def rows_of(lengths: list[int]) -> list[Example]:
    return [
        Example((1,) * n, (False,) + (True,) * (n - 1), f"row {i}") for i, n in enumerate(lengths)
    ]


def test_an_epoch_has_every_row_once_in_batches_of_like_length() -> None:
    rng = random.Random(0)
    examples = rows_of([rng.randrange(2, 100) for _ in range(203)])
    steps = list(plan_epoch(examples, 4, 2, random.Random(1)))
    assert len(steps) == 26
    flat = [example.where for step in steps for batch in step for example in batch]
    assert sorted(flat) == sorted(example.where for example in examples)
    assert all(len(batch) <= 4 for step in steps for batch in step)
    padded = sum(len(b) * max(len(e.tokens) for e in b) for step in steps for b in step)
    assert padded < 1.1 * sum(len(example.tokens) for example in examples)
    again = list(plan_epoch(examples, 4, 2, random.Random(1)))
    assert again == steps
    assert list(plan_epoch(examples, 4, 2, random.Random(2))) != steps


def test_the_same_rows_share_a_step_however_it_is_cut() -> None:
    examples = rows_of(list(range(2, 34)))
    whole = list(plan_epoch(examples, 8, 1, random.Random(0)))
    halves = list(plan_epoch(examples, 4, 2, random.Random(0)))
    assert [step[0] for step in whole] == [first + second for first, second in halves]


def test_padding_is_neither_attended_to_nor_a_target() -> None:
    batch = collate(rows_of([2, 4]), pad_id=1, padded=True)
    assert batch.mask is not None
    assert batch.mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch.before.tolist() == [0, 4, 5, 6]
    assert (batch.n_tokens, batch.n_targets, batch.bounds) == (6, 4, None)


def test_rows_lie_one_after_another_each_adapters_together() -> None:
    rows = rows_of([2, 4, 3])
    batch = collate([Share(2, rows[:2], 0.5), Share(0, rows[2:], 0.25)], pad_id=1)
    assert (batch.mask, batch.bounds, batch.tokens.shape) == (None, (0, 2, 6, 9), (1, 9))
    assert batch.positions.tolist() == [[0, 1, 0, 1, 2, 3, 0, 1, 2]]
    assert batch.before.tolist() == [0, 2, 3, 4, 6, 7]
    assert batch.spans == (Span(2, 0, 6), Span(0, 6, 9))
    assert batch.target_spans == (Span(2, 0, 4), Span(0, 4, 6))
    assert batch.weights.tolist() == [0.5] * 4 + [0.25] * 2


def test_a_split_is_decided_by_the_seed() -> None:
    examples = rows_of([2] * 20)
    rest, held_out = split(examples, 0.1, seed=3)
    assert (len(rest), len(held_out)) == (18, 2)
    assert split(examples, 0.1, seed=3) == (rest, held_out)
    assert split(examples, 0.1, seed=4) != (rest, held_out)
    assert {e.where for e in rest} | {e.where for e in held_out} == {e.where for e in examples}
    assert [len(part) for part in split(examples[:2], 0.9, seed=0)] == [1, 1]


@pytest.mark.parametrize(
    ("schedule", "middle", "last"),
    [("cosine", 0.5, 0.004), ("linear", 0.5, 0.04), ("constant", 1, 1)],
)
def test_the_learning_rate_rises_then_follows_its_schedule(
    schedule: str, middle: float, last: float
) -> None:
    config = OptimizerConfig(schedule=schedule, warmup_ratio=0.5)  # type: ignore[arg-type]
    factors = [lr_factor(config, step, 48) for step in range(1, 49)]
    assert factors[:24] == [pytest.approx(step / 24) for step in range(1, 25)]
    assert factors[24] == 1
    assert factors[36] == pytest.approx(middle)
    assert factors[47] == pytest.approx(last, abs=0.003)
    assert lr_factor(config, 1, 1) == 1


def test_the_estimate_counts_weights_adapter_and_optimizer(llama: Path) -> None:
    model = load_model("tiny", llama, torch.float32, CPU)
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    adapter = inject(model, InjectionConfig(r=4), "tiny", seed=0)

    def run_of(adapter: TrainableLoRA, batch_size: int) -> TrainingRun:
        loop = LoopConfig(batch_size=batch_size)
        return TrainingRun(adapter, rows_of([10] * 8), [], OptimizerConfig(), loop)

    loss = TargetLoss(model, head_on_targets=True)
    need = estimate(model, [run_of(adapter, 4)], loss)
    assert need.weights == weights
    assert need.adapter == adapter.n_parameters * 12
    assert need.optimizer == adapter.n_parameters * 8
    assert need.logits == 4 * 9 * 264 * 8
    assert need.activations > 4 * 10 * 2 * 32 * 4  # at least the residual stream of each layer
    double = estimate(model, [run_of(adapter, 8)], loss)
    assert double.activations == pytest.approx(2 * need.activations, rel=0.01)
    whole = estimate(model, [run_of(adapter, 4)], TargetLoss(model))
    assert whole.logits == 4 * 10 * 264 * 20
    both = estimate(model, [run_of(adapter, 4), run_of(adapter, 8)], loss)
    assert both.optimizer == 2 * need.optimizer
    assert both.activations == pytest.approx(3 * need.activations, rel=0.01)
    shared = estimate(model, [run_of(adapter, 8)], loss, processes=2)
    assert shared.activations == pytest.approx(need.activations, rel=0.01)


def test_the_estimate_leaves_nothing_behind(llama: Path) -> None:
    model = load_model("tiny", llama, torch.float32, CPU)
    adapter = inject(model, InjectionConfig(r=4), "tiny", seed=0)
    run = TrainingRun(adapter, rows_of([10] * 8), [], OptimizerConfig(), LoopConfig())

    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())

    before = alive()
    estimate(model, [run], TargetLoss(model, head_on_targets=True))
    assert alive() == before


def test_too_little_memory_is_warned_of_with_what_to_change() -> None:
    need = MemoryEstimate(weights=100, adapter=1, optimizer=2, activations=3, logits=4)
    stream = io.StringIO()
    show_memory(Console(stream), need, 9)
    said = stream.getvalue()
    assert "need 1 B more memory than there is, and the system may kill it" in said
    stream = io.StringIO()
    show_memory(Console(stream), need, 10)
    show_memory(Console(stream), need, None)
    assert "warning" not in stream.getvalue()
    assert available_memory(CPU) != 0


def a_run(model: Path, loop: LoopConfig) -> TrainingRun:
    adapter = inject(load_model("tiny", model, torch.float32, CPU), InjectionConfig(), "tiny", 0)
    return TrainingRun(adapter, rows_of([3]), [], OptimizerConfig(lr=1e-4), loop)


def pretend_a_step(run: TrainingRun, step: int) -> None:
    record = run.record
    record.steps, record.tokens, record.seconds = step, 321 * step, float(step)
    record.recent.append((3.0, 2))


def test_progress_is_a_line_every_few_steps_without_a_terminal(llama: Path) -> None:
    stream = io.StringIO()
    console, run = Console(stream), a_run(llama, LoopConfig(max_steps=12, log_every=5))
    console.started([run])
    for step in range(1, 13):
        pretend_a_step(run, step)
        console.stepped([run])
    console.ended([run])
    lines = stream.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["1/12", "5/12", "10/12", "12/12"]
    assert lines[1].startswith("step 5/12  loss 1.500  lr 1.0e-04  321 tok/s")


def test_progress_is_a_bar_in_a_terminal(llama: Path) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    console, run = Console(stream), a_run(llama, LoopConfig(max_steps=2))
    console.started([run])
    pretend_a_step(run, 1)
    console.stepped([run])
    console.line("held-out loss 2")
    console.ended([run])
    assert "loss 1.500, lr 1.0e-04, 321 tok/s" in stream.getvalue()
    assert "held-out loss 2\n" in stream.getvalue()
    assert console.quiet("x") == "\x1b[2mx\x1b[22m"


def test_sizes_and_dtypes_for_people() -> None:
    assert [size(n) for n in (5, 1500, 2.5e6, 3.25e9)] == ["5 B", "1.5 kB", "2.5 MB", "3.25 GB"]
    assert choose_dtype("float32", CPU) is torch.float32
    assert choose_dtype("bfloat16", CPU) is torch.bfloat16
    assert choose_dtype("auto", CPU) in (torch.float32, torch.bfloat16)
