"""What a step and a load take on one real replica of this machine: the simulation's parameters.

The server's engine, alone, is given requests one by one, then in bursts as large as its batch, each
for one of more adapters than its memory holds. Its steps and loads are fitted (``costs.fit``).
"""

from __future__ import annotations

import argparse
from dataclasses import replace

from benchmarks.adapters import adapter_bytes, adapters_cache, random_adapters
from benchmarks.cluster_simulation.costs import Costs, Step, fit
from benchmarks.cluster_simulation.real import RealReplicas, Work
from benchmarks.cluster_simulation.routing import RoundRobin
from benchmarks.cluster_simulation.workload import jobs
from benchmarks.command import Result, parser, publish
from benchmarks.measure import digits, percentile
from benchmarks.plot import Chart
from lorax_serve.checkpoint.source import resolve_model
from lorax_serve.config import EngineConfig

BURSTS = (1, 2, 4, 8, 16)


def measure(options: argparse.Namespace) -> Result:
    model = resolve_model(options.model)
    adapters = random_adapters(adapters_cache(model), model, [options.rank] * options.adapters)
    resident = options.adapters // 2
    config = EngineConfig(
        model=options.model,
        threads=options.threads,
        max_adapter_bytes=int(1.02 * resident * adapter_bytes(model, options.rank)),
        prefix_caching=False,
    )
    replicas = RealReplicas(config, dict(enumerate(adapters.values())), 1)
    did = Work([], [], [])
    try:
        for number in range(-1, options.repeats):
            for burst in BURSTS:
                found = _burst(replicas, burst, options, seed=options.seed + 100 * number + burst)
                if number >= 0:
                    did = Work(did.steps + found.steps, did.loads + found.loads, [])
    finally:
        replicas.close()
    costs = fit(did.steps, did.loads)
    expected = sum(_seconds(costs, step) for step in did.steps)
    return Result(
        headline={
            "step_ms": digits(1e3 * costs.step),
            "decode_ms": digits(1e3 * costs.decode),
            "prompt_token_ms": digits(1e3 * costs.prompt_token),
            "adapter_ms": digits(1e3 * costs.adapter),
            "load_ms_p50": digits(1e3 * percentile(costs.loads, 50)),
        },
        details={
            "costs": costs.as_json(),
            "adapter_bytes": replicas.adapter_bytes,
            "steps": len(did.steps),
            "loads": len(did.loads),
            "seconds_over_fit": digits(sum(step.seconds for step in did.steps) / expected),
        },
        chart=Chart(
            "A step without prompts, an adapter for each sequence",
            "ms",
            {
                f"{count} sequences": {
                    "measured": _decoding(did.steps, count),
                    "fitted": 1e3 * costs.seconds(count, 0, count, 0),
                }
                for count in (1, 2, 4, 8, 16)
            },
        ),
    )


def _burst(replicas: RealReplicas, burst: int, options: argparse.Namespace, seed: int) -> Work:
    """Some bursts of requests, each when the one before it is over."""
    found = Work([], [], [])
    for number in range(max(1, options.requests // burst // len(BURSTS))):
        work = jobs(
            burst,
            1.0,
            options.adapters,
            exponent=0.5,
            prompt_tokens=(32, 128),
            new_tokens=(16, 48),
            seed=seed * 1000 + number + 100_000,
        )
        did = replicas.run(RoundRobin(), [replace(job, arrival=0.0) for job in work], seed + number)
        found = Work(found.steps + did.steps, found.loads + did.loads, [])
    return found


def _seconds(costs: Costs, step: Step) -> float:
    alone = costs.seconds(step.decodes, step.prompt_tokens, step.adapters, step.puts)
    return alone + costs.beside_load * step.beside_load


def _decoding(steps: list[Step], count: int) -> float | None:
    """Median ms of steps of about that many sequences, most with an adapter of their own."""
    near = [
        1e3 * step.seconds
        for step in steps
        if step.decodes == count and not step.prompt_tokens and step.adapters > 0.6 * count
    ]
    return percentile(near, 50) if near else None


if __name__ == "__main__":
    flags = parser(__doc__, repeats=2)
    flags.add_argument("--rank", type=int, default=16)
    flags.add_argument("--adapters", type=int, default=48)
    flags.add_argument("--threads", type=int, default=None, help="of the engine (default: all)")
    flags.add_argument("--requests", type=int, default=120, help="of a round")
    given = flags.parse_args()
    publish("cluster_costs", given, measure(given))
