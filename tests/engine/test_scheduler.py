"""The scheduler under random arrivals, steps, ends and aborts, and what it promises to each."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lorax_serve.core import BASE
from lorax_serve.engine.adapter_slots import AdapterSlots
from lorax_serve.engine.fair_queue import SCALE
from lorax_serve.engine.kv_rows import BLOCK, KVRows
from lorax_serve.engine.scheduler import Scheduler
from tests.engine.simulation import Simulation, sequence

SHARED = [[family * 10_000 + n for n in range(200)] for family in range(3)]
"""Texts that prompts begin with."""


def scheduler_of(rows: int, budget: int, slots: int) -> Scheduler:
    return Scheduler(
        rows,
        budget,
        AdapterSlots(slots),
        KVRows(rows, 100),
        prompt_tokens_beside=lambda decodes: budget,
        adapter_quantum=0,
    )


class SchedulerMachine(RuleBasedStateMachine):
    """Random lives of a scheduler."""

    @initialize(
        rows=st.integers(1, 4),
        spare_rows=st.integers(0, 4),
        blocks=st.integers(5, 12),
        budget=st.integers(1, 80),
        beside=st.integers(1, 80),
        slots=st.integers(1, 3),
        quantum=st.sampled_from([0, 20, 200]),
        caching=st.booleans(),
    )
    def start(
        self,
        rows: int,
        spare_rows: int,
        blocks: int,
        budget: int,
        beside: int,
        slots: int,
        quantum: int,
        caching: bool,
    ) -> None:
        self.simulation = Simulation(
            rows,
            budget,
            slots,
            spare_rows=spare_rows,
            blocks=blocks,
            beside=beside,
            quantum=quantum,
            caching=caching,
        )

    @rule(
        family=st.integers(0, 2),
        shared=st.integers(0, 90),
        own=st.integers(1, 20),
        new=st.integers(1, 50),
        adapter=st.none() | st.integers(1, 5),
        priority=st.integers(-2, 2),
        count=st.integers(1, 3),
    )
    def add(
        self,
        family: int,
        shared: int,
        own: int,
        new: int,
        adapter: int | None,
        priority: int,
        count: int,
    ) -> None:
        for n in range(count):  # 90 + 20 + 50 is five blocks: any one fits
            tail = [-n] * own
            self.simulation.add(SHARED[family][:shared] + tail, new, adapter, priority)

    @rule(times=st.integers(1, 12))
    def step(self, times: int) -> None:
        for _ in range(times):
            self.simulation.step()
            self.simulation.check_state()

    @precondition(lambda self: self.simulation.running)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        ids = sorted(self.simulation.running)
        self.simulation.end(self.simulation.running[data.draw(st.sampled_from(ids))])

    @rule(request_id=st.integers(1, 40))
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
        simulation.run(20 * work)  # some tokens are computed again after a preemption
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
    priority=st.integers(-2, 2),
    quantum=st.sampled_from([0, 8, 32]),
)
def test_nobody_starves_while_others_keep_arriving(
    slots: int, rows: int, new: int, arrivals: int, base: bool, priority: int, quantum: int
) -> None:
    simulation = Simulation(rows, 16, slots, quantum=quantum)
    busy: list[int | None] = [*range(1, slots + 1), *([None] if base else [])]
    for adapter in busy:
        simulation.add(new=new, adapter=adapter)
    simulation.step()
    late = simulation.add(new=1, adapter=99, priority=priority)
    for turn in range(600):
        if late.request_id in simulation.done:
            break
        for n in range(arrivals):
            simulation.add(new=new, adapter=busy[(turn + n) % len(busy)])
        simulation.step()
        simulation.check_state()
    assert late.request_id in simulation.done
    ahead = simulation.admitted.index(late.request_id)
    # A bound that does not grow with what arrives: each busy flow may get a quantum ahead, and
    # what it costs beyond that is what runs at once. An admission costs at least 1.
    assert ahead <= len(busy) * (quantum + 4 + 2 * new) + 2 * rows


def test_an_adapter_without_a_slot_lets_others_pass() -> None:
    simulation = Simulation(rows=4, budget=16, slots=1)
    simulation.add(new=9, adapter=1)
    waits = simulation.add(adapter=2)
    same, base = simulation.add(new=9, adapter=1), simulation.add(new=9)
    batch = simulation.step()
    assert sorted(simulation.admitted) == [1, same.request_id, base.request_id]
    assert list(simulation.waiting) == [waits.request_id]
    assert batch.loads == [(0, 1)]


def test_an_adapter_that_had_its_turn_is_parked_for_one_that_waits() -> None:
    simulation = Simulation(rows=4, budget=64, slots=1, quantum=10)
    first = simulation.add(prompt=12, new=5, adapter=1)
    waits = simulation.add(new=20, adapter=2)
    simulation.step()
    later = simulation.add(adapter=1)
    base = simulation.add(new=20)
    batch = simulation.step()
    assert batch.loads == [(0, 2)]
    assert (first.kv_slot >= 0, first.adapter_slot, first.generated) == (True, BASE, 1)
    assert {waits.request_id, base.request_id} == {s.request_id for s in batch.sequences}
    assert later.request_id in simulation.waiting  # it is not its adapter's turn
    while first.adapter_slot == BASE:
        simulation.step()
        simulation.check_state()
    assert waits.adapter_slot == BASE
    assert 10 <= 2 * waits.generated <= 10 + 12 + 4
    simulation.run()
    assert simulation.scheduler.preemptions == 0


def test_a_parked_request_can_be_aborted_or_withdrawn() -> None:
    for end in ("abort", "withdraw"):
        simulation = Simulation(rows=4, budget=64, slots=1, quantum=0)
        first = simulation.add(prompt=12, new=5, adapter=1)
        simulation.add(new=20, adapter=2)
        simulation.step()
        simulation.step()
        assert simulation.scheduler.waiting_for(1) == [first]
        assert simulation.scheduler.waiting_adapters() == [1]
        if end == "abort":
            simulation.abort(first.request_id)
        else:  # as the engine does when its adapter's weights are lost
            assert simulation.scheduler.withdraw(first.request_id)
            del simulation.running[first.request_id]
        simulation.check_state()
        simulation.run()


def test_a_turn_that_is_not_over_goes_on() -> None:
    simulation = Simulation(rows=4, budget=64, slots=1, quantum=100)
    simulation.add(prompt=12, new=5, adapter=1)
    simulation.add(adapter=2)
    simulation.step()
    simulation.add(adapter=1)
    simulation.step()
    assert simulation.admitted == [1, 3]


def test_waiting_for_a_row_is_first_come_first_served_when_all_were_served_alike() -> None:
    simulation = Simulation(rows=1, budget=16, slots=2)
    for adapter in (1, None, 2, 3):
        simulation.add(adapter=adapter)
    for _ in range(4):
        simulation.step()
    assert simulation.done == [1, 2, 3, 4]


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


def test_a_short_prompt_of_another_adapter_need_not_wait_for_a_long_one() -> None:
    simulation = Simulation(rows=3, budget=10, slots=2)
    simulation.add(prompt=100, adapter=1)
    simulation.step()
    short = simulation.add(prompt=10, adapter=2)
    simulation.step()
    simulation.step()
    assert short.request_id in simulation.done


def test_decodes_go_on_beside_a_long_prompt() -> None:
    simulation = Simulation(rows=2, budget=32, slots=1, beside=4)
    simulation.add(new=6)
    simulation.step()
    simulation.add(prompt=100)
    for _ in range(5):
        batch = simulation.step()
        assert [s.request_id for s in batch.decodes] == [1]
        assert [length for _, length in batch.prefills] == [4]
    assert [length for _, length in simulation.step().prefills] == [32]  # nothing decodes


def test_many_prompts_need_not_wait_for_one_that_decodes() -> None:
    simulation = Simulation(rows=8, budget=32, slots=1, beside=4)
    simulation.add(new=20)
    simulation.step()
    for _ in range(3):
        simulation.add(prompt=100)
    assert sum(length for _, length in simulation.step().prefills) == 12


def test_the_latest_is_preempted_and_comes_back_with_all_its_tokens() -> None:
    simulation = Simulation(rows=2, budget=64, slots=1, blocks=3)
    first, second = simulation.add(prompt=20, new=60), simulation.add(prompt=20, new=40)
    while not simulation.scheduler.preemptions:
        simulation.step()
        simulation.check_state()
    assert first.request_id in simulation.running
    assert second.generated > 1
    assert (second.computed, second.kv_slot) == (0, -1)
    simulation.run()
    assert simulation.done == [1, 2]
    assert (first.generated, second.generated) == (60, 40)


def test_low_priority_is_preempted_first() -> None:
    simulation = Simulation(rows=2, budget=64, slots=1, blocks=3)
    low, high = simulation.add(20, 60, priority=-1), simulation.add(20, 60, priority=1)
    while not simulation.scheduler.preemptions:
        simulation.step()
    assert low.request_id in simulation.waiting
    assert high.request_id in simulation.running


def test_a_preempted_sequence_is_not_charged_twice() -> None:
    simulation = Simulation(rows=2, budget=64, slots=1, blocks=3, caching=False)
    sequences = [simulation.add(20, 60, adapter=None), simulation.add(20, 60, adapter=1)]
    simulation.run()
    assert simulation.scheduler.preemptions
    counters = [simulation.scheduler._queue.flow(s).counter for s in sequences]
    # The token that it was preempted at is computed as a prompt's, which costs one less.
    assert max(counters) - min(counters) == simulation.scheduler.preemptions * SCALE


def test_a_prompt_that_waits_for_memory_is_not_passed() -> None:
    simulation = Simulation(rows=4, budget=200, slots=1, blocks=6)
    simulation.add(prompt=100, new=20)
    simulation.step()
    large = simulation.add(prompt=100)
    small = simulation.add(prompt=1)
    simulation.step()
    assert small.request_id in simulation.waiting
    simulation.run()
    assert simulation.admitted == [1, large.request_id, small.request_id]


def test_nothing_to_do() -> None:
    scheduler = scheduler_of(2, 8, 1)
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
    scheduler = scheduler_of(2, 8, 1)
    first = sequence(1, adapter=1)
    scheduler.add(first)
    assert scheduler.schedule().loads == [(0, 1)]
    scheduler.finish(first, keep=False)
    scheduler.evict_adapter(1)
    assert scheduler.problems() == []
    assert scheduler.resident_adapters == 0
    scheduler.add(sequence(2, adapter=1))
    assert scheduler.schedule().loads == [(0, 1)]  # not taken for present


def test_lost_accounts_are_found() -> None:
    scheduler = scheduler_of(2, 8, 2)
    first = sequence(1, prompt=BLOCK, adapter=1)
    scheduler.add(first)
    scheduler.schedule()
    first.kv_slot = 1
    assert "KV rows" in scheduler.problems()[0]
    first.adapter = 2
    assert "adapter pins" in scheduler.problems()[0]


def test_a_turn_is_not_held_by_who_cannot_be_admitted() -> None:
    """Memory is short for the request that is next, while a parked adapter holds the rest."""
    simulation = Simulation(4, 200, 1, blocks=8, quantum=10)
    simulation.add(100, new=100, adapter=1)
    simulation.step()
    simulation.add(1, new=3, adapter=2)
    simulation.step()
    simulation.add(100)
    simulation.add(1, adapter=3)
    assert simulation.run(2_000) < 2_000


def test_a_parked_adapter_is_not_passed_by_one_newcomer_after_the_other() -> None:
    simulation = Simulation(8, 64, 1, quantum=16)
    long = simulation.add(8, new=200, adapter=1)
    for _ in range(150):
        simulation.step()
    for adapter in range(2, 42):
        # The one before has just ended: there is always somebody who has had less than the first.
        simulation.add(8, new=8, adapter=adapter)
        for _ in range(9):
            simulation.step()
    assert long.request_id in simulation.done
