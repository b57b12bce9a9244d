"""Twice as many adapters as slots, against as many adapters as slots: TTFT with the same arrivals.

All adapters are in host memory; what the second case adds is waiting for slots and filling them.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

from benchmarks.adapters import adapters_cache, random_adapters
from benchmarks.command import Result, parser, run
from benchmarks.measure import Turn, alternate, digits, drive, medians
from benchmarks.ours import OfflineEngine
from benchmarks.plot import Chart
from benchmarks.workloads import (
    Request,
    arriving,
    fixed_shape,
    gamma_arrivals,
    synthetic_adapters,
    uniform,
)
from lorax_serve.checkpoint.source import resolve_model
from lorax_serve.config import EngineConfig

RANK = 16


async def measure(options: argparse.Namespace) -> Result:
    model = resolve_model(options.model)
    adapters = random_adapters(adapters_cache(model), model, [RANK] * 2 * options.slots)
    names = list(adapters)
    config = EngineConfig(model=options.model, adapter_slots=options.slots)
    counts = {"adapters_as_slots": options.slots, "twice_as_many": 2 * options.slots}
    async with await OfflineEngine.start(config, adapters) as engine:

        def requests(case: str, number: int, rate: float) -> list[Request]:
            seed = options.seed + number + 2
            work = fixed_shape(
                options.requests,
                options.prompt_tokens,
                options.new_tokens,
                vocab_size=engine.vocab_size,
                seed=2 * seed + list(counts).index(case),
            )
            drawn = names[: counts[case]]
            chosen = synthetic_adapters(len(work), drawn, uniform(len(drawn)), seed=seed)
            work = [replace(r, adapter=name) for r, name in zip(work, chosen, strict=True)]
            return arriving(work, gamma_arrivals(len(work), rate, options.cv, seed=seed))

        # All at once, so that the rate can be a share of what the engine can do on this machine.
        await drive(engine, requests("adapters_as_slots", -2, 1e9))
        at_once = await drive(engine, requests("twice_as_many", -2, 1e9))
        rate = options.load * at_once.figures()["requests_per_second"]

        def turn(case: str) -> Turn:
            return Turn(engine, lambda number: requests(case, number, rate))

        runs = await alternate({case: turn(case) for case in counts}, options.repeats)
        adapter_stats = engine.stats.adapters._asdict()
    figures = {name: medians(r.figures() for r in some) for name, some in runs.items()}
    p50 = {name: some["ttft_ms_p50"] for name, some in figures.items()}
    return Result(
        headline={
            **{f"ttft_ms_p50_{name}": value for name, value in p50.items()},
            "ttft_p50_ratio": digits(p50["twice_as_many"] / p50["adapters_as_slots"]),
        },
        details={"figures": figures, "requests_per_second": rate, "adapters": adapter_stats},
        chart=Chart(
            f"{options.slots} slots, the same arrivals",
            "TTFT p50, ms",
            {f"{n} adapters": {"lorax": p50[name]} for name, n in counts.items()},
        ),
    )


if __name__ == "__main__":
    flags = parser(__doc__)
    flags.add_argument("--slots", type=int, default=8)
    flags.add_argument("--load", type=float, default=0.6, help="share of the most it could serve")
    flags.add_argument("--cv", type=float, default=1.0, help="burstiness of arrivals; 1 is Poisson")
    flags.add_argument("--requests", type=int, default=64)
    flags.add_argument("--prompt-tokens", type=int, default=128)
    flags.add_argument("--new-tokens", type=int, default=32)
    run("thrash", flags, measure)
