"""Replicas, a gateway and time: the events of a simulated cluster."""

from __future__ import annotations

import functools
import heapq
import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from benchmarks.cluster_simulation.costs import STEADY, Costs, Pace
from benchmarks.cluster_simulation.replica import Job, Limits, Replica
from benchmarks.cluster_simulation.routing import Router

__all__ = ["Change", "Cluster"]


class Change(NamedTuple):
    """At a time, a replica joins (cold), leaves (drains), or dies."""

    seconds: float
    what: str
    replica: int


class Cluster:
    """Runs jobs through a router to replicas.

    A job on a replica that dies is sent again if it had no token yet (clients may retry then, and
    only then); else it has failed.

    Args:
        router: chooses.
        limits, costs: of each replica.
        replicas: how many there are at the start, numbered from 0.
        seed: of the noise; each replica's is its own.
        report_seconds: how old a replica's metrics are at most when the router sees them.
        jump, exact, pace: see ``Replica``.

    Attributes:
        replicas: those that run, and those that drain.
        gone: those that have left or died.
        jobs: all that have come, in that order.
    """

    def __init__(
        self,
        router: Router,
        limits: Limits,
        costs: Costs,
        replicas: int,
        *,
        seed: int = 0,
        report_seconds: float = 5.0,
        jump: bool = True,
        exact: bool = False,
        pace: Pace = STEADY,
    ) -> None:
        self._pace, self._exact = pace, exact
        self._router, self._limits, self._costs = router, limits, costs
        self._seed, self._report_seconds, self._jump = seed, report_seconds, jump
        self._events: list[tuple[float, int, Callable[[float], object]]] = []
        self._order = itertools.count()
        self.replicas: dict[int, Replica] = {}
        self.gone: list[Replica] = []
        self.jobs: list[Job] = []
        self._open = 0
        self._now = 0.0
        self._next: Iterator[Job] = iter(())
        for number in range(replicas):
            self._join(number, 0.0)

    def run(self, jobs: Iterable[Job], changes: Sequence[Change] = ()) -> float:
        """Send each job when it arrives, and go on until all are over; returns the time then.

        Args:
            jobs: by arrival.
            changes: to the replicas.
        """
        for change in changes:
            self._at(change.seconds, functools.partial(self._change, change))
        events, now = self._events, 0.0
        for job in jobs:
            self.jobs.append(job)
            self._open += 1
            while events and events[0][0] <= job.arrival:
                now, _, call = heapq.heappop(events)
                call(now)
            self._send(job, job.arrival)
        while events and self._open:
            now, _, call = heapq.heappop(events)
            call(now)
        return now

    def run_closed(self, jobs: Iterable[Job], at_once: int) -> float:
        """Keep ``at_once`` jobs under way until all are over; returns the time then. A job arrives
        when it is sent: one whenever another is over. It goes on from an earlier run's time."""
        self._next = iter(jobs)
        for job in itertools.islice(self._next, at_once):
            self._arrive(job, self._now)
        events = self._events
        while events and self._open:
            self._now, _, call = heapq.heappop(events)
            call(self._now)
        return self._now

    def _arrive(self, job: Job, now: float) -> None:
        job.arrival = now
        self.jobs.append(job)
        self._open += 1
        self._send(job, now)

    def _at(self, when: float, call: Callable[[float], object]) -> None:
        heapq.heappush(self._events, (when, next(self._order), call))

    def _send(self, job: Job, now: float) -> None:
        job.replica, job.tier = self._router.choose(job.adapter), ""
        self._router.sent(job.replica)
        self.replicas[job.replica].submit(job, now)

    def _over(self, job: Job, now: float) -> None:
        self._open -= 1
        self._router.ended(job.replica)
        following = next(self._next, None)
        if following is not None:  # an event of its own: the replica is in the middle of a step
            self._open += 1
            self._at(now, functools.partial(self._follow, following))

    def _follow(self, job: Job, now: float) -> None:
        self._open -= 1
        self._arrive(job, now)

    def _join(self, number: int, now: float) -> None:
        rng = random.Random(self._seed * 1_000_003 + number)
        self.replicas[number] = Replica(
            self._limits,
            self._costs,
            rng,
            self._at,
            self._over,
            jump=self._jump,
            exact=self._exact,
            pace=self._pace,
        )
        self._router.join(number)
        if self._router.wants_reports:
            first = now + rng.random() * self._report_seconds
            self._at(first, functools.partial(self._report, number))

    def _report(self, number: int, now: float) -> None:
        if number in self._router.in_flight:
            self._router.report(number, self.replicas[number].store.tiers())
            self._at(now + self._report_seconds, functools.partial(self._report, number))

    def _change(self, change: Change, now: float) -> None:
        number = change.replica
        if change.what == "join":
            self._join(number, now)
            return
        self._router.leave(number)
        if change.what == "leave":
            return
        replica = self.replicas.pop(number)
        self.gone.append(replica)
        for job in replica.die():
            if job.first < 0:
                job.retries += 1
                self._send(job, now)
            else:
                job.fate = "failed"
                self._over(job, now)
