"""The simulated cluster: exact properties on small runs; its costs are compared by validate.py."""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.cluster_simulation.cluster import Change, Cluster
from benchmarks.cluster_simulation.costs import Costs, Loaded, Pace, Step, fit, pace_of
from benchmarks.cluster_simulation.figures import of_jobs
from benchmarks.cluster_simulation.replica import Job, Limits, Replica
from benchmarks.cluster_simulation.roofline import CONFIG, DTYPE, roofline
from benchmarks.cluster_simulation.routing import POLICIES, Residency, RingHash, RoundRobin
from benchmarks.cluster_simulation.warm import warm
from benchmarks.cluster_simulation.workload import jobs, shares
from lorax_serve.checkpoint.spec_cache import load_spec
from lorax_serve.cli.capacity import Demand, Memory, plan
from lorax_serve.cli.devices import DEVICES
from lorax_serve.core import AdapterTier
from lorax_serve.engine.adapter_slots import AdapterSlots
from lorax_serve.engine.host_cache import HostCache

# A step takes 10 ms, and 1 ms for each prompt token; a load 50 ms.
COSTS = Costs(0.010, 0.0, 0.001, 0.0, 0.0, 0.0, noise=(1.0,), loads=(0.05,))
NOISY = replace(COSTS, noise=(0.8, 1.0, 1.2), loads=(0.02, 0.05, 0.08), decode=0.001)
LIMITS = Limits(10, 60, adapter_slots=4, max_batch_size=4, max_length=256)


def work(count: int = 300, rate: float = 20.0, adapters: int = 40, seed: int = 0) -> list[Job]:
    return jobs(
        count,
        rate,
        adapters,
        exponent=1.0,
        prompt_tokens=(4, 20),
        new_tokens=(1, 12),
        seed=seed,
    )


def ran(router: Any, some: list[Job], changes: list[Change] | None = None, **more: Any) -> Cluster:
    options = {"costs": NOISY, "limits": LIMITS, "replicas": 5, **more}
    limits, costs, replicas = options.pop("limits"), options.pop("costs"), options.pop("replicas")
    cluster = Cluster(router, limits, costs, replicas, **options)
    cluster.run(some, changes or [])
    return cluster


def seen(some: list[Job]) -> list[tuple[Any, ...]]:
    return [(job.replica, job.tier, job.first, job.end, job.fate) for job in some]


def test_a_lone_request_takes_what_its_steps_take() -> None:
    (job,) = some = [Job(0, 1.0, 7, prompt_tokens=6, new_tokens=3)]
    ran(RoundRobin(), some, costs=COSTS, limits=replace(LIMITS, fetch_seconds=0.2))
    # Fetched, loaded, then a step with six prompt tokens and two that decode.
    assert job.tier == "source"
    assert job.first == pytest.approx(1.0 + 0.2 + 0.05 + 0.016)
    assert job.end == pytest.approx(job.first + 0.02)


@pytest.mark.parametrize("policy", POLICIES)
def test_every_request_is_answered_once_whatever_happens_to_replicas(policy: str) -> None:
    some = work(rate=80.0)
    changes = [
        Change(1.0, "die", 0),
        Change(1.2, "join", 5),
        Change(2.0, "leave", 1),
        Change(2.5, "die", 2),
        Change(2.5, "join", 6),
    ]
    cluster = ran(POLICIES[policy](), some, changes, limits=replace(LIMITS, fetch_seconds=0.2))
    fates = Counter(job.fate for job in some)
    assert sum(fates.values()) == len(some)
    assert fates.keys() <= {"done", "failed"}
    for job in some:
        if job.fate == "done":
            assert job.arrival < job.first <= job.end
        else:
            assert job.replica in (0, 2)
            assert job.first > 0
    assert any(job.retries for job in some)
    assert not any(job.replica == 1 for job in some if job.arrival > 2)
    assert all(not replica.problems() for replica in cluster.replicas.values())
    assert all(not replica.jobs for replica in [*cluster.replicas.values(), *cluster.gone])
    assert all(count == 0 for count in cluster._router.in_flight.values())


def test_a_closed_loop_keeps_so_many_under_way_and_goes_on_later() -> None:
    some, more = work(60), work(40, seed=1)
    cluster = Cluster(RoundRobin(), LIMITS, NOISY, 3)
    over = cluster.run_closed(some, 6)
    assert {job.fate for job in some} == {"done"}
    assert [job.arrival for job in some[:6]] == [0.0] * 6
    # Each other one is sent when one is over, and so are as many under way at each end.
    assert sorted(job.end for job in some)[:54] == [job.arrival for job in some[6:]]
    assert max(job.end for job in some) == over
    assert cluster.run_closed(more, 6) > over
    assert [job.arrival for job in more[:6]] == [over] * 6


def test_overload_is_refused_and_counted() -> None:
    some = work(rate=2000.0)
    ran(RoundRobin(), some, limits=replace(LIMITS, max_waiting=8))
    fates = Counter(job.fate for job in some)
    assert fates["refused"] > 0
    assert fates["done"] + fates["refused"] == len(some)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_same_seed_gives_the_same_run_and_another_seed_another(policy: str) -> None:
    runs = []
    for seed in (1, 1, 2):
        some = work()
        ran(POLICIES[policy](), some, seed=seed)
        runs.append(seen(some))
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


@pytest.mark.parametrize("rate", [5.0, 20.0, 40.0])
def test_passing_over_equal_steps_changes_nothing(rate: float) -> None:
    found = []
    # No load ends when a step does, and prompt tokens of a step's time are no whole number: else
    # roundings would decide. Far beyond saturation they do all the same.
    costs = replace(COSTS, loads=(0.0507313,), prompt_token=0.0013)
    for jump in (True, False):
        some = work(rate=rate)
        cluster = ran(RingHash(), some, costs=costs, jump=jump)
        times = [(round(job.first, 6), round(job.end, 6)) for job in some]
        reads = [replica.read for replica in cluster.replicas.values()]
        found.append(([job.tier for job in some], times, reads))
    assert found[0] == found[1]


@pytest.mark.parametrize("slots", [2, 4, 8])
@pytest.mark.parametrize("policy", POLICIES)
def test_simulated_scheduling_decides_as_the_engines_own(policy: str, slots: int) -> None:
    found = []
    for exact in (True, False):
        some = work(rate=60.0)
        limits = replace(LIMITS, adapter_slots=slots, adapter_quantum=8, fetch_seconds=0.1)
        cluster = ran(POLICIES[policy](), some, limits=limits, exact=exact, jump=False)
        assert all(not replica.problems() for replica in cluster.replicas.values())
        found.append((seen(some), [each.put for each in cluster.replicas.values()]))
    assert found[0] == found[1]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_warm_start_is_where_traffic_would_have_led(policy: str) -> None:
    # Few requests and many adapters: no bound is reached, and memory holds some of them.
    limits = replace(LIMITS, max_adapter_bytes=150, shared=False)
    popular = shares(200, 1.0)
    cold, after = POLICIES[policy](), POLICIES[policy]()
    some = work(6000, rate=20.0, adapters=200)
    ran(cold, some, limits=limits)
    cluster = Cluster(after, limits, NOISY, 5)
    warm(after, cluster.replicas, popular, 200, seed=0)
    again = work(3000, rate=20.0, adapters=200, seed=1)
    cluster.run(again)
    expected, found = of_jobs(some[3000:]), of_jobs(again)
    for tier in ("device", "host"):  # even 3,000 requests do not ask for all of the tail
        assert found[f"found_{tier}"] == pytest.approx(expected[f"found_{tier}"], abs=0.05)
    assert all(not replica.problems() for replica in cluster.replicas.values())


def test_a_warm_replica_has_on_disk_what_it_is_said_to_have() -> None:
    replica, run = lone(LIMITS)
    replica.warm(list(range(20)), 40)
    assert replica.disk == 20
    found = {}
    for number, adapter in enumerate((0, 5, 19, 30)):
        run(job := Job(number, 10.0 * number, adapter, 4, 2))
        found[adapter] = job.tier
    assert found == {0: "device", 5: "host", 19: "disk", 30: "source"}
    assert replica.disk == 21
    assert not replica.problems()


def lone(limits: Limits) -> tuple[Replica, Callable[[Job], None]]:
    """A replica, and what runs a job on it to its end."""
    events: list[tuple[float, Callable[[float], None]]] = []

    def at(when: float, call: Callable[[float], None]) -> None:
        events.append((when, call))

    replica = Replica(limits, COSTS, random.Random(0), at, lambda job, now: None)

    def run(job: Job) -> None:
        replica.submit(job, job.arrival)
        while not job.fate:
            events.sort(key=lambda event: event[0])
            when, call = events.pop(0)
            call(when)

    return replica, run


@pytest.mark.parametrize("shared", [True, False])
def test_tiers_are_the_engines_own_on_the_same_trace(shared: bool) -> None:
    limits = replace(LIMITS, max_adapter_bytes=60, adapter_slots=4, shared=shared)
    replica, run = lone(limits)
    host = HostCache(60)
    slots = AdapterSlots(4, None, host.use)
    known: set[int] = set()
    trace = np.random.default_rng(0).zipf(1.3, size=400) % 15
    for number, adapter in enumerate(map(int, trace)):
        tier = "source"
        if adapter in known:
            tier = "device" if adapter in slots else "host" if adapter in host else "disk"
            host.use(adapter)
        evicted: list[int] = []
        if tier == "source":
            evicted = host.add(adapter, 10, ())
            known.add(adapter)
        elif adapter not in host and (shared or adapter not in slots):
            plan = host.plan([adapter], ())
            evicted = plan.evict
            host.arrived(adapter)
        for each in evicted if shared else ():
            slots.drop(each)
        assert slots.pin(adapter) is not None
        slots.unpin(adapter)
        job = Job(number, 10.0 * number, adapter, 4, 2)
        run(job)
        assert job.tier == tier, f"request {number} for adapter {adapter}"
    tiers = replica.store.tiers()
    assert {a for a, t in tiers.items() if t is AdapterTier.DEVICE} == set(slots)
    assert {a for a in known if a in host} >= {a for a, t in tiers.items() if t is AdapterTier.HOST}
    assert not replica.problems()


def test_what_is_asked_for_more_than_a_replica_may_have_has_more_homes() -> None:
    router = filled(RingHash(), dict.fromkeys(range(30), 0))
    for share, least in ((0.0001, 1), (0.1, 2), (0.5, 10)):
        homes = router.homes(7, share)
        assert sum(homes.values()) == pytest.approx(1, abs=0.01)
        assert sum(part > 0.09 / least for part in homes.values()) >= least
        assert next(iter(homes)) == router.choose(7)
    unbound = filled(RingHash(balance_factor=0), {0: 0, 1: 0})
    assert unbound.homes(7, 0.9) == {unbound.choose(7): 1.0}
    assert RoundRobin().homes(7, 0.5) is None


def test_the_roofline_is_that_of_lorax_plan(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    spec, h100 = load_spec(tmp_path), DEVICES["h100"]
    demand = Demand(1000, 16, "all-linear", 1.0, 128, 64, 0.7)
    figures = plan(spec, DTYPE, demand, h100, Memory(None, None), batch_size=32).figures
    given = argparse.Namespace(context=160, link_bandwidth=64e9, disk_bandwidth=2e9)
    costs = roofline(spec, h100, int(figures["adapter"].value), given)
    assert costs.seconds(32, 0, 32, 0) == pytest.approx(figures["step"].value)
    assert 128 * costs.prompt_token == pytest.approx(figures["prompt"].value)


def filled(router: RingHash, counts: dict[int, int]) -> RingHash:
    for replica, count in counts.items():
        router.join(replica)
        for _ in range(count):
            router.sent(replica)
    return router


def test_a_ring_sends_an_adapter_to_its_home_and_keeps_most_homes_when_one_leaves() -> None:
    router = filled(RingHash(), dict.fromkeys(range(10), 0))
    before = {adapter: router.choose(adapter) for adapter in range(3000)}
    assert before == {adapter: router.choose(adapter) for adapter in range(3000)}
    counts = Counter(before.values())
    assert max(counts.values()) < 1.6 * 300
    router.leave(4)
    after = {adapter: router.choose(adapter) for adapter in range(3000)}
    moved = {adapter for adapter in before if before[adapter] != after[adapter]}
    assert moved == {adapter for adapter, home in before.items() if home == 4}


def test_no_replica_takes_more_than_its_bound() -> None:
    router = filled(RingHash(), dict.fromkeys(range(10), 0))
    for _ in range(400):  # all for one adapter, and none ends
        bound = router.bound()
        chosen = router.choose(7)
        assert router.in_flight[chosen] <= bound
        router.sent(chosen)
    # Envoy's bound for 400 in flight on 10: ceil(ceil(401 * 1.5) / 10).
    assert router.bound() == 61
    assert max(router.in_flight.values()) <= 62
    without = filled(RingHash(balance_factor=0), dict.fromkeys(range(10), 0))
    assert len({without.choose(7) for _ in range(400)}) == 1


def test_an_overloaded_home_is_passed_over_for_the_same_others_each_time() -> None:
    router = filled(RingHash(), dict.fromkeys(range(10), 0))
    home = router.choose(7)
    for _ in range(30):
        router.sent(home)
    first = router.choose(7)
    assert first != home
    assert router.choose(7) == first
    for _ in range(30):
        router.ended(home)
    assert router.choose(7) == home


def test_residency_prefers_the_device_then_the_host_then_the_ring() -> None:
    router = Residency()
    filled(router, {0: 1, 1: 0, 2: 0, 3: 1})
    ring = router.choose(7)
    router.report(0, {7: AdapterTier.DEVICE})
    router.report(1, {7: AdapterTier.HOST})
    router.report(2, {7: AdapterTier.DISK})
    assert router.choose(7) == 0
    router.report(3, {7: AdapterTier.DEVICE, 8: AdapterTier.HOST})
    router.sent(0)
    assert (router.choose(7), router.choose(8)) == (3, 3)
    router.report(0, {})
    router.leave(3)
    assert router.choose(7) == 1
    router.report(1, {7: AdapterTier.DISK})
    assert router.choose(7) in (0, 1, 2)
    assert ring in range(4)


def test_a_fit_finds_the_costs_that_steps_were_made_of() -> None:
    rng = np.random.default_rng(0)
    truth = np.array([0.005, 0.001, 0.0005, 0.002, 0.0, 0.4])
    steps = []
    for _ in range(400):
        counts = [int(n) for n in rng.integers(0, (16, 64, 8, 1))]
        beside = float(rng.random()) * 0.01
        seconds = float(np.dot([1, *counts, beside], truth))
        steps.append(Step(counts[0], counts[1], counts[2], counts[3], beside, seconds, 0.0))
    found = fit(steps, [Loaded(0.1, 0.0), Loaded(0.3, 0.0)])
    names = ("step", "decode", "prompt_token", "adapter", "put", "beside_load")
    assert [getattr(found, name) for name in names] == pytest.approx(truth)
    assert found.noise == pytest.approx((1.0,) * len(found.noise))
    assert found.loads == pytest.approx((0.1, 0.3))
    assert Costs.from_json(found.as_json()).step == pytest.approx(0.005, rel=1e-4)
    with pytest.raises(ValueError, match="at least one of each"):
        fit([], [])


def test_one_slow_step_of_thousands_stays_one_of_thousands() -> None:
    steps = [Step(1, 0, 0, 0, 0.0, 0.01, 0.0) for _ in range(9999)]
    steps.append(Step(1, 0, 0, 0, 0.0, 1.0, 0.0))
    found = fit(steps, [Loaded(0.1, 0.0)])
    alone = found.seconds(1, 0, 0, 0)
    assert alone * np.median(found.noise) == pytest.approx(0.01, rel=0.01)
    mean = alone * sum(found.noise) / len(found.noise)
    assert mean == pytest.approx(sum(step.seconds for step in steps) / len(steps))


def test_no_cost_is_negative() -> None:
    steps = [Step(n, 0, n % 3, 0, 0.0, 0.01 + 0.001 * n - 0.002 * (n % 3), 0.0) for n in range(30)]
    found = fit(steps, [Loaded(0.1, 0.0)])
    assert found.adapter == 0
    assert min(found.step, found.decode, found.prompt_token, found.put) >= 0


def test_a_machines_pace_is_found_and_taken_out() -> None:
    steps = []
    for number in range(400):
        at, decodes = number * 0.1, number % 8
        slow = 3.0 if 10 <= at < 20 else 1.0
        steps.append(Step(decodes, 0, 0, 0, 0.0, slow * (0.01 + 0.001 * decodes), at))
    pace = pace_of(steps, 10.0)
    assert pace.at(15.0) / pace.at(5.0) == pytest.approx(3.0, rel=0.01)
    assert pace.at(1e9) == pace.at(39.0)
    found = fit(steps, [Loaded(0.1, 0.0)], pace=pace)
    assert max(found.noise) < 1.05
    some, slower = work(), work()
    ran(RoundRobin(), some, costs=COSTS)
    ran(RoundRobin(), slower, costs=COSTS, pace=Pace(1.0, (2.0,)))
    assert of_jobs(slower)["ttft_ms_p50"] > 1.5 * of_jobs(some)["ttft_ms_p50"]


def test_affinity_finds_more_adapters_in_memory() -> None:
    hits = {}
    for policy in POLICIES:
        some = work(2000, adapters=60)
        ran(POLICIES[policy](), some)
        found = of_jobs(some)
        hits[policy] = found["found_device"] + found["found_host"]
    assert hits["ring_hash"] > hits["round_robin"] + 0.1
    assert hits["residency"] > hits["round_robin"] + 0.1
