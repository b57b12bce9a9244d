"""The engine alone, without gRPC: throughput and latency of the headline's cases, in turns.

The cases are those of ``benchmarks.peers``; here all run on one engine that holds all adapters.
"""

from __future__ import annotations

import argparse

from benchmarks.adapters import adapters_cache, random_adapters
from benchmarks.command import Result, parser, run
from benchmarks.measure import Turn, alternate, medians
from benchmarks.ours import OfflineEngine
from benchmarks.peers.cases import CASES, Case
from benchmarks.plot import Chart
from lorax_serve.checkpoint.source import resolve_model
from lorax_serve.config import EngineConfig


async def measure(options: argparse.Namespace) -> Result:
    model = resolve_model(options.model)
    adapters = {
        case: random_adapters(adapters_cache(model), model, case.ranks) for case in CASES.values()
    }
    everything = {name: path for some in adapters.values() for name, path in some.items()}
    async with await OfflineEngine.start(EngineConfig(model=options.model), everything) as engine:

        def turn(case: Case) -> Turn:
            names = list(adapters[case])
            return Turn(engine, lambda n: case.workload(options, engine.vocab_size, names, n))

        turns = {name: turn(case) for name, case in CASES.items()}
        runs = await alternate(turns, options.repeats)
    figures = {name: medians(r.figures() for r in some) for name, some in runs.items()}
    rates = {name: some["output_tokens_per_second"] for name, some in figures.items()}
    return Result(
        headline=rates,
        details={"figures": figures},
        chart=Chart(
            "lorax's engine by what is in the batch",
            "output tokens per second",
            {name.replace("_", " "): {"lorax": rate} for name, rate in rates.items()},
        ),
    )


if __name__ == "__main__":
    flags = parser(__doc__)
    Case.add_flags(flags)
    run("offline", flags, measure)
