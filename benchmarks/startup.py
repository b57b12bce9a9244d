"""From the start of ``lorax-serve`` to its health being SERVING, with warm caches."""

from __future__ import annotations

import argparse
import statistics

from benchmarks.command import Result, parser, run
from benchmarks.measure import digits
from benchmarks.ours import GrpcServer
from benchmarks.plot import Chart
from lorax_serve.config import EngineConfig


async def measure(options: argparse.Namespace) -> Result:
    seconds = []
    for _ in range(options.repeats + 1):
        async with await GrpcServer.start(EngineConfig(model=options.model)) as server:
            seconds.append(server.start_seconds)
    del seconds[0]  # it may have converted the model or compiled the kernels
    median = digits(statistics.median(seconds))
    return Result(
        headline={"start_to_ready_seconds": median},
        details={"seconds": seconds},
        chart=Chart("lorax-serve: start to ready", "seconds", {"warm caches": {"lorax": median}}),
    )


if __name__ == "__main__":
    run("startup", parser(__doc__), measure)
