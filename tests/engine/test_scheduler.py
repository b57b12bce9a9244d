"""The scheduler under random arrivals, steps, ends and aborts, and what it promises to each."""

from __future__ import annotations

from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lorax_serve.core import BASE, Batch, SamplingParams, Sequence
from lorax_serve.engine.adapter_slots import AdapterSlots
from lorax_serve.engine.scheduler import Scheduler


def sequence(
    request_id: int, prompt: int = 1, new: int = 1, adapter: int | None = None
) -> Sequence:
    return Sequence(
        request_id=request_id,
        tokens=[7] * prompt,
        prompt_length=prompt,
        adapter=adapter,
        sampling=SamplingParams(),
        max_new_tokens=new,
        min_new_tokens=0,
        eos_token_ids=frozenset(),
    )


class Simulation:
    """A scheduler, the engine's part in a step, and checks of every batch."""

    def __init__(self, rows: int, budget: int, slots: int) -> None:
        self.rows, self.budget, self.slots = rows, budget, slots
        self.scheduler = Scheduler(rows, budget, slots)
        self.waiting: dict[int, Sequence] = {}
        self.running: dict[int, Sequence] = {}
        self.device: dict[int, int] = {}
        """Slot to version, as the runner would have it."""
        self.admitted: list[int] = []
        self.done: list[int] = []
        self._ids = 0

    def add(self, prompt: int = 1, new: int = 1, adapter: int | None = None) -> Sequence:
        self._ids += 1
        new_one = sequence(self._ids, prompt, new, adapter)
        self.scheduler.add(new_one)
        self.waiting[self._ids] = new_one
        return new_one

    def step(self) -> Batch:
        before = dict(self.running)
        batch = self.scheduler.schedule()
        for slot, version in batch.loads:
            assert all(s.adapter_slot != slot for s in before.values()), "a pinned slot was taken"
            self.device[slot] = version
        for chosen in batch.sequences:
            if chosen.request_id in self.waiting:
                self.running[chosen.request_id] = self.waiting.pop(chosen.request_id)
                self.admitted.append(chosen.request_id)
        self.check(batch)
        for chosen in batch.decodes:
            chosen.computed += 1
        for chosen, length in batch.prefills:
            chosen.computed += length
        for chosen in batch.sequences:
            if chosen.remaining == 0:
                chosen.tokens.append(7)
                if chosen.generated >= chosen.max_new_tokens:
                    self.end(chosen)
        return batch

    def check(self, batch: Batch) -> None:
        ids = [chosen.request_id for chosen in batch.sequences]
        assert len(ids) == len(set(ids)), "a sequence is in the batch twice"
        assert set(ids) <= self.running.keys()
        assert all(chosen.remaining == 1 for chosen in batch.decodes)
        assert all(0 < length <= chosen.remaining for chosen, length in batch.prefills)
        assert sum(length for _, length in batch.prefills) <= self.budget
        decoding = {i for i, s in self.running.items() if s.generated}
        assert decoding <= {s.request_id for s in batch.decodes}, "a decode was left out"
        assert batch or not (self.running or self.waiting), "nothing to do, but work is left"

    def end(self, chosen: Sequence) -> None:
        self.scheduler.finish(chosen)
        del self.running[chosen.request_id]
        self.done.append(chosen.request_id)
        assert (chosen.kv_slot, chosen.adapter_slot) == (-1, BASE)

    def abort(self, request_id: int) -> None:
        """As the engine does it."""
        found = self.scheduler.find(request_id)
        if found is not None:
            assert found is self.running[request_id]
            self.end(found)
        else:
            assert self.scheduler.withdraw(request_id) == (request_id in self.waiting)
            self.waiting.pop(request_id, None)

    def drop(self, version: int) -> None:
        """As the engine does when an adapter's last request has ended."""
        slot = self.scheduler.drop_adapter(version)
        held = {v: s for s, v in self.device.items()}
        assert slot == held.get(version)
        if slot is not None:
            del self.device[slot]

    def check_state(self) -> None:
        scheduler = self.scheduler
        assert scheduler.problems() == []
        assert scheduler.running == len(self.running) <= self.rows
        assert scheduler.waiting == len(self.waiting)
        pinned = {s.adapter for s in self.running.values() if s.adapter is not None}
        assert len(pinned) <= self.slots
        assert scheduler.resident_adapters == len(self.device) <= self.slots
        assert scheduler.kv_tokens == sum(s.computed for s in self.running.values())
        rows = [s.kv_slot for s in self.running.values()]
        assert len(rows) == len(set(rows))
        assert all(0 <= row < self.rows for row in rows)
        for s in self.running.values():
            if s.adapter is None:
                assert s.adapter_slot == BASE
            else:
                assert self.device[s.adapter_slot] == s.adapter, "it runs with another's weights"
        by_adapter = defaultdict(list)
        everyone = {**self.running, **self.waiting}
        for request_id in self.admitted:
            if request_id in everyone:
                by_adapter[everyone[request_id].adapter].append(request_id)
        for adapter, ids in by_adapter.items():
            assert ids == sorted(ids), f"adapter {adapter} is not served in order of arrival"
            left = [i for i, s in self.waiting.items() if s.adapter == adapter]
            assert not left or max(ids) < min(left), f"adapter {adapter}: one was overtaken"


class SchedulerMachine(RuleBasedStateMachine):
    """Random lives of a scheduler."""

    @initialize(rows=st.integers(1, 4), budget=st.integers(1, 12), slots=st.integers(1, 3))
    def start(self, rows: int, budget: int, slots: int) -> None:
        self.simulation = Simulation(rows, budget, slots)

    @rule(
        prompt=st.integers(1, 20),
        new=st.integers(1, 5),
        adapter=st.none() | st.integers(1, 5),
        count=st.integers(1, 3),
    )
    def add(self, prompt: int, new: int, adapter: int | None, count: int) -> None:
        for _ in range(count):
            self.simulation.add(prompt, new, adapter)

    @rule(times=st.integers(1, 4))
    def step(self, times: int) -> None:
        for _ in range(times):
            self.simulation.step()
            self.simulation.check_state()

    @precondition(lambda self: self.simulation.running)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        ids = sorted(self.simulation.running)
        self.simulation.end(self.simulation.running[data.draw(st.sampled_from(ids))])

    @rule(request_id=st.integers(1, 30))
    def abort(self, request_id: int) -> None:
        self.simulation.abort(request_id)

    @rule(version=st.integers(1, 5))
    def drop(self, version: int) -> None:
        everyone = {**self.simulation.running, **self.simulation.waiting}
        if all(s.adapter != version for s in everyone.values()):
            self.simulation.drop(version)

    @invariant()
    def accounts_are_in_order(self) -> None:
        if hasattr(self, "simulation"):
            self.simulation.check_state()

    def teardown(self) -> None:
        """Everything that was not aborted runs to its end, in a bounded number of steps."""
        if not hasattr(self, "simulation"):
            return
        simulation = self.simulation
        everyone = [*simulation.running.values(), *simulation.waiting.values()]
        work = sum(len(s.tokens) + s.max_new_tokens for s in everyone)
        for _ in range(work):
            if not (simulation.running or simulation.waiting):
                break
            simulation.step()
            simulation.check_state()
        assert not simulation.running
        assert not simulation.waiting
        assert {s.request_id for s in everyone} <= set(simulation.done)
        assert simulation.scheduler.kv_tokens == 0


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(
    max_examples=80, stateful_step_count=30, deadline=None, derandomize=True
)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    slots=st.integers(1, 3),
    rows=st.integers(1, 6),
    new=st.integers(1, 4),
    arrivals=st.integers(1, 3),
    base=st.booleans(),
)
def test_nobody_starves_while_others_keep_arriving(
    slots: int, rows: int, new: int, arrivals: int, base: bool
) -> None:
    simulation = Simulation(rows, 16, slots)
    busy: list[int | None] = [*range(1, slots + 1), *([None] if base else [])]
    for adapter in busy:
        simulation.add(new=new, adapter=adapter)
    simulation.step()
    late = simulation.add(new=1, adapter=99)
    for turn in range(600):
        if late.request_id in simulation.done:
            break
        for n in range(arrivals):
            simulation.add(new=new, adapter=busy[(turn + n) % len(busy)])
        simulation.step()
        simulation.check_state()
    assert late.request_id in simulation.done
    ahead = simulation.admitted.index(late.request_id)
    assert ahead <= len(busy) + 33 + rows  # a bound that does not grow with what arrives


def test_an_adapter_without_a_slot_lets_others_pass() -> None:
    simulation = Simulation(rows=4, budget=16, slots=1)
    simulation.add(new=9, adapter=1)
    waits = simulation.add(adapter=2)
    same, base = simulation.add(new=9, adapter=1), simulation.add(new=9)
    batch = simulation.step()
    assert simulation.admitted == [1, same.request_id, base.request_id]
    assert list(simulation.waiting) == [waits.request_id]
    assert batch.loads == [(0, 1)]
    assert waits.passed == 2


def test_waiting_for_a_row_is_first_come_first_served() -> None:
    simulation = Simulation(rows=1, budget=16, slots=2)
    for adapter in (1, None, 2, 1, 3):
        simulation.add(adapter=adapter)
    for _ in range(5):
        simulation.step()
    assert simulation.done == [1, 2, 3, 4, 5]


def test_prompts_are_cut_to_the_budget_and_the_oldest_goes_first() -> None:
    simulation = Simulation(rows=3, budget=10, slots=1)
    simulation.add(prompt=14, new=3)
    simulation.add(prompt=8, new=3)

    def lengths() -> list[tuple[int, int]]:
        return [(s.request_id, length) for s, length in simulation.step().prefills]

    assert lengths() == [(1, 10)]
    assert lengths() == [(1, 4), (2, 6)]
    batch = simulation.step()
    assert [s.request_id for s in batch.decodes] == [1]
    assert [(s.request_id, length) for s, length in batch.prefills] == [(2, 2)]


def test_decodes_go_on_beside_a_long_prompt() -> None:
    simulation = Simulation(rows=2, budget=4, slots=1)
    simulation.add(new=6)
    simulation.step()
    simulation.add(prompt=100)
    for _ in range(5):
        batch = simulation.step()
        assert [s.request_id for s in batch.decodes] == [1]
        assert [length for _, length in batch.prefills] == [4]


def test_nothing_to_do() -> None:
    scheduler = Scheduler(2, 8, 1)
    assert not scheduler.schedule()
    assert scheduler.find(1) is None
    assert not scheduler.withdraw(1)
    assert scheduler.drop_adapter(1) is None


def test_an_idle_adapter_stays_until_its_slot_is_needed() -> None:
    simulation = Simulation(rows=1, budget=8, slots=2)
    for adapter in (1, 2, 1):
        simulation.add(adapter=adapter)
        loads = simulation.step().loads
    assert loads == []  # 1 was still there
    simulation.add(adapter=3)
    simulation.step()
    assert sorted(simulation.device.values()) == [1, 3]  # 2 was the least recently used


def test_a_wanted_adapter_is_not_dropped() -> None:
    simulation = Simulation(rows=1, budget=8, slots=1)
    simulation.add(new=5, adapter=1)
    simulation.add(adapter=2)
    with pytest.raises(AssertionError, match="version 2 is wanted"):
        simulation.scheduler.drop_adapter(2)
    simulation.step()
    with pytest.raises(AssertionError, match="version 1 is still in use"):
        simulation.scheduler.drop_adapter(1)


def test_a_slot_whose_weights_did_not_come_is_free_again() -> None:
    scheduler = Scheduler(2, 8, 1)
    first = sequence(1, adapter=1)
    scheduler.add(first)
    assert scheduler.schedule().loads == [(0, 1)]
    scheduler.finish(first)
    scheduler.evict_adapter(1)
    assert scheduler.problems() == []
    assert scheduler.resident_adapters == 0
    scheduler.add(sequence(2, adapter=1))
    assert scheduler.schedule().loads == [(0, 1)]  # not taken for present


def test_lost_accounts_are_found() -> None:
    scheduler = Scheduler(2, 8, 2)
    first = sequence(1, adapter=1)
    scheduler.add(first)
    scheduler.schedule()
    first.kv_slot = 1
    assert "KV rows" in scheduler.problems()[0]
    first.adapter = 2
    assert "adapter pins" in scheduler.problems()[0]


def test_slots_report_pins_that_nobody_holds() -> None:
    slots = AdapterSlots(1)
    assert slots.pin(5) == (0, True)
    assert slots.pin(5) == (0, False)
    assert slots.pin(6) is None
    assert slots.problems({5: 2}) == []
    assert "adapter pins" in slots.problems({5: 1})[0]
    slots.unpin(5)
    slots.unpin(5)
    assert slots.pin(6) == (0, True)
    assert len(slots) == 1
