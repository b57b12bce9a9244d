"""What gRPC costs: streams over gRPC against the same requests given to the engine alone.

The server is ``lorax-serve`` in its own processes; the client is this one, on the same cores.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from benchmarks.adapters import random_adapters
from benchmarks.command import Result, parser, run
from benchmarks.measure import System, Turn, alternate, digits, medians
from benchmarks.ours import GrpcServer, OfflineEngine
from benchmarks.peers.cases import CASES, Case
from benchmarks.plot import Chart
from lorax_serve.checkpoint.source import resolve_model
from lorax_serve.config import EngineConfig

MEASURED = ("base", "lora8")


async def measure(options: argparse.Namespace) -> Result:
    with tempfile.TemporaryDirectory() as place:
        return await _measure(options, Path(place))


async def _measure(options: argparse.Namespace, place: Path) -> Result:
    model = resolve_model(options.model)
    config = EngineConfig(model=options.model)
    adapters = random_adapters(place, model, CASES["lora8"].ranks)
    async with (
        await OfflineEngine.start(config, adapters) as engine,
        await GrpcServer.start(config, place) as server,
    ):

        def turn(system: System, case: Case) -> Turn:
            names = list(adapters) if case.ranks else []
            return Turn(system, lambda n: case.workload(options, engine.vocab_size, names, n))

        turns = {
            f"{how}_{name}": turn(system, CASES[name])
            for name in MEASURED
            for how, system in (("offline", engine), ("grpc", server))
        }
        runs = await alternate(turns, options.repeats)
    figures = {name: medians(r.figures() for r in some) for name, some in runs.items()}
    rates = {name: some["output_tokens_per_second"] for name, some in figures.items()}
    ratios = {
        f"grpc_over_offline_{name}": digits(rates[f"grpc_{name}"] / rates[f"offline_{name}"])
        for name in MEASURED
    }
    return Result(
        headline={**rates, **ratios},
        details={"figures": figures},
        chart=Chart(
            f"{options.requests} streams over gRPC, and the engine alone",
            "output tokens per second",
            {
                name: {"engine alone": rates[f"offline_{name}"], "over gRPC": rates[f"grpc_{name}"]}
                for name in MEASURED
            },
        ),
    )


if __name__ == "__main__":
    flags = parser(__doc__)
    Case.add_flags(flags)
    run("over_grpc", flags, measure)
