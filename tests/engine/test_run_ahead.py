"""Steps that overlap: whatever ends, fails, waits or makes way meanwhile, a request's tokens are
those that it has alone, on a decoder that waits for each."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lorax_serve.core import PENDING, AdapterInfo, Batch, SamplingParams, StopReason, TokenOutput
from lorax_serve.engine.messages import Abort, DropAdapter, LoadAdapter, Submit
from tests.engine.test_engine import Local, prompt

ADAPTERS: list[dict[str, Any]] = [
    {"r": 4, "target_modules": "all-linear"},
    {"r": 8, "target_modules": ["q_proj", "k_proj", "v_proj"]},
    {"r": 20, "target_modules": ["up_proj", "down_proj"], "use_rslora": True},
    {"r": 2, "target_modules": ["o_proj"], "modules_to_save": ["norm"]},
]
REQUESTS = 32
LIMITS: dict[str, Any] = {"max_sequence_length": 128}


@dataclass(frozen=True)
class Wanted:
    tokens: tuple[int, ...]
    adapter: int | None
    sampling: SamplingParams
    new: int
    least: int
    ends: frozenset[int]
    priority: int

    def submit(self, local: Local, request_id: int) -> None:
        local.outputs[request_id] = []
        local.engine.handle(
            Submit(
                request_id,
                self.tokens,
                self.adapter,
                self.sampling,
                self.new,
                self.least,
                self.ends,
                priority=self.priority,
            )
        )


def wanted(chance: random.Random, seed: int) -> Wanted:
    start = prompt(70, 0)[: chance.choice([0, 0, 33, 64, 70])]
    return Wanted(
        tokens=(*start, *prompt(chance.randint(1, 30), seed)),
        adapter=chance.choice([None, 1, 2, 3, 4]),
        sampling=SamplingParams(
            repetition_penalty=chance.choice([1.0, 1.0, 1.0, 1.3]),
            temperature=chance.choice([0.0, 0.0, 0.7]),
            # Above 0, the two samplers draw from what a top-k leaves in another order.
            top_k=chance.choice([0, 0, 1]),
            top_p=chance.choice([1.0, 0.9]),
            seed=seed,
            logprobs=chance.choice([None, None, 0, 3]),
        ),
        new=chance.choice([1, 2, 10, 30, 60]),
        least=chance.choice([0, 1]),
        # One of eight tokens ends it.
        ends=frozenset(chance.sample(range(3, 128), 16)) if chance.random() < 0.5 else frozenset(),
        priority=chance.choice([0, 0, 1]),
    )


class Broken:
    """What a launch gives whose results do not come."""

    def __init__(self, launched: Any) -> None:
        self.sequences = launched.sequences

    def samples(self) -> None:
        raise RuntimeError("no results")


def break_some(local: Local, chance: random.Random, share: float) -> None:
    """Let some steps fail: before they are computed, after, or when their results are awaited."""
    steps: Any = local.runner._steps
    launch = steps.launch

    def fragile(batch: Batch) -> Any:
        fault = chance.choice(["before", "after", "late"]) if chance.random() < share else ""
        if fault == "before":
            raise RuntimeError(fault)
        launched = launch(batch)
        if fault == "after":
            raise RuntimeError(fault)
        return Broken(launched) if fault == "late" else launched

    steps.launch = fragile


def load(local: Local, directories: list[Path]) -> int:
    """Load all; the bytes of the largest."""
    most = 0
    for version, directory in enumerate(directories, start=1):
        local.engine.handle(LoadAdapter(version, version, str(directory)))
        local.engine.handle(local.inbox.get(timeout=60))
        (reply,) = local.report()
        assert reply.error is None
        assert isinstance(reply.value, AdapterInfo)
        most = max(most, reply.value.nbytes)
    return most


def same(got: list[TokenOutput], expected: list[TokenOutput]) -> None:
    assert [o.token_id for o in got] == [o.token_id for o in expected]
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.stop_reason is theirs.stop_reason
        assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-3)
        assert len(mine.top_logprobs) == len(theirs.top_logprobs)


@pytest.mark.parametrize(("seed", "faults"), [(0, 0.0), (2, 0.03)])
def test_a_request_has_the_tokens_that_it_has_alone(
    tiny_model: Path, make_adapter: Callable[..., Path], seed: int, faults: float
) -> None:
    chance = random.Random(seed)
    directories = [make_adapter(f"a{n}", n, **config) for n, config in enumerate(ADAPTERS)]
    requests = {n: wanted(chance, 1000 * seed + n) for n in range(REQUESTS)}
    alone = Local(tiny_model, kernels="torch", prefix_caching=False, **LIMITS)
    load(alone, directories)
    for request_id, request in requests.items():
        request.submit(alone, request_id)
        alone.run()
    size = load(Local(tiny_model, kernels="paged", **LIMITS), directories)
    local = Local(
        tiny_model,
        kernels="paged",
        max_batch_size=6,
        max_batch_tokens=48,
        kv_cache_tokens=160,
        adapter_slots=2,
        adapter_quantum=20,
        max_adapter_bytes=3 * size // 2,
        **LIMITS,
    )
    load(local, directories)
    break_some(local, chance, faults)
    waiting, flights = list(requests.items()), 0
    aborted: set[int] = set()
    while True:
        if waiting and chance.random() < 0.3:
            for request_id, request in waiting[: chance.randint(1, 6)]:
                request.submit(local, request_id)
                del waiting[0]
        open_ones = [n for n, outputs in local.outputs.items() if not ended(outputs)]
        if open_ones and chance.random() < 0.03:
            aborted.add(chance.choice(open_ones))
            for request_id in aborted:  # whether it runs, waits or has gone
                local.engine.handle(Abort(request_id))
        while not local.inbox.empty():
            local.engine.handle(local.inbox.get())
        if local.engine.busy:
            local.step()
            flights += local.engine._flight is not None
        elif set(open_ones) - aborted:
            local.engine.handle(local.inbox.get(timeout=60))  # all wait for what is being read
        elif not waiting:
            break
    failed = 0
    for request_id, expected in alone.outputs.items():
        got = local.outputs[request_id]
        assert all(output.token_id != PENDING for output in got)
        if got and got[-1].stop_reason is StopReason.ERROR:
            assert faults
            assert got[-1].error.startswith("the step failed: RuntimeError: ")
            failed += 1
            same(got[:-1], expected[: len(got) - 1])
        elif request_id in aborted and not ended(got):
            same(got, expected[: len(got)])
        else:
            same(got, expected)
    assert flights > 100
    assert (failed > 0) == (faults > 0)
    assert faults or local.stats.preemptions > 0
    assert local.stats.adapters.device_evictions > 4
    assert local.stats.adapters.reads > 4
    for version in range(1, len(ADAPTERS) + 1):
        local.engine.handle(DropAdapter(version, version))
    assert all(reply.error is None for reply in local.report())
    assert local.engine.check_integrity() == ()


def ended(outputs: list[TokenOutput]) -> bool:
    return bool(outputs) and outputs[-1].stop_reason is not StopReason.NOT_FINISHED
