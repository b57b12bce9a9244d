"""Routing policies side by side: hundreds of replicas, 100,000 adapters, power-law traffic.

Each policy sees the same arrivals twice: ``steady``, and ``changing``, where some replicas die
and are replaced, and others leave and come, all of these cold. Those that are there at the start
have on disk, in memory and in slots what they would have after the same traffic had gone on for
ever (``warm``); arrivals of the first ``--settle`` seconds, when little is in flight yet, are not
counted. What a replica's work takes comes from ``roofline`` or ``measure``; what fetching takes,
and the replicas' memory and disk, from flags.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from pathlib import Path

from benchmarks.cluster_simulation.cluster import Change, Cluster
from benchmarks.cluster_simulation.costs import Costs
from benchmarks.cluster_simulation.figures import TIERS, of_jobs
from benchmarks.cluster_simulation.plot import draw_policies
from benchmarks.cluster_simulation.replica import SOURCE, Job, Limits
from benchmarks.cluster_simulation.routing import POLICIES, Router
from benchmarks.cluster_simulation.warm import warm
from benchmarks.cluster_simulation.workload import jobs, shares
from benchmarks.measure import digits
from benchmarks.record import write_result
from lorax_serve.config import EngineConfig

SCENARIOS = ("steady", "changing")


def simulate(
    policy: str,
    scenario: str,
    options: argparse.Namespace,
    costs: Costs,
    limits: Limits,
    rate: float,
) -> dict[str, float]:
    """One policy in one scenario."""
    started = time.perf_counter()
    router: Router = POLICIES[policy]()
    cluster = Cluster(
        router,
        limits,
        costs,
        options.replicas,
        seed=options.seed,
        report_seconds=options.report_seconds,
    )
    popular = shares(options.adapters, options.exponent)
    on_disk = int(options.disk * 2**30) // limits.adapter_bytes
    warm(router, cluster.replicas, popular, on_disk, options.seed)
    disks = [replica.disk for replica in cluster.replicas.values()]
    work = _jobs(options, int(rate * options.seconds), rate, options.seed)
    changes = _changes(options) if scenario == "changing" else []
    # What there is now stays: looking through it for cycles would take most of the time.
    gc.collect()
    gc.freeze()
    cluster.run(work, changes)
    gc.unfreeze()
    work = [job for job in work if job.arrival >= options.settle]
    replicas = [*cluster.replicas.values(), *cluster.gone]
    # Of the time of arrivals: how long the last requests take is no part of it.
    busy = [replica.busy_seconds / options.seconds for replica in cluster.replicas.values()]
    moved = {
        "source": sum(replica.fetched for replica in replicas),
        "disk": sum(replica.read for replica in replicas),
        "slots": 0 if limits.shared else sum(replica.put for replica in replicas),
    }
    fates = {fate: sum(job.fate == fate for job in work) for fate in ("done", "refused", "failed")}
    return {
        **of_jobs(work),
        **fates,
        "retries": sum(job.retries for job in work),
        **{
            f"gb_from_{where}": digits(n * limits.adapter_bytes / 1e9) for where, n in moved.items()
        },
        "busy_mean": digits(statistics.mean(busy)),
        "busy_most": digits(max(busy)),
        "busy_spread": digits(statistics.pstdev(busy) / statistics.mean(busy)),
        "disk_gb_of_a_replica": digits(statistics.mean(disks) * limits.adapter_bytes / 1e9),
        "simulation_seconds": digits(time.perf_counter() - started),
    }


def request_seconds(costs: Costs, options: argparse.Namespace, batch: int) -> float:
    """Of a replica for one request while its batch is full and each row has its own adapter."""
    step = costs.seconds(batch, 0, batch, 0) / batch
    prompt, answer = (sum(each) / 2 for each in (options.prompt_tokens, options.new_tokens))
    return float(prompt * costs.prompt_token + answer * step)


def _jobs(options: argparse.Namespace, count: int, rate: float, seed: int) -> list[Job]:
    return jobs(
        count,
        rate,
        options.adapters,
        exponent=options.exponent,
        prompt_tokens=options.prompt_tokens,
        new_tokens=options.new_tokens,
        seed=seed,
    )


def _changes(options: argparse.Namespace) -> list[Change]:
    """A twentieth dies and is replaced; a tenth leaves, and later as many come."""
    count, seconds = options.replicas, options.seconds
    few, some = max(1, count // 20), max(1, count // 10)
    dying, leaving = range(few), range(few, few + some)
    fresh = range(count, count + few + some)
    return [
        *(Change(0.3 * seconds, "die", each) for each in dying),
        *(Change(0.4 * seconds, "join", each) for each in fresh[:few]),
        *(Change(0.6 * seconds, "leave", each) for each in leaving),
        *(Change(0.8 * seconds, "join", each) for each in fresh[few:]),
    ]


def _range(text: str) -> tuple[int, int]:
    least, most = map(int, text.split(","))
    return least, most


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    results = Path("benchmarks/results")
    add(
        "--costs",
        type=Path,
        default=results / "cluster_roofline.json",
        help="from roofline, measure or validate",
    )
    add("--adapter-bytes", type=int, default=9_768_960, help="where --costs does not say")
    add("--replicas", type=int, default=300)
    add("--adapters", type=int, default=100_000)
    add("--exponent", type=float, default=1.0, help="popularity falls with rank ** -exponent")
    add("--load", type=float, default=0.6, help="share of the most that the replicas could serve")
    add("--seconds", type=float, default=8.0, help="of arrivals")
    add("--settle", type=float, default=2.0, help="seconds of these that are not counted")
    add("--prompt-tokens", type=_range, default=(32, 224))
    add("--new-tokens", type=_range, default=(16, 112))
    add("--slots", type=int, default=64)
    add("--batch", type=int, default=32)
    add("--memory", type=float, default=32.0, help="GiB for adapters: --max-adapter-bytes")
    add("--disk", type=float, default=1000.0, help="GiB for adapters")
    add("--fetch-latency", type=float, default=0.1, help="seconds to an object's first byte")
    add("--fetch-bandwidth", type=float, default=100e6, help="bytes a second of one fetch")
    add("--report-seconds", type=float, default=5.0, help="age of metrics for residency")
    add("--policies", nargs="+", default=list(POLICIES), choices=POLICIES)
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=results)
    add("--name", default="cluster_simulation", help="of the files written to that directory")
    options = parser.parse_args()

    measured = json.loads(options.costs.read_text())
    fields, size = measured["costs"], measured.get("adapter_bytes", options.adapter_bytes)
    if isinstance(fields, list):  # of validate's rounds, without the machine's pace in each
        fields = {name: value for name, value in fields[0].items() if name != "pace"}
    costs = Costs.from_json(fields)
    on_gpu = measured.get("on_gpu", False)
    limits = Limits(
        size,
        int(options.memory * 2**30),
        options.slots,
        options.batch,
        EngineConfig().batch_limits(on_gpu).tokens,
        shared=not on_gpu,
        max_length=options.prompt_tokens[1] + options.new_tokens[1],
        fetch_seconds=options.fetch_latency + size / options.fetch_bandwidth,
    )
    rate = options.load * options.replicas / request_seconds(costs, options, options.batch)
    found: dict[str, dict[str, dict[str, float]]] = {}
    for scenario in SCENARIOS:
        for policy in options.policies:
            figures = simulate(policy, scenario, options, costs, limits, rate)
            found.setdefault(scenario, {})[policy] = figures
            print(f"{scenario} {policy}: {json.dumps(figures)}", file=sys.stderr, flush=True)
    headline = {
        f"{policy}_{scenario}_{name}": figures[name]
        for scenario, some in found.items()
        for policy, figures in some.items()
        for name in ("ttft_ms_p99", "found_device")
    }
    settings = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(options).items()
        if name not in ("out", "name")
    }
    content = {
        "settings": settings,
        "headline": headline,
        "requests_per_second": digits(rate),
        "costs_are": measured.get("kind", "measured"),
        "adapter_bytes": size,
        "adapters_in_memory": int(options.memory * 2**30) // size,
        "found_in": [*TIERS[:-1], SOURCE],
        "figures": found,
    }
    write_result(options.out, options.name, content)
    draw_policies(found, options.out / f"{options.name}.png")
    print(json.dumps(headline))


if __name__ == "__main__":
    main()
