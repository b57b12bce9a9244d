"""The shares that flows get, against the bounds of the paper (Sheng et al., OSDI 2024)."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorax_serve.engine.fair_queue import SCALE, FairQueue
from tests.engine.simulation import Simulation, sequence


def keep_busy(simulation: Simulation, flows: dict[tuple[int | None, int], tuple[int, int]]) -> None:
    """See that each flow has sequences waiting; ``flows`` gives their prompts' length and new."""
    for (adapter, priority), (prompt, new) in flows.items():
        mine = [s for s in simulation.waiting.values() if s.adapter == adapter]
        for _ in range(simulation.rows + 1 - len([s for s in mine if s.priority == priority])):
            simulation.add(prompt, new, adapter, priority)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 6),
    budget=st.integers(4, 40),
    prompts=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    news=st.tuples(st.integers(1, 8), st.integers(1, 8)),
)
def test_backlogged_flows_of_equal_weight_get_equal_service(
    rows: int, budget: int, prompts: tuple[int, int], news: tuple[int, int]
) -> None:
    simulation = Simulation(rows, budget, 2)
    flows: dict[tuple[int | None, int], tuple[int, int]] = {
        (1, 0): (prompts[0], news[0]),
        (None, 0): (prompts[1], news[1]),
    }
    # Theorem 4.4: twice the cost of the largest prompt or of what may be in the batch.
    bound = 2 * (max(prompts) + 2 * rows * max(news))
    for _ in range(200):
        keep_busy(simulation, flows)
        simulation.step()
        assert abs(simulation.served[1, 0] - simulation.served[None, 0]) <= bound


@pytest.mark.parametrize("higher", [1, 2])
def test_each_priority_level_doubles_the_share(higher: int) -> None:
    simulation = Simulation(4, 16, 1)
    flows: dict[tuple[int | None, int], tuple[int, int]] = {
        (None, higher): (8, 4),
        (None, 0): (8, 4),
    }
    for _ in range(1500):
        keep_busy(simulation, flows)
        simulation.step()
    ratio = simulation.served[None, higher] / simulation.served[None, 0]
    assert ratio == pytest.approx(2**higher, rel=0.1)


def test_an_adapter_s_weight_is_its_share() -> None:
    queue = FairQueue()
    heavy, light = sequence(1, prompt=30, adapter=1), sequence(2, prompt=10, adapter=2)
    heavy.weight = 3
    queue.charge_prompt(heavy, 30)
    queue.charge_prompt(light, 10)
    assert queue.flow(heavy).counter == queue.flow(light).counter == 10 * SCALE


def test_idleness_earns_no_credit() -> None:
    simulation = Simulation(1, 16, 1)
    simulation.add(adapter=1)
    simulation.step()
    for _ in range(50):
        simulation.add(prompt=10)
    for _ in range(40):
        simulation.step()
    idle = [simulation.add(prompt=10, adapter=1).request_id for _ in range(5)]
    for _ in range(8):
        simulation.step()
    assert 3 <= len(set(simulation.done) & set(idle)) <= 5


def test_who_comes_when_nobody_waits_starts_where_the_last_was_served() -> None:
    simulation = Simulation(2, 16, 2)
    simulation.add(prompt=1000, new=1, adapter=1)
    simulation.run()
    old, new = simulation.add(prompt=8, adapter=1), simulation.add(prompt=8, adapter=2)
    queue = simulation.scheduler._queue
    assert queue.flow(old).counter - queue.flow(new).counter <= 16 * SCALE


@settings(max_examples=30, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000))
def test_a_flood_of_one_adapter_delays_another_by_a_bounded_service(seed: int) -> None:
    rng = random.Random(seed)
    simulation = Simulation(4, 32, 4, blocks=rng.choice([12, 10_000]))
    for _ in range(100):
        simulation.add(rng.randint(1, 60), rng.randint(1, 20), adapter=1)
    for _ in range(rng.randint(1, 30)):
        simulation.step()
    before = dict(simulation.served)
    late = simulation.add(rng.randint(1, 60), rng.randint(1, 20), adapter=2)
    while late.request_id not in simulation.admitted:
        simulation.step()
    # What runs may end, and each row may be given away once more before.
    assert simulation.served[1, 0] - before[1, 0] <= 2 * 4 * (60 + 2 * 20)


def closed_loop(adapters: int, slots: int, quantum: int, seed: int) -> tuple[float, float, int]:
    """Two clients for each adapter, each with one request after the other.

    Returns:
        median and largest steps to the first token, and adapters brought into slots.
    """
    rng = random.Random(seed)
    simulation = Simulation(16, 256, slots, beside=64, quantum=quantum, spare_rows=16)
    pending: dict[int, int] = {}
    waits: list[int] = []
    adapter_of: dict[int, int] = {}

    def send(adapter: int) -> None:
        sent = simulation.add(rng.randint(20, 40), rng.randint(8, 24), adapter)
        pending[sent.request_id] = 0
        adapter_of[sent.request_id] = adapter

    for client in range(2 * adapters):
        send(client % adapters)
    ended = 0
    for _ in range(2000):
        simulation.step()
        everyone = {**simulation.running, **simulation.waiting}
        for request_id in list(pending):
            pending[request_id] += 1
            chosen = everyone.get(request_id)
            if chosen is None or chosen.generated:
                waits.append(pending.pop(request_id))
        for request_id in simulation.done[ended:]:
            send(adapter_of[request_id])
        ended = len(simulation.done)
    waits.sort()
    return waits[len(waits) // 2], waits[-1], simulation.swaps


@pytest.mark.parametrize("seed", range(3))
def test_twice_as_many_adapters_as_slots_do_not_thrash(seed: int) -> None:
    fits = closed_loop(8, 8, 1024, seed)
    short = closed_loop(16, 8, 1024, seed)
    assert short[0] <= 2 * fits[0]
    assert short[1] <= 600  # steps: turns of twice the quantum, by twice the cost of a step
    assert short[2] <= 400  # swaps; a swap for each request would be about 1500
