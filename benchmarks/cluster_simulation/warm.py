"""Where adapters are before the traffic begins: as if it had gone on for ever.

Requests come independently, so the time since the last one for an adapter is exponential, the
longer the less popular it is. Drawn for each adapter of a replica and sorted, these times are the
order of its least recently used in the steady state: no warm-up requests are needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks.cluster_simulation.replica import Replica
from benchmarks.cluster_simulation.routing import Router

__all__ = ["warm"]


def warm(
    router: Router,
    replicas: Mapping[int, Replica],
    shares: np.ndarray[Any, Any],
    most: int,
    seed: int,
) -> None:
    """Place adapters on disk, in memory and in slots by their popularity.

    Args:
        router: which replicas get whose requests.
        replicas: all that the router knows, empty.
        shares: of the requests, by adapter.
        most: adapters that a replica's disk holds.
        seed: of the times.
    """
    everywhere: list[int] = []
    homes: dict[int, list[tuple[int, float]]] = {number: [] for number in replicas}
    for adapter, share in enumerate(shares.tolist()):
        where = router.homes(adapter, share)
        if where is None:
            everywhere.append(adapter)
            continue
        for number, part in where.items():
            homes[number].append((adapter, share * part))
    rng = np.random.default_rng(seed)
    for number, replica in replicas.items():
        own = np.array([*everywhere, *(adapter for adapter, _ in homes[number])], int)
        rates = np.array([part for _, part in homes[number]])
        rates = np.concatenate([shares[everywhere] / len(replicas), rates])
        ages = rng.standard_exponential(len(own)) / rates
        recent = own[np.argsort(ages)[:most]]
        replica.warm(recent.tolist(), len(shares))
        if router.wants_reports:
            router.report(number, replica.store.tiers())
