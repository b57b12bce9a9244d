"""A real engine with more adapters than memory: same tokens, bounded bytes, files that change."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from lorax_serve import adapter as leaf
from lorax_serve.config import EngineConfig
from lorax_serve.core import (
    AdapterInfo,
    EngineStats,
    Freed,
    Part,
    SamplingParams,
    StopReason,
    TokenOutput,
)
from lorax_serve.engine.adapter_loader import AdapterLoader, Load, LoadFinished
from lorax_serve.engine.engine import Engine
from lorax_serve.engine.messages import DropAdapter, LoadAdapter, Reply, Submit
from lorax_serve.errors import InvalidRequest, Overloaded
from lorax_serve.model.runner import ModelRunner

RANKS = (2, 4, 3, 4, 1, 4)
PROMPT = (5, 9, 11, 40, 3)


class InProcess:
    """An engine in this thread, pumped until what is asked for has come."""

    def __init__(self, model: Path, **config: Any) -> None:
        self.inbox: queue.SimpleQueue[object] = queue.SimpleQueue()
        sizes = {"max_batch_size": 4, "max_sequence_length": 64}
        settings = EngineConfig(model=str(model), dtype="float32", **{**sizes, **config})
        self.runner = ModelRunner(settings)
        self.loader = AdapterLoader(
            self.runner.modules,
            self.runner.fold,
            self.runner.without_copies,
            self.inbox.put,
            probe="refuse",
            fingerprint=self.runner.fingerprint,
        )
        self.engine = Engine(settings, self.runner, self.loader)
        self.tokens: dict[int, list[int]] = {}
        self.ended: dict[int, TokenOutput] = {}
        self.replies: dict[int, Reply] = {}
        self.stats = EngineStats()
        self.most_bytes = 0
        self._ids = 0

    def load(self, version: int, path: Path) -> AdapterInfo:
        info = self._ask(lambda call: LoadAdapter(call, version, str(path)))
        assert isinstance(info, AdapterInfo)
        return info

    def compose(self, version: int, *parts: tuple[Path, float]) -> AdapterInfo:
        """Of adapters that need not be loaded: the engine reads their files."""
        given = tuple(Part(p.name, str(p), leaf.read(p).digest, scale) for p, scale in parts)
        info = self._ask(lambda call: LoadAdapter(call, version, "a composition", given))
        assert isinstance(info, AdapterInfo)
        return info

    def drop(self, version: int) -> int:
        freed = self._ask(lambda call: DropAdapter(call, version))
        assert isinstance(freed, Freed)
        return freed.host

    def submit(self, version: int | None, new: int = 6, prompt: tuple[int, ...] = PROMPT) -> int:
        self._ids += 1
        self.tokens[self._ids] = []
        self.inbox.put(Submit(self._ids, prompt, version, SamplingParams(), new, new, frozenset()))
        return self._ids

    def finish(self, requests: Sequence[int]) -> list[list[int]]:
        self._pump(lambda: all(request in self.ended for request in requests))
        return [self.tokens[request] for request in requests]

    def generate(self, versions: Sequence[int | None]) -> list[list[int]]:
        """The tokens of one request of each version, all at once; none may fail."""
        requests = [self.submit(version) for version in versions]
        tokens = self.finish(requests)
        assert all(self.ended[r].stop_reason is StopReason.MAX_TOKENS for r in requests)
        return tokens

    def _ask(self, command: Callable[[int], object]) -> object:
        self._ids += 1
        call = self._ids
        self.inbox.put(command(call))
        self._pump(lambda: call in self.replies)
        reply = self.replies[call]
        if reply.error is not None:
            raise reply.error
        return reply.value

    def _pump(self, done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not done():
            assert time.monotonic() < deadline, "nothing happens any more"
            wait = not self.engine.busy
            while wait or not self.inbox.empty():
                self.engine.handle(self.inbox.get(timeout=30))  # type: ignore[arg-type]
                wait = False
            if self.engine.busy:
                self.engine.step()
            assert self.engine.check_integrity() == ()
            report = self.engine.take_report()
            self.stats = report.stats
            self.most_bytes = max(self.most_bytes, report.stats.adapters.host_bytes)
            self.replies.update({reply.call_id: reply for reply in report.replies})
            for output in report.tokens:
                if output.token_id is not None:
                    self.tokens[output.request_id].append(output.token_id)
                if output.stop_reason is not StopReason.NOT_FINISHED:
                    self.ended[output.request_id] = output


@pytest.fixture
def adapters(make_adapter: Callable[..., Path]) -> list[Path]:
    """Six adapters of different ranks and sizes."""
    return [
        make_adapter(f"a{n}", n, r=rank, target_modules="all-linear")
        for n, rank in enumerate(RANKS, 1)
    ]


@pytest.fixture
def sizes(tiny_model: Path, adapters: list[Path]) -> list[int]:
    """What each of them takes."""
    large = InProcess(tiny_model)
    return [large.load(version, path).nbytes for version, path in enumerate(adapters, 1)]


def test_more_adapters_than_memory_give_the_same_tokens(
    tiny_model: Path, adapters: list[Path], sizes: list[int]
) -> None:
    asked = [1, 2, 3, None, 4, 5, 6, 1, 3, 5, 2, 4, 6, None, 6, 5, 4, 3, 2, 1]
    large = InProcess(tiny_model)
    budget = 2 * max(sizes)
    small = InProcess(tiny_model, max_adapter_bytes=budget)
    for version, path in enumerate(adapters, 1):
        assert small.load(version, path) == large.load(version, path)
    expected = large.generate(asked)
    assert len({tuple(tokens) for tokens in expected}) == 7
    assert small.generate(asked) == expected
    assert small.generate(asked) == expected
    assert 0 < small.most_bytes <= budget
    tiers = small.stats.adapters
    assert (tiers.known, tiers.host_limit, tiers.device_bytes) == (6, budget, 0)
    assert tiers.reads >= 6
    assert tiers.read_seconds > 0
    assert tiers.host_evictions >= 4 + 6
    assert large.stats.adapters.reads == large.stats.adapters.host_evictions == 0
    freed = [small.drop(version) for version in range(1, 7)]
    assert sum(freed) == tiers.host_bytes
    assert [large.drop(version) for version in range(1, 7)] == sizes
    for engine in (small, large):
        left = engine.stats.adapters
        assert (left.known, left.host, left.device, left.host_bytes) == (0, 0, 0, 0)


def test_an_adapter_is_read_while_it_waits_for_a_place(
    tiny_model: Path, adapters: list[Path], sizes: list[int]
) -> None:
    small = InProcess(tiny_model, max_adapter_bytes=sum(sizes[:4]))
    for version, path in enumerate(adapters, 1):
        small.load(version, path)
    running = [small.submit(version, new=50) for version in (6, 6, 6, 6)]
    small._pump(lambda: small.stats.running == 4)  # all places
    waiting = small.submit(1)
    small._pump(lambda: small.stats.waiting == 1)
    # It is being read by now. The other thread gets all the time that it needs for that.
    deadline = time.monotonic() + 60
    while small.inbox.empty():
        assert time.monotonic() < deadline, "nothing is read"
        time.sleep(0.001)
    small._pump(lambda: small.stats.adapters.reads == 1)
    assert not set(running) & set(small.ended)
    small.finish([*running, waiting])
    assert small.stats.adapters.late_reads == 0


def test_a_cold_adapter_gets_in_though_another_could_always_fill_the_batch(
    tiny_model: Path, adapters: list[Path], sizes: list[int]
) -> None:
    small = InProcess(tiny_model, max_adapter_bytes=max(sizes), max_batch_size=1, adapter_quantum=8)
    for version in (4, 2):  # of one size, and memory holds the last of them
        small.load(version, adapters[version - 1])
    busy = [small.submit(2) for _ in range(20)]
    cold = small.submit(4)
    small.finish([cold])
    assert len(set(busy) & set(small.ended)) < 10
    small.finish(busy)


def test_files_that_changed_fail_their_own_requests_only(
    tiny_model: Path, adapters: list[Path], sizes: list[int]
) -> None:
    small = InProcess(tiny_model, max_adapter_bytes=2 * max(sizes))
    for version, path in enumerate(adapters, 1):
        small.load(version, path)
    expected = small.generate([2, 3, 4])
    original = (adapters[0] / leaf.WEIGHTS_FILE).read_bytes()
    small.generate([5, 6])
    (adapters[0] / leaf.WEIGHTS_FILE).write_bytes((adapters[5] / leaf.WEIGHTS_FILE).read_bytes())
    (adapters[1] / leaf.CONFIG_FILE).rename(adapters[1] / "elsewhere")
    requests = [small.submit(version) for version in (1, 2, 3, 1, 4, 2)]
    tokens = small.finish(requests)
    errors = [small.ended[request].error for request in requests]
    assert "cannot be read again from disk" in errors[0]
    assert "others than those that were loaded" in errors[0]
    assert "load the adapter again" in errors[0]
    assert errors[3] == errors[0]
    assert "there is no adapter_config.json in a2/ (found: " in errors[1]
    assert errors[5] == errors[1]
    assert (tokens[2], tokens[4]) == (expected[1], expected[2])
    # What is loaded again under a new version works, and so does the old one with its files back.
    small.load(7, adapters[5])
    assert small.generate([7]) == small.generate([6])
    (adapters[0] / leaf.WEIGHTS_FILE).write_bytes(original)
    (adapters[1] / "elsewhere").rename(adapters[1] / leaf.CONFIG_FILE)
    small.generate([1])
    assert small.generate([2]) == expected[:1]


def test_an_adapter_beyond_the_budget_is_refused(
    tiny_model: Path, adapters: list[Path], sizes: list[int]
) -> None:
    small = InProcess(tiny_model, max_adapter_bytes=max(sizes) - 1)
    with pytest.raises(Overloaded, match="raise that limit"):
        small.load(2, adapters[1])
    assert small.load(1, adapters[0]).nbytes == sizes[0]
    assert small.stats.adapters.known == 1


def test_a_second_reading_has_the_same_bits(tiny_model: Path, adapters: list[Path]) -> None:
    results: queue.SimpleQueue[LoadFinished] = queue.SimpleQueue()
    runner = ModelRunner(EngineConfig(model=str(tiny_model), dtype="float32", kernels="torch"))
    loader = AdapterLoader(
        runner.modules,
        runner.fold,
        runner.without_copies,
        results.put,
        probe="refuse",
        fingerprint=runner.fingerprint,
    )
    loader.request(Load(1, str(adapters[0]), call_id=1))
    first = results.get(timeout=30)
    assert first.info is not None
    loader.request(Load(1, str(adapters[0]), digest=first.info.digest))
    second = results.get(timeout=30)
    assert second.info == first.info
    pairs = 0
    for one, two in zip(first.weights.sites, second.weights.sites, strict=True):  # type: ignore[union-attr]
        if one is not None and two is not None:
            assert torch.equal(one.a, two.a)
            assert all(torch.equal(x[2], y[2]) for x, y in zip(one.parts, two.parts, strict=True))
            pairs += 1
    assert pairs == 8


def test_what_requests_wait_for_is_read_before_new_adapters(
    tiny_model: Path, adapters: list[Path]
) -> None:
    order: list[int] = []
    results: queue.SimpleQueue[LoadFinished] = queue.SimpleQueue()
    runner = ModelRunner(EngineConfig(model=str(tiny_model), dtype="float32"))
    started: queue.SimpleQueue[None] = queue.SimpleQueue()

    def finished(result: LoadFinished) -> None:
        order.append(result.load.version)
        started.get()  # holds the thread up until the others are queued
        results.put(result)

    loader = AdapterLoader(
        runner.modules,
        runner.fold,
        runner.without_copies,
        finished,
        probe="refuse",
        fingerprint=runner.fingerprint,
    )
    for version in (1, 2, 3):
        loader.request(Load(version, str(adapters[version]), call_id=version))
    loader.request(Load(4, str(adapters[4]), digest="0" * 64))
    for _ in range(4):
        started.put(None)
    failed = [results.get(timeout=30) for _ in range(4)]
    assert order.index(4) < order.index(3)
    assert [result.error is not None for result in failed].count(True) == 1


def test_a_device_budget_is_not_for_a_cpu(tiny_model: Path) -> None:
    config = EngineConfig(model=str(tiny_model), device="cpu", max_device_adapter_bytes=1)
    with pytest.raises(InvalidRequest, match="max_adapter_bytes"):
        ModelRunner(config)
