"""TTFT of a lone request by where its adapter is: in a device slot, in host memory, or on disk.

The engine has one slot, and host memory for two adapters and a half. Which tier a request found is
checked with the engine's own counts.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from benchmarks.adapters import adapter_bytes, adapters_cache, random_adapters
from benchmarks.command import Result, parser, run
from benchmarks.measure import drive, medians
from benchmarks.ours import OfflineEngine
from benchmarks.plot import Chart
from benchmarks.workloads import fixed_shape
from lorax_serve.adapter import WEIGHTS_FILE
from lorax_serve.checkpoint.source import resolve_model
from lorax_serve.config import EngineConfig

TIERS = {
    "base": "base model",
    "device": "in a slot",
    "host": "in host memory",
    "disk": "on disk, file cached",
    "disk_uncached": "on disk, not cached",
}


async def measure(options: argparse.Namespace) -> Result:
    model = resolve_model(options.model)
    adapters = random_adapters(adapters_cache(model), model, [options.rank] * 4)
    budget = int(2.5 * adapter_bytes(model, options.rank))
    config = EngineConfig(model=options.model, adapter_slots=1, max_adapter_bytes=budget)
    async with await OfflineEngine.start(config, adapters) as engine:
        rounds = [
            await one(engine, adapters, options, number) for number in range(-1, options.repeats)
        ]
    figures = medians(rounds[1:])
    return Result(
        headline={f"ttft_ms_{tier}": value for tier, value in figures.items()},
        details={"rounds": rounds[1:], "adapter_bytes": adapter_bytes(model, options.rank)},
        chart=Chart(
            f"A lone request, adapter of rank {options.rank}",
            "TTFT, ms",
            {label: {"lorax": figures[tier]} for tier, label in TIERS.items()},
        ),
    )


async def one(
    engine: OfflineEngine, adapters: dict[str, Path], options: argparse.Namespace, number: int
) -> dict[str, float]:
    """One round: TTFT in ms by tier."""
    first, second, third, fourth = adapters
    sent = 0

    async def ttft(adapter: str | None, reads: int | None = None) -> float:
        nonlocal sent
        before = engine.stats.adapters.reads
        # No prompt comes twice.
        seed = options.seed + 100 * (number + 1) + sent
        sent += 1
        (request,) = fixed_shape(
            1,
            options.prompt_tokens,
            2,
            vocab_size=engine.vocab_size,
            seed=seed,
            adapters=[adapter],
        )
        (trace,) = (await drive(engine, [request])).traces
        found = engine.stats.adapters.reads - before
        if reads is not None and found != reads:
            raise RuntimeError(f"the request read {found} adapters from disk, not {reads}")
        return 1e3 * trace.ttft

    async def fill(*names: str) -> None:
        for name in names:
            await ttft(name)

    figures = {"base": await ttft(None, reads=0)}
    await fill(first, second)
    figures["device"] = await ttft(second, reads=0)
    figures["host"] = await ttft(first, reads=0)
    await fill(third, fourth)
    figures["disk"] = await ttft(first, reads=1)
    await fill(third, fourth)
    _forget(adapters[first] / WEIGHTS_FILE)
    figures["disk_uncached"] = await ttft(first, reads=1)
    return figures


def _forget(path: Path) -> None:
    """Drop a file from the system's page cache."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    flags = parser(__doc__)
    flags.add_argument("--rank", type=int, default=16)
    flags.add_argument("--prompt-tokens", type=int, default=32)
    run("cold_load", flags, measure)
