"""Many adapters trained at once learn what each of them learns alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import PreTrainedModel

from lorax_train.config import InjectionConfig, LoopConfig, OptimizerConfig
from lorax_train.data.encode import Example
from lorax_train.loop.loss import TargetLoss, cross_entropy
from lorax_train.loop.trainer import Trainer
from lorax_train.loop.training_run import TrainingRun
from lorax_train.model.base import load_model
from lorax_train.model.checkpointing import checkpoint_layers
from lorax_train.model.inject import inject_all

CPU = torch.device("cpu")
Tensors = dict[str, torch.Tensor]


class Plan(NamedTuple):
    """What one adapter is told."""

    lora: InjectionConfig
    optimizer: OptimizerConfig
    loop: LoopConfig
    held_out: int = 0


def rows(seed: int, count: int) -> list[Example]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 24, (count,), generator=generator).tolist()
    return [
        Example(
            tuple(torch.randint(3, 250, (n,), generator=generator).tolist()),
            (False, False, *[True] * (n - 2)),
            f"row {n}",
        )
        for n in lengths
    ]


def train_together(
    directory: Path, plans: Sequence[Plan], *, checkpointing: bool = False
) -> tuple[PreTrainedModel, list[TrainingRun]]:
    model = load_model("tiny", directory, torch.float32, CPU)
    data = [rows(plan.loop.seed, 11) for plan in plans]
    held_out = [rows(100 + plan.loop.seed, plan.held_out) for plan in plans]
    loss = TargetLoss.prepare(model, data[0][0])
    seeds = [plan.loop.seed for plan in plans]
    adapters = inject_all(model, [plan.lora for plan in plans], "tiny", seeds)
    loss.routing = adapters[0].routing
    if checkpointing:
        assert checkpoint_layers(model, loss.routing) == 2
    runs = [
        TrainingRun(adapter, examples, others, plan.optimizer, plan.loop)
        for adapter, examples, others, plan in zip(adapters, data, held_out, plans, strict=True)
    ]
    Trainer(loss, runs, pad_id=0).train()
    return model, runs


def plan(
    seed: int,
    *,
    lr: float = 1e-2,
    schedule: str = "cosine",
    held_out: int = 0,
    loop: dict[str, Any] | None = None,
    optimizer: dict[str, Any] | None = None,
    **lora: Any,
) -> Plan:
    return Plan(
        InjectionConfig(**{"r": 4} | lora),
        OptimizerConfig(lr=lr, schedule=schedule, **optimizer or {}),  # type: ignore[arg-type]
        LoopConfig(**{"max_steps": 5, "batch_size": 3, "seed": seed} | (loop or {})),
        held_out,
    )


MIXED = [
    plan(1),
    plan(2, r=2, targets="q_proj,down_proj", lr=3e-3, schedule="constant", dropout=0.3),
    plan(3, r=3, dora=True, rslora=True, dropout=0.1, loop={"max_steps": 8, "batch_size": 2}),
    plan(4, init="pissa", targets="qkv", loop={"grad_accumulation": 2}),
    plan(5, targets="lm_head,embed_tokens,v_proj", schedule="linear", loop={"max_steps": 2}),
    plan(
        6,
        lr=1.0,  # it gets worse, so that it is stopped and its start is kept
        held_out=5,
        loop={"max_steps": 9, "eval_every": 1, "patience": 2},
        optimizer={"name": "adam", "max_grad_norm": 0.0},
    ),
    plan(7, layers=(1,), optimizer={"loraplus_ratio": 8.0}, held_out=4, loop={"keep_best": False}),
]
ON_GPT2 = [
    plan(1, targets="wte,c_fc", r=3),
    plan(2, dora=True, dropout=0.2, loop={"max_steps": 3, "batch_size": 2}),
    plan(3, init="pissa", targets="qkv", rslora=True),
]


@pytest.mark.parametrize(
    ("base", "plans"),
    [("llama", MIXED), ("gpt2", ON_GPT2), ("gemma2", MIXED[:4])],
    indirect=["base"],
)
def test_each_of_many_learns_what_it_learns_alone(base: Path, plans: list[Plan]) -> None:
    _, together = train_together(base, plans)
    for each, run in zip(plans, together, strict=True):
        _, (alone,) = train_together(base, [each])
        assert run.record.steps == alone.record.steps
        assert run.record.stopped_early == alone.record.stopped_early
        assert run.record.train_loss == pytest.approx(alone.record.train_loss, rel=1e-4)
        assert run.record.eval_losses == pytest.approx(alone.record.eval_losses, rel=1e-4)
        theirs = alone.adapter.tensors(torch.float32)
        ours = run.adapter.tensors(torch.float32)
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[name], atol=2e-4, rtol=1e-3)


def test_one_that_diverges_is_given_up_and_the_others_learn_what_they_would(llama: Path) -> None:
    plans = [
        MIXED[0],
        plan(2, lr=1e30, held_out=3),
        plan(3, lr=1e30, held_out=3, loop={"eval_every": 1}),  # may be seen in its evaluation first
        MIXED[2],
    ]
    _, together = train_together(llama, plans)
    for each, run in zip(plans, together, strict=True):
        if each.optimizer.lr == 1e30:
            assert "not a finite number" in run.record.failure
            assert run.record.steps < run.total_steps
            continue
        assert not run.record.failure
        _, (alone,) = train_together(llama, [each])
        theirs = alone.adapter.tensors(torch.float32)
        for name, tensor in run.adapter.tensors(torch.float32).items():
            torch.testing.assert_close(tensor, theirs[name], atol=2e-4, rtol=1e-3)


def test_early_stop_ends_one_run_and_the_best_weights_are_kept(llama: Path) -> None:
    _, (stopped, other) = train_together(llama, [MIXED[5], MIXED[0]])
    record = stopped.record
    assert record.stopped_early
    assert record.steps < 9
    assert other.record.steps == 5
    assert stopped.kept == min(record.evaluations, key=lambda each: each.loss)
    last = record.evaluations[-1]
    assert stopped.kept is not None
    assert last.loss > stopped.kept.loss
    _, (again,) = train_together(
        llama, [MIXED[5]._replace(loop=dataclasses.replace(MIXED[5].loop, keep_best=False))]
    )
    assert again.kept == last


@pytest.mark.parametrize("base", ["llama", "gpt2", "gemma2"], indirect=True)
def test_layers_computed_again_give_the_same_training(base: Path) -> None:
    plans = [
        plan(1, dropout=0.4),
        plan(2, dora=True, r=2, dropout=0.1),
        plan(3, init="pissa", loop={"max_steps": 3}),
    ]
    _, plain = train_together(base, plans)
    _, again = train_together(base, plans, checkpointing=True)
    for one, other in zip(plain, again, strict=True):
        theirs = one.adapter.tensors(torch.float32)
        for name, tensor in other.adapter.tensors(torch.float32).items():
            torch.testing.assert_close(tensor, theirs[name], atol=1e-6, rtol=1e-5)


def test_checkpointing_keeps_less_for_the_gradient(llama: Path) -> None:
    kept = []
    for checkpointing in (False, True):
        model = load_model("tiny", llama, torch.float32, CPU)
        loss = TargetLoss.prepare(model, rows(1, 1)[0])
        (adapter,) = inject_all(model, [InjectionConfig(r=2)], "tiny", [0])
        loss.routing = adapter.routing
        if checkpointing:
            checkpoint_layers(model, loss.routing)
        storages: dict[int, torch.UntypedStorage] = {}

        def pack(tensor: torch.Tensor, kept: Any = storages) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            hidden = loss.hidden(loss.collate(rows(1, 8), 0))
        assert hidden is not None
        kept.append(sum(storage.nbytes() for storage in storages.values()))
    assert kept[1] < kept[0] / 3


def test_every_target_of_a_step_weighs_the_same_in_whichever_batch_it_is(llama: Path) -> None:
    long = Example(tuple(range(3, 23)), (False, *[True] * 19), "long")
    short = Example((30, 31, 32), (False, False, True), "short")
    gradients = []
    for size, times in ((2, 1), (1, 2)):
        model = load_model("tiny", llama, torch.float32, CPU)
        loss = TargetLoss.prepare(model, long)
        (adapter,) = inject_all(model, [InjectionConfig(r=2)], "tiny", [0])
        loss.routing = adapter.routing
        seen: list[torch.Tensor] = []

        class Seeing(TrainingRun):
            def update(self, loss: float, n_targets: int, n_tokens: int, seconds: float) -> None:
                assert (n_targets, n_tokens) == (20, 23)
                seen.extend(p.grad for p in self.parameters if p.grad is not None)  # noqa: B023
                seen[:] = [grad.clone() for grad in seen]  # noqa: B023
                super().update(loss, n_targets, n_tokens, seconds)

        loop = LoopConfig(max_steps=1, batch_size=size, grad_accumulation=times)
        run = Seeing(adapter, [long, short], [], OptimizerConfig(), loop)
        Trainer(loss, [run], pad_id=0).train()
        gradients.append(seen)
    assert len(gradients[0]) == len(gradients[1]) == 28
    for whole, halves in zip(*gradients, strict=True):
        torch.testing.assert_close(halves, whole, atol=1e-6, rtol=1e-4)


def test_loraplus_gives_b_a_higher_rate_than_a(llama: Path) -> None:
    _, (run,) = train_together(
        llama, [plan(1, optimizer={"loraplus_ratio": 16.0, "warmup_ratio": 0.0}, dora=True)]
    )
    a, rest = run.optimizer.param_groups
    assert {id(p) for p in a["params"]} == {id(pair.a) for pair in run.adapter.pairs().values()}
    assert len(rest["params"]) == 2 * len(a["params"])  # B and the magnitudes
    assert rest["lr"] == 16 * a["lr"] > 0


def test_another_loss_is_given_the_targets_logits_with_a_frozen_and_a_trained_head(
    llama: Path,
) -> None:
    def smoothed(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        loss = torch.nn.functional.cross_entropy(
            logits, labels, reduction="none", label_smoothing=0.1
        )
        assert isinstance(loss, torch.Tensor)
        return loss

    for targets in ("q_proj", "lm_head"):
        model = load_model("tiny", llama, torch.float32, CPU)
        examples = rows(1, 5)
        plain = TargetLoss.prepare(model, examples[0])
        (adapter,) = inject_all(model, [InjectionConfig(r=2, targets=targets)], "tiny", [0])
        own = TargetLoss(
            model,
            adapter.routing,
            padded=plain.padded,
            head_on_targets=True,
            function=smoothed,
        )
        batch = own.collate(examples, 0)
        total, each = own(batch)
        total.backward()  # type: ignore[no-untyped-call]
        logits = own.logits(batch)
        torch.testing.assert_close(each, smoothed(logits, batch.labels))
        assert not torch.allclose(each, cross_entropy(logits, batch.labels))
        assert all(p.grad is not None for p in adapter.parameters())
