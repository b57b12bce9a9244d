"""Punica's workloads: throughput by the popularity of adapters, in a closed loop."""

from __future__ import annotations

import argparse
from dataclasses import replace

from benchmarks.adapters import adapters_cache, random_adapters
from benchmarks.command import Result, parser, run
from benchmarks.measure import Turn, alternate, medians
from benchmarks.ours import OfflineEngine
from benchmarks.plot import Chart
from benchmarks.workloads import POPULARITIES, Request, fixed_shape, punica_adapters
from lorax_serve.checkpoint.source import resolve_model
from lorax_serve.config import EngineConfig

RANK = 16


async def measure(options: argparse.Namespace) -> Result:
    model = resolve_model(options.model)
    adapters = random_adapters(adapters_cache(model), model, [RANK] * options.requests)
    config = EngineConfig(model=options.model, max_batch_size=options.batch)
    async with await OfflineEngine.start(config, adapters) as engine:

        def requests(popularity: str, number: int) -> list[Request]:
            seed = options.seed + number + 1
            work = fixed_shape(
                options.requests,
                options.prompt_tokens,
                options.new_tokens,
                vocab_size=engine.vocab_size,
                # No prompt comes twice, so that the prefix cache helps none of them.
                seed=len(POPULARITIES) * seed + POPULARITIES.index(popularity),
            )
            named = punica_adapters(
                popularity, options.requests, list(adapters), options.batch, seed=seed
            )
            return [replace(r, adapter=name) for r, name in zip(work, named, strict=True)]

        def turn(popularity: str) -> Turn:
            return Turn(engine, lambda number: requests(popularity, number), options.batch)

        turns = {popularity: turn(popularity) for popularity in POPULARITIES}
        runs = await alternate(turns, options.repeats)
    figures = {name: medians(r.figures() for r in some) for name, some in runs.items()}
    rates = {name: some["output_tokens_per_second"] for name, some in figures.items()}
    return Result(
        headline=rates,
        details={"figures": figures},
        chart=Chart(
            f"Popularity of adapters, {options.batch} requests in flight",
            "output tokens per second",
            {name: {"lorax": rate} for name, rate in rates.items()},
        ),
    )


if __name__ == "__main__":
    flags = parser(__doc__)
    flags.add_argument("--batch", type=int, default=32, help="requests in flight")
    flags.add_argument("--requests", type=int, default=64, help="in all")
    flags.add_argument("--prompt-tokens", type=int, default=128)
    flags.add_argument("--new-tokens", type=int, default=64)
    run("popularity", flags, measure)
