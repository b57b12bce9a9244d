"""Adapter loads of three real servers behind a real Envoy, against the simulation.

The same calls as ``make local-cluster`` makes, so many under way at a time: popularity by a power
law, memory for 26 of 60 adapters in each replica, by round robin and by the ring. Which adapters
share a replica is drawn anew with each cluster's ports, and which calls their home passes on
depends on how long each takes; so both sides are means of several clusters. ``validate`` compares
times; here it is the gateway that is compared, and the engine's decisions in whole servers.

Needs what ``make local-cluster`` does.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
from collections import Counter
from pathlib import Path

from benchmarks.cluster_simulation.cluster import Cluster
from benchmarks.cluster_simulation.costs import Costs
from benchmarks.cluster_simulation.replica import Job, Limits
from benchmarks.cluster_simulation.routing import POLICIES
from benchmarks.command import Result, parser, publish
from benchmarks.measure import digits
from benchmarks.plot import Chart
from deploy.local import cluster as local
from deploy.local import proofs, replica
from deploy.local.load import power_law

ROUTERS = ("round_robin", "ring_hash")
_DRAWS = 20
_PROMPT_TOKENS, _NEW_TOKENS = 8, 4


def measure(options: argparse.Namespace) -> Result:
    """Both sides, and how far they are apart."""
    costs = Costs.from_json(_fields(options.costs))
    real = [_real() for _ in range(options.repeats)]
    simulated = [_simulated(costs, draw) for draw in range(_DRAWS)]
    errors = {
        name: digits(statistics.mean(s[name] for s in simulated) / _mean(real, name) - 1)
        for name in simulated[0]
    }
    both = {"real": real, "simulated": simulated}
    worst = max(map(abs, errors.values()))
    return Result(
        headline={"worst_error": worst, "within": options.within, "errors": errors},
        details=both,
        chart=Chart(
            "Three replicas, memory for 26 of 60 adapters",
            "adapters loaded by 2,500 calls",
            {
                name.replace("_", " "): {
                    "real": _mean(real, name),
                    "simulated": _mean(simulated, name),
                }
                for name in ROUTERS
            },
        ),
    )


def _real() -> dict[str, float]:
    """Of a cluster of its own."""
    with tempfile.TemporaryDirectory(prefix="lorax-local-") as directory:
        cluster = local.Cluster(Path(directory))
        try:
            cluster.start()
            found = asyncio.run(proofs.adapter_loads(cluster))
        finally:
            cluster.stop()
    print(found, file=sys.stderr, flush=True)
    return {
        **{name: found[name] for name in ROUTERS},
        "ring_hash_busiest_over_mean": found["ring_hash_busiest_over_mean"],
    }


def _simulated(costs: Costs, draw: int) -> dict[str, float]:
    """Of a cluster whose ring is drawn by the numbers that the adapters have."""
    numbers = {name: draw * len(local.NAMES) + at for at, name in enumerate(local.NAMES)}
    found: dict[str, float] = {}
    for router in ROUTERS:
        replicas = len(local.ADDRESSES)
        cluster = Cluster(POLICIES[router](), _limits(), costs, replicas, seed=draw)
        for each in cluster.replicas.values():
            for number in numbers.values():
                each.know(number)
        cluster.run_closed(_jobs(numbers, proofs.WARM_CALLS, proofs.WARM_SEED), proofs.AT_ONCE)
        before = sum(each.read for each in cluster.replicas.values())
        counted = _jobs(numbers, proofs.CALLS, proofs.SEED)
        cluster.run_closed(counted, proofs.AT_ONCE)
        found[router] = sum(each.read for each in cluster.replicas.values()) - before
    busiest = max(Counter(job.replica for job in counted).values())
    found["ring_hash_busiest_over_mean"] = digits(busiest * replicas / len(counted))
    return found


def _jobs(numbers: dict[str, int], count: int, seed: int) -> list[Job]:
    """The calls of ``proofs.adapter_loads``."""
    choose = power_law(local.NAMES, seed=seed)
    return [
        Job(number, 0.0, numbers[choose()], _PROMPT_TOKENS, _NEW_TOKENS) for number in range(count)
    ]


def _limits() -> Limits:
    """Of a replica of the local cluster."""
    return Limits(
        replica.ADAPTER_BYTES,
        replica.RESIDENT * replica.ADAPTER_BYTES,
        replica.ADAPTER_SLOTS,
        max_batch_size=replica.MAX_BATCH_SIZE,
        max_length=1024,
    )


def _mean(found: list[dict[str, float]], name: str) -> float:
    return digits(statistics.mean(each[name] for each in found))


def _fields(path: Path) -> dict[str, object]:
    """The first costs in a result of ``validate``, whose servers are small, too."""
    fields = dict(json.loads(path.read_text())["costs"][0])
    fields.pop("pace", None)
    return fields


if __name__ == "__main__":
    flags = parser(__doc__, repeats=10)
    flags.add_argument(
        "--costs",
        type=Path,
        default=Path("benchmarks/results/cluster_validation.json"),
        help="a result of validate: how long a step of a small model takes",
    )
    flags.add_argument("--within", type=float, default=0.15)
    given = flags.parse_args()
    given.model = "random, tiny"  # that of the local cluster, whatever --model says
    publish("gateway_validation", given, measure(given))
