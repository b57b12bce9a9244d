"""Which replica a request goes to. Plain integers: replicas and adapters are numbers."""

from __future__ import annotations

import bisect
import hashlib
import itertools
import math
import random
from collections import defaultdict
from collections.abc import Iterator, Mapping

from lorax_serve.core import AdapterTier

__all__ = ["POLICIES", "Residency", "RingHash", "RoundRobin", "Router"]

BALANCE_FACTOR = 150
"""Envoy's ``hash_balance_factor``: at most 1.5 times the mean of requests in flight."""

PASSED_ON = 0.2
"""About the share of requests that their home passes on because it has its bound: 0.18 in a run at
the defaults. Only where adapters are at the start depends on it."""
_PASSED_TO = 3
"""Replicas that an adapter gets in this way, at the start."""


class Router:
    """A gateway. It knows which of its requests are in flight, as Envoy does.

    Attributes:
        in_flight: requests of each replica that takes new ones.
        wants_reports: whether ``report`` is of use.
    """

    wants_reports = False

    def __init__(self) -> None:
        self.in_flight: dict[int, int] = {}

    def join(self, replica: int) -> None:
        """A replica is ready."""
        self.in_flight[replica] = 0

    def leave(self, replica: int) -> None:
        """A replica takes no more requests."""
        self.in_flight.pop(replica, None)

    def sent(self, replica: int) -> None:
        """A request has gone to a replica."""
        self.in_flight[replica] += 1

    def ended(self, replica: int) -> None:
        """A request of a replica has ended."""
        if replica in self.in_flight:
            self.in_flight[replica] -= 1

    def report(self, replica: int, tiers: Mapping[int, AdapterTier]) -> None:
        """A replica's metrics were read: where its adapters are."""

    def choose(self, adapter: int) -> int:
        """The replica for a request."""
        raise NotImplementedError

    def homes(self, adapter: int, share: float) -> dict[int, float] | None:
        """The replicas that get an adapter's requests in the long run, and about what share of
        these each gets; None: all, and equally many.

        Args:
            adapter: which.
            share: of all requests, that are for it.
        """
        raise NotImplementedError


class RoundRobin(Router):
    """Each replica in turn."""

    def __init__(self) -> None:
        super().__init__()
        self._turn = itertools.count()

    def choose(self, adapter: int) -> int:
        """See ``Router``."""
        replicas = list(self.in_flight)
        return replicas[next(self._turn) % len(replicas)]

    def homes(self, adapter: int, share: float) -> dict[int, float] | None:
        """See ``Router``."""
        return None


class RingHash(Router):
    """Consistent hashing with bounded load, as Envoy's ``RING_HASH`` with ``hash_balance_factor``.

    Source: Envoy's ``ring_hash_lb.cc`` and ``BoundedLoadHashingLoadBalancer`` in
    ``thread_aware_lb_impl.cc`` (arXiv:1608.01350, arXiv:1908.08762): a replica that has more than
    its bound is passed over for the others in an order drawn from the adapter's hash; if all have,
    the least loaded gets it. Hashes are blake2b's instead of xxHash's.

    Args:
        points: of each replica on the ring.
        balance_factor: the bound in percent of the mean; 0: there is none.
    """

    def __init__(self, points: int = 100, balance_factor: int = BALANCE_FACTOR) -> None:
        super().__init__()
        self._points = points
        self._balance_factor = balance_factor
        self._ring: list[tuple[int, int]] = []
        self._total = 0

    def join(self, replica: int) -> None:
        """See ``Router``."""
        super().join(replica)
        for point in range(self._points):
            bisect.insort(self._ring, (_hash(f"replica-{replica}_{point}"), replica))

    def leave(self, replica: int) -> None:
        """See ``Router``."""
        self._total -= self.in_flight.get(replica, 0)
        super().leave(replica)
        self._ring = [each for each in self._ring if each[1] != replica]

    def sent(self, replica: int) -> None:
        """See ``Router``."""
        super().sent(replica)
        self._total += 1

    def ended(self, replica: int) -> None:
        """See ``Router``."""
        if replica in self.in_flight:
            self._total -= 1
        super().ended(replica)

    def bound(self) -> int:
        """Requests in flight with which a replica takes another."""
        slots = ((self._total + 1) * self._balance_factor + 99) // 100
        return max(1, -(-slots // len(self.in_flight)))

    def choose(self, adapter: int) -> int:
        """See ``Router``."""
        key = _hash(f"adapter-{adapter}")
        home = self._home(key)
        if not self._balance_factor:
            return home
        bound, in_flight = self.bound(), self.in_flight
        if in_flight[home] <= bound:
            return home
        for other in self._others(key):
            if in_flight[other] <= bound:
                return other
        return min(in_flight, key=in_flight.__getitem__)

    def homes(self, adapter: int, share: float) -> dict[int, float]:
        """See ``Router``. As many as it takes for none to have more than its bound by this alone;
        and a few get what is passed on when these have their bound for a moment."""
        key = _hash(f"adapter-{adapter}")
        home = self._home(key)
        if not self._balance_factor:
            return {home: 1.0}
        count = math.ceil(100 * share * len(self.in_flight) / self._balance_factor)
        others = (other for other in self._others(key) if other != home)
        order = [home, *itertools.islice(others, count - 1 + _PASSED_TO)]
        parts = [(1 - PASSED_ON) / count] * count
        parts += [(1 - PASSED_ON) * PASSED_ON**at for at in range(1, _PASSED_TO + 1)]
        return dict(zip(order, parts, strict=False))

    def _home(self, key: int) -> int:
        place = bisect.bisect_left(self._ring, (key, -1)) % len(self._ring)
        return self._ring[place][1]

    def _others(self, key: int) -> Iterator[int]:
        """All replicas in the order of an adapter."""
        others = list(self.in_flight)
        draws = random.Random(key)
        for at in range(len(others)):
            swap = draws.randrange(at, len(others))
            others[at], others[swap] = others[swap], others[at]
            yield others[at]


class Residency(RingHash):
    """The least loaded of the replicas that have the adapter on the device, else in host memory, as
    far as the last metrics say; within ``RingHash``'s bound. Else where ``RingHash`` sends it."""

    wants_reports = True

    def __init__(self, points: int = 100, balance_factor: int = BALANCE_FACTOR) -> None:
        super().__init__(points, balance_factor)
        self._where: defaultdict[int, dict[int, AdapterTier]] = defaultdict(dict)
        self._reported: dict[int, dict[int, AdapterTier]] = {}

    def leave(self, replica: int) -> None:
        """See ``Router``."""
        super().leave(replica)
        self.report(replica, {})

    def report(self, replica: int, tiers: Mapping[int, AdapterTier]) -> None:
        """See ``Router``."""
        found: dict[int, AdapterTier] = {}
        found |= {a: tier for a, tier in tiers.items() if tier is not AdapterTier.DISK}
        for adapter in self._reported.get(replica, {}).keys() - found.keys():
            del self._where[adapter][replica]
        for adapter, tier in found.items():
            self._where[adapter][replica] = tier
        self._reported[replica] = found

    def choose(self, adapter: int) -> int:
        """See ``Router``."""
        where, bound, in_flight = self._where.get(adapter, {}), self.bound(), self.in_flight
        for tier in (AdapterTier.DEVICE, AdapterTier.HOST):
            having = [replica for replica, at in where.items() if at is tier]
            found = [r for r in having if in_flight.get(r, bound + 1) <= bound]
            if found:
                return min(found, key=lambda replica: (in_flight[replica], replica))
        return super().choose(adapter)


POLICIES = {"round_robin": RoundRobin, "ring_hash": RingHash, "residency": Residency}


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
