"""Sending requests to a system of ours, and what is counted: throughput, TTFT and ITL."""

from __future__ import annotations

import asyncio
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from benchmarks.workloads import Request

__all__ = [
    "Run",
    "System",
    "Trace",
    "Turn",
    "alternate",
    "digits",
    "drive",
    "medians",
    "percentile",
]


@dataclass(slots=True)
class Trace:
    """What happened to one request: when it was sent, when each token came (perf_counter), and the
    tokens' ids, from ``ours.OfflineEngine``."""

    request: Request
    sent: float
    tokens: list[float] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)

    @property
    def ttft(self) -> float:
        """Seconds to the first token."""
        return self.tokens[0] - self.sent

    @property
    def gaps(self) -> list[float]:
        """Seconds between tokens."""
        return [b - a for a, b in itertools.pairwise(self.tokens)]


@dataclass(frozen=True, slots=True)
class Run:
    """One pass over a workload."""

    started: float
    traces: list[Trace]

    @property
    def seconds(self) -> float:
        """From the start to the last token."""
        return max(trace.tokens[-1] for trace in self.traces) - self.started

    @property
    def output_tokens_per_second(self) -> float:
        """Generated tokens of all requests."""
        return sum(len(trace.tokens) for trace in self.traces) / self.seconds

    def figures(self) -> dict[str, float]:
        """Throughput and latencies."""
        ttft = [1e3 * trace.ttft for trace in self.traces]
        gaps = [1e3 * gap for trace in self.traces for gap in trace.gaps]
        return {
            "requests_per_second": len(self.traces) / self.seconds,
            "output_tokens_per_second": self.output_tokens_per_second,
            "ttft_ms_p50": percentile(ttft, 50),
            "ttft_ms_p99": percentile(ttft, 99),
            "itl_ms_p50": percentile(gaps, 50),
            "itl_ms_p99": percentile(gaps, 99),
        }


class System(Protocol):
    """Something that answers requests: ``ours.OfflineEngine`` or ``ours.GrpcServer``."""

    async def generate(self, request: Request) -> Trace:
        """Answer one request; its trace ends with its last token."""

    def pause(self) -> None:
        """Stop its processes, so that they take nothing from the one being measured."""

    def resume(self) -> None:
        """Let them go on."""


async def drive(system: System, requests: Sequence[Request], in_flight: int | None = None) -> Run:
    """Send each request at its time of arrival, with at most ``in_flight`` at once (a closed loop).

    Raises:
        RuntimeError: a request got another number of tokens than it asked for.
    """
    places = asyncio.Semaphore(in_flight or len(requests))
    started = time.perf_counter()

    async def send(request: Request) -> Trace:
        await asyncio.sleep(max(0.0, started + request.arrival - time.perf_counter()))
        async with places:
            trace = await system.generate(request)
        if len(trace.tokens) != request.new_tokens:
            raise RuntimeError(f"{len(trace.tokens)} tokens came, not {request.new_tokens}")
        return trace

    return Run(started, await asyncio.gather(*map(send, requests)))


class Turn(NamedTuple):
    """What one case does in its turn: send the requests of the round of that number to a system."""

    system: System
    requests: Callable[[int], Sequence[Request]]
    in_flight: int | None = None


async def alternate(turns: Mapping[str, Turn], repeats: int) -> dict[str, list[Run]]:
    """Give each case its turn in each of ``repeats`` rounds, after a warm-up (round -1).

    Every other round goes in the opposite order, so that no case profits from its place. All
    systems but the one whose turn it is are paused.
    """
    runs: dict[str, list[Run]] = {name: [] for name in turns}
    systems = list({id(turn.system): turn.system for turn in turns.values()}.values())
    for system in systems:
        system.pause()
    try:
        for number in range(-1, repeats):
            for name, turn in list(turns.items())[:: 1 if number % 2 else -1]:
                turn.system.resume()
                run = await drive(turn.system, turn.requests(number), turn.in_flight)
                turn.system.pause()
                if number >= 0:
                    runs[name].append(run)
    finally:
        for system in systems:
            system.resume()
    return runs


def medians(figures: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The median of each figure over several runs, to four digits."""
    rows = list(figures)
    return {name: digits(statistics.median(row[name] for row in rows)) for name in rows[0]}


def digits(value: float) -> float:
    """Four significant digits: more is noise."""
    return float(f"{value:.4g}")


def percentile(values: Sequence[float], percent: float) -> float:
    """The value that ``percent`` of the values do not exceed (nearest rank); 0 of none."""
    if not values:
        return 0.0
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]
