"""S-LoRA's synthetic workload: what does it cost to have 1,000 adapters instead of 5?

All adapters are registered with one engine whose host memory holds ``--resident`` of them; a case
is how many of them the requests name, and how popular each is. Lengths, prompts and arrivals do not
depend on either. ``saturated``: a closed loop of ``--in-flight`` requests. ``cv1``, ``cv4``: Gamma
arrivals at ``--load`` times the saturated rate of the fewest adapters.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable

from benchmarks.adapters import adapter_bytes, adapters_cache, random_adapters
from benchmarks.command import Result, parser, run
from benchmarks.measure import Run, Turn, alternate, digits, drive, medians
from benchmarks.ours import OfflineEngine
from benchmarks.plot import Chart
from benchmarks.workloads import (
    Request,
    arriving,
    gamma_arrivals,
    power_law,
    s_lora,
    synthetic_adapters,
    uniform,
)
from lorax_serve.checkpoint.source import resolve_model
from lorax_serve.config import EngineConfig

SHARES = {"uniform": uniform, "power_law": power_law}


async def measure(options: argparse.Namespace) -> Result:
    model = resolve_model(options.model)
    most = max(options.adapters)
    adapters = random_adapters(adapters_cache(model), model, [options.rank] * most)
    names = list(adapters)
    # A little more than the weights alone: the engine may keep them padded.
    budget = int(1.02 * options.resident * adapter_bytes(model, options.rank))
    config = EngineConfig(
        model=options.model,
        max_adapter_bytes=budget,
        adapter_slots=options.resident,
        # All cases have the same prompts; a later one must not profit from an earlier one.
        prefix_caching=False,
    )
    async with await OfflineEngine.start(config) as engine:
        base_only = s_lora(
            options.lengths,
            [None] * options.requests,
            vocab_size=engine.vocab_size,
            seed=options.seed,
        )
        # The KV cache takes its memory now, so that what follows is the adapters'.
        await drive(engine, base_only, options.in_flight)
        memory = {"without_adapters": engine.memory_bytes}
        await engine.load(adapters)
        memory["all_registered"] = engine.memory_bytes

        def requests(popularity: str, count: int, number: int) -> list[Request]:
            seed = options.seed + number + 1
            shares = SHARES[popularity](count)
            chosen = synthetic_adapters(options.requests, names[:count], shares, seed=seed)
            return s_lora(options.lengths, chosen, vocab_size=engine.vocab_size, seed=seed)

        def saturated(popularity: str, count: int) -> Turn:
            return Turn(engine, lambda n: requests(popularity, count, n), options.in_flight)

        cases = [(how, count) for how in SHARES for count in options.adapters]
        turns = {f"saturated_{how}_{count}": saturated(how, count) for how, count in cases}
        runs = await alternate(turns, options.repeats)
        figures = _figures(runs.items())
        few = figures[f"saturated_uniform_{min(options.adapters)}"]
        rate = options.load * few["requests_per_second"]

        def bursts(popularity: str, count: int, cv: float) -> Turn:
            def work(number: int) -> list[Request]:
                seed = options.seed + number + 1
                times = gamma_arrivals(options.requests, rate, cv, seed=seed)
                return arriving(requests(popularity, count, number), times)

            return Turn(engine, work)

        turns = {
            f"cv{cv:g}_{how}_{count}": bursts(how, count, cv)
            for cv in options.cv
            for how, count in cases
        }
        figures |= _figures((await alternate(turns, options.repeats)).items())
        memory["at_the_end"] = engine.memory_bytes
        tiers = engine.stats.adapters._asdict()
    few_count, many_count = min(options.adapters), max(options.adapters)
    ratios = {
        f"throughput_ratio_{how}": digits(
            figures[f"saturated_{how}_{many_count}"]["output_tokens_per_second"]
            / figures[f"saturated_{how}_{few_count}"]["output_tokens_per_second"]
        )
        for how in SHARES
    }
    growth = memory["at_the_end"] - memory["without_adapters"]
    return Result(
        headline={
            **ratios,
            "adapters": [few_count, many_count],
            "memory_growth_over_budget": digits(growth / budget),
        },
        details={
            "figures": figures,
            "offered_requests_per_second": rate,
            "engine_memory_bytes": memory,
            "adapter_budget_bytes": budget,
            "tiers": tiers,
        },
        chart=Chart(
            f"S-LoRA synthetic, {options.resident} adapters in memory, saturated",
            "output tokens per second",
            {
                f"{count} adapters": {
                    how.replace("_", " "): figures[f"saturated_{how}_{count}"][
                        "output_tokens_per_second"
                    ]
                    for how in SHARES
                }
                for count in options.adapters
            },
        ),
    )


def _figures(runs: Iterable[tuple[str, list[Run]]]) -> dict[str, dict[str, float]]:
    return {name: medians(run.figures() for run in some) for name, some in runs}


def _lengths(text: str) -> tuple[int, int]:
    least, most = map(int, text.split(","))
    return least, most


if __name__ == "__main__":
    flags = parser(__doc__)
    flags.add_argument("--adapters", type=int, nargs="+", default=[5, 100, 1000], metavar="N")
    flags.add_argument("--rank", type=int, default=8)
    flags.add_argument("--resident", type=int, default=64, help="adapters that memory holds")
    flags.add_argument("--requests", type=int, default=96)
    flags.add_argument(
        "--lengths",
        type=_lengths,
        default=(8, 128),
        help="of prompts and outputs: least,most; S-LoRA's own are 8,512",
    )
    flags.add_argument("--in-flight", type=int, default=32)
    flags.add_argument("--load", type=float, default=0.7)
    flags.add_argument("--cv", type=float, nargs="*", default=[1.0, 4.0])
    run("many_adapters", flags, measure)
