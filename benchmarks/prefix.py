"""TTFT of a prompt that begins as another did: under the same adapter, and under another one.

Keys and values depend on the adapter, so that only the first may reuse them.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

from benchmarks.adapters import adapters_cache, random_adapters
from benchmarks.command import Result, parser, run
from benchmarks.measure import digits, drive, medians
from benchmarks.ours import OfflineEngine
from benchmarks.plot import Chart
from benchmarks.workloads import Request, fixed_shape
from lorax_serve.checkpoint.source import resolve_model
from lorax_serve.config import EngineConfig

RANK = 16


async def measure(options: argparse.Namespace) -> Result:
    model = resolve_model(options.model)
    adapters = random_adapters(adapters_cache(model), model, [RANK] * 2)
    config = EngineConfig(model=options.model)
    async with await OfflineEngine.start(config, adapters) as engine:
        rounds = [
            await one(engine, list(adapters), options, number)
            for number in range(-1, options.repeats)
        ]
    figures = medians(rounds[1:])
    first = figures["ttft_ms_first"]
    return Result(
        headline={
            **figures,
            "same_adapter_over_first": digits(figures["ttft_ms_same_adapter"] / first),
            "other_adapter_over_first": digits(figures["ttft_ms_other_adapter"] / first),
        },
        details={"rounds": rounds[1:]},
        chart=Chart(
            f"A shared prefix of {options.prefix_tokens} tokens",
            "TTFT, ms",
            {
                "first request": {"lorax": first},
                "same adapter": {"lorax": figures["ttft_ms_same_adapter"]},
                "another adapter": {"lorax": figures["ttft_ms_other_adapter"]},
            },
        ),
    )


async def one(
    engine: OfflineEngine, names: list[str], options: argparse.Namespace, number: int
) -> dict[str, float]:
    """One round, with a prefix of its own: three requests, one after the other."""
    shape = {"vocab_size": engine.vocab_size, "seed": options.seed + number + 1}
    length = options.prefix_tokens + options.suffix_tokens
    work = fixed_shape(3, length, options.new_tokens, **shape)
    prefix = work[0].prompt[: options.prefix_tokens]

    async def ttft(request: Request, adapter: str) -> float:
        prompt = prefix + request.prompt[options.prefix_tokens :]
        sent = await drive(engine, [replace(request, prompt=prompt, adapter=adapter)])
        return 1e3 * sent.traces[0].ttft

    own, other = names
    return {
        "ttft_ms_first": await ttft(work[0], own),
        "ttft_ms_same_adapter": await ttft(work[1], own),
        "ttft_ms_other_adapter": await ttft(work[2], other),
    }


if __name__ == "__main__":
    flags = parser(__doc__)
    flags.add_argument("--prefix-tokens", type=int, default=500)
    flags.add_argument("--suffix-tokens", type=int, default=20)
    flags.add_argument("--new-tokens", type=int, default=8)
    run("prefix", flags, measure)
