"""The tiers together: any order of loads, requests, reads, failures and drops, and its promises."""

from __future__ import annotations

import itertools
from collections.abc import Collection
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lorax_serve.core import AdapterInfo, Freed
from lorax_serve.engine.adapter_loader import Load, LoadFinished
from lorax_serve.engine.adapter_slots import AdapterSlots
from lorax_serve.engine.adapter_store import AdapterStore
from lorax_serve.engine.host_cache import HostCache
from lorax_serve.errors import AdapterRejected, Overloaded, RejectReason


class Tiers:
    """A store, its policies, and the part of a scheduler in first-come order that passes over."""

    def __init__(self, host: int, slots: int, device: int | None, rows: int, shared: bool) -> None:
        self.loads: list[Load] = []
        """Reads that have been started; the test ends them."""
        self.host = HostCache(host)
        self.slots = AdapterSlots(slots, device, self.host.use)
        self.shared, self.rows = shared, rows
        self.cleared: list[int] = []
        self.store = AdapterStore(
            self.loads.append, self.host, self.slots, self.cleared.append, shared=shared
        )
        self.sizes: dict[int, int] = {}
        self.pinned: set[int] = set()
        evicted = self.host._evict

        def evict(nbytes: int, keep: Collection[int]) -> list[int]:
            victims = evicted(nbytes, keep)
            assert not self.pinned.intersection(victims), "a pinned adapter was evicted"
            return victims

        self.host._evict = evict  # type: ignore[method-assign]
        self.waiting: list[int] = []
        self.running: list[int] = []
        self.device: dict[int, int] = {}
        """Slot to version, as the runner would have it."""

    def load(self, version: int, size: int) -> None:
        info = AdapterInfo(f"digest{version}", 1, 1, size)
        self.store.add(LoadFinished(Load(version, "dir", call_id=1), info, weights_of(version)))
        self.sizes[version] = size

    def submit(self, version: int) -> None:
        self.waiting.append(version)
        self.store.want(version)

    def step(self) -> None:
        for version in list(self.waiting):
            if len(self.running) == self.rows:
                break
            pinned = self.slots.pin(version)
            if pinned is None:
                continue
            self.waiting.remove(version)
            self.running.append(version)
            if pinned.is_new:
                for slot in self.slots.take_emptied():
                    self.device.pop(slot, None)
                assert self.store.get(version) == weights_of(version)
                self.device[pinned.slot] = version
            assert self.device[pinned.slot] == version
        self.store.read_ahead(lambda: dict.fromkeys(self.waiting))

    def end_read(self, index: int, *, ok: bool = True) -> None:
        load = self.loads.pop(index)
        if ok:
            assert load.digest == f"digest{load.version}"
            info = AdapterInfo(load.digest, 1, 1, self.sizes.get(load.version, 1))
            assert self.store.arrived(LoadFinished(load, info, weights_of(load.version))) is None
            return
        error = AdapterRejected(RejectReason.BAD_FILE, "gone")
        if self.store.arrived(LoadFinished(load, error=error)) is not None:
            self.waiting = [version for version in self.waiting if version != load.version]

    def end_request(self, index: int) -> None:
        self.slots.unpin(self.running.pop(index))

    def drop(self, version: int) -> Freed:
        self.cleared.clear()
        freed = self.store.drop(version, self.slots.drop(version))
        self.device = {s: v for s, v in self.device.items() if s not in self.cleared}
        del self.sizes[version]
        self.pinned.discard(version)
        return freed

    def check(self) -> None:
        pins = {version: self.running.count(version) for version in self.running}
        assert self.slots.problems(pins) == []
        assert self.store.problems() == []
        for version in self.running:
            assert version in self.slots, "a pinned adapter left its slot"
            assert not self.shared or version in self.host, "a pinned adapter left memory"

    def drain(self) -> None:
        """Serve everything that waits."""
        for _ in range(4 * len(self.waiting) + 4 * len(self.sizes) + 20):
            self.step()
            self.check()
            while self.loads:
                self.end_read(0)
            self.step()
            self.check()
            if self.running:
                self.end_request(0)
        assert (self.waiting, self.running, self.loads) == ([], [], [])
        assert all(version in self.host for version in self.pinned)


def weights_of(version: int) -> Any:
    return ("weights of", version)


class TierMachine(RuleBasedStateMachine):
    """Whatever happens: budgets hold, pinned adapters stay, and all that wait get in."""

    @initialize(
        host=st.integers(4, 12),
        slots=st.integers(1, 4),
        device=st.none() | st.integers(4, 8),
        rows=st.integers(1, 4),
        shared=st.booleans(),
    )
    def start(self, host: int, slots: int, device: int | None, rows: int, shared: bool) -> None:
        self.tiers = Tiers(host, slots, None if shared else device, rows, shared)
        self.versions = 0

    def one_of(self, data: st.DataObject, items: list[int]) -> int:
        return data.draw(st.sampled_from(items))

    @rule(size=st.integers(1, 4))
    def load(self, size: int) -> None:
        self.versions += 1
        pinned = sum(self.tiers.sizes[version] for version in self.tiers.pinned)
        if size + pinned > self.tiers.host.max_bytes:
            with pytest.raises(Overloaded, match="beside pinned ones"):
                self.tiers.load(self.versions, size)
        else:
            self.tiers.load(self.versions, size)

    @precondition(lambda self: self.tiers.sizes)
    @rule(data=st.data())
    def pin(self, data: st.DataObject) -> None:
        version = self.one_of(data, list(self.tiers.sizes))
        instead = data.draw(st.sampled_from([None, *sorted(self.tiers.pinned)]))
        try:
            self.tiers.store.pin(version, instead)
        except Overloaded:
            return
        self.tiers.pinned.add(version)
        if instead is not None and instead != version:
            self.unpin_one(instead)

    @precondition(lambda self: self.tiers.pinned)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        self.unpin_one(self.one_of(data, sorted(self.tiers.pinned)))

    def unpin_one(self, version: int) -> None:
        self.tiers.store.unpin(version)
        self.tiers.pinned.remove(version)

    @precondition(lambda self: self.tiers.sizes)
    @rule(data=st.data())
    def submit(self, data: st.DataObject) -> None:
        self.tiers.submit(self.one_of(data, list(self.tiers.sizes)))

    @rule()
    def step(self) -> None:
        self.tiers.step()

    @precondition(lambda self: self.tiers.loads)
    @rule(data=st.data(), ok=st.booleans())
    def end_read(self, data: st.DataObject, ok: bool) -> None:
        index = self.one_of(data, list(range(len(self.tiers.loads))))
        self.tiers.end_read(index, ok=ok)

    @precondition(lambda self: self.tiers.running)
    @rule(data=st.data())
    def end_request(self, data: st.DataObject) -> None:
        self.tiers.end_request(self.one_of(data, list(range(len(self.tiers.running)))))

    @precondition(lambda self: self.tiers.waiting)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.tiers.waiting.remove(self.one_of(data, self.tiers.waiting))

    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        used = {*self.tiers.waiting, *self.tiers.running}
        idle = [version for version in self.tiers.sizes if version not in used]
        if idle:
            self.tiers.drop(self.one_of(data, idle))

    @invariant()
    def all_is_well(self) -> None:
        if hasattr(self, "tiers"):
            self.tiers.check()

    def teardown(self) -> None:
        if not hasattr(self, "tiers"):
            return
        self.tiers.drain()
        for version in list(self.tiers.sizes):
            self.tiers.drop(version)
        self.tiers.check()
        assert (self.tiers.host.nbytes, self.tiers.slots.nbytes) == (0, 0)
        stats = self.tiers.store.stats
        assert (stats.known, stats.host, stats.device) == (0, 0, 0)


TestTiers = TierMachine.TestCase
TestTiers.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)


def test_a_pinned_adapter_is_read_until_it_can_be() -> None:
    """Though no request names it, and with pauses that grow."""
    tiers = Tiers(host=4, slots=1, device=None, rows=1, shared=False)
    for version in range(1, 6):
        tiers.load(version, 1)
    tiers.store.pin(1, None)
    asked = []
    for step in range(60):
        tiers.step()
        if tiers.loads:
            asked.append(step)
            tiers.end_read(0, ok=False)
    pauses = [after - before for before, after in itertools.pairwise(asked)]
    assert pauses == [2, 4, 8, 16, 16]
    for _ in range(16):
        tiers.step()
        if tiers.loads:
            tiers.end_read(0)
    assert 1 in tiers.host
    tiers.check()


@given(st.lists(st.integers(1, 100), min_size=100, max_size=300), st.booleans())
@settings(max_examples=20, deadline=None)
def test_a_hundred_adapters_wait_for_room_for_eight(order: list[int], shared: bool) -> None:
    tiers = Tiers(host=8, slots=6, device=None, rows=4, shared=shared)
    for version in range(1, 101):
        tiers.load(version, 1)
    for version in order:
        tiers.submit(version)
    tiers.drain()


def test_the_head_of_the_queue_gets_in_before_what_was_read_ahead() -> None:
    tiers = Tiers(host=2, slots=4, device=None, rows=1, shared=True)
    for version in range(1, 8):
        tiers.load(version, 1)
    for version in (1, 2, 3, 4):
        tiers.submit(version)
    served = []
    while tiers.waiting or tiers.running:
        tiers.step()
        assert len(tiers.loads) <= 2
        while tiers.loads:
            tiers.end_read(0)
        if tiers.running:
            served.append(tiers.running[0])
            tiers.end_request(0)
    assert served == [1, 2, 3, 4]
    assert (tiers.store.stats.reads, tiers.store.stats.host_evictions) == (4, 9)


def test_an_adapter_larger_than_a_budget_is_refused() -> None:
    with pytest.raises(Overloaded, match=r"9 bytes, more than the 8 bytes of host memory"):
        Tiers(8, 2, None, 1, shared=True).load(1, 9)
    with pytest.raises(Overloaded, match=r"device memory that adapters have \(--max-device-ad"):
        Tiers(8, 2, 4, 1, shared=False).load(1, 5)


def test_a_failed_read_fails_its_requests_only_and_may_be_tried_again() -> None:
    tiers = Tiers(host=1, slots=1, device=None, rows=1, shared=True)
    for version in (1, 2):
        tiers.load(version, 1)
    tiers.submit(1)
    tiers.submit(2)
    tiers.step()  # 2 is in memory, so it is served first, and pinned
    assert (tiers.running, tiers.loads) == ([2], [])
    assert tiers.slots.short
    tiers.end_request(0)
    tiers.step()
    tiers.end_read(0, ok=False)
    assert tiers.waiting == []
    tiers.submit(1)
    tiers.drain()


@pytest.mark.parametrize(("shared", "freed"), [(True, Freed(host=3)), (False, Freed(3, 3))])
def test_a_drop_reports_the_memory_it_frees(shared: bool, freed: Freed) -> None:
    tiers = Tiers(host=4, slots=2, device=None, rows=1, shared=shared)
    tiers.load(1, 3)
    tiers.submit(1)
    tiers.step()
    tiers.end_request(0)
    assert tiers.store.stats.device_bytes == (0 if shared else 3)
    assert tiers.drop(1) == freed
    tiers.load(2, 3)
    tiers.load(3, 3)
    assert tiers.drop(2) == Freed(), "it was on disk only"


def test_memory_that_is_not_shared_lets_the_two_copies_part() -> None:
    tiers = Tiers(host=1, slots=1, device=None, rows=1, shared=False)
    tiers.load(1, 1)
    tiers.submit(1)
    tiers.step()
    tiers.load(2, 1)
    assert (1 in tiers.host, 1 in tiers.slots) == (False, True)
    tiers.end_request(0)
    tiers.submit(1)
    tiers.step()
    assert (tiers.running, tiers.loads) == ([1], []), "its slot still has it"
