"""What resident adapters cost traffic that uses none: one engine with them, one without."""

from __future__ import annotations

import argparse
import statistics

from benchmarks.adapters import adapters_cache, random_adapters
from benchmarks.command import Result, parser, run
from benchmarks.measure import Turn, alternate, digits, drive, medians
from benchmarks.ours import OfflineEngine
from benchmarks.plot import Chart
from benchmarks.workloads import Request, fixed_shape
from lorax_serve.config import EngineConfig
from lorax_serve.model.source import resolve_model

RANK = 16


async def measure(options: argparse.Namespace) -> Result:
    model = resolve_model(options.model)
    adapters = random_adapters(adapters_cache(model), model, [RANK] * options.adapters)
    config = EngineConfig(model=options.model)
    async with (
        await OfflineEngine.start(config) as without,
        await OfflineEngine.start(config, adapters) as resident,
    ):

        def requests(number: int) -> list[Request]:
            return fixed_shape(
                options.requests,
                options.prompt_tokens,
                options.new_tokens,
                vocab_size=without.vocab_size,
                seed=options.seed + number + 1,
            )

        # Each adapter is used once, so that it is in a slot and not only in host memory.
        once = fixed_shape(
            len(adapters),
            8,
            2,
            vocab_size=without.vocab_size,
            seed=options.seed,
            adapters=list(adapters),
        )
        await drive(resident, once)
        turns = {"without": Turn(without, requests), "resident": Turn(resident, requests)}
        runs = await alternate(turns, options.repeats)
        in_slots = resident.stats.adapters.device
    figures = {name: medians(r.figures() for r in some) for name, some in runs.items()}
    rates = {name: some["output_tokens_per_second"] for name, some in figures.items()}
    # Of turns that follow each other: the machine's own ups and downs are larger than the tax.
    ratios = [
        with_them.output_tokens_per_second / plain.output_tokens_per_second
        for with_them, plain in zip(runs["resident"], runs["without"], strict=True)
    ]
    return Result(
        headline={**rates, "resident_over_without": digits(statistics.median(ratios))},
        details={"figures": figures, "ratios": ratios, "adapters_in_slots": in_slots},
        chart=Chart(
            "Requests for the base model only",
            "output tokens per second",
            {
                "no adapter loaded": {"lorax": rates["without"]},
                f"{in_slots} adapters resident": {"lorax": rates["resident"]},
            },
        ),
    )


if __name__ == "__main__":
    flags = parser(__doc__)
    flags.add_argument("--adapters", type=int, default=32)
    flags.add_argument("--requests", type=int, default=16)
    flags.add_argument("--prompt-tokens", type=int, default=128)
    flags.add_argument("--new-tokens", type=int, default=64)
    run("base_tax", flags, measure)
