"""A long prompt arrives while others decode: how long do their tokens wait?

Inter-token times of the decoding streams between the long prompt's arrival and its first token,
against the median without it.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools

from benchmarks.command import Result, parser, run
from benchmarks.measure import drive, medians, percentile
from benchmarks.ours import OfflineEngine
from benchmarks.plot import Chart
from benchmarks.workloads import fixed_shape
from lorax_serve.config import EngineConfig


async def measure(options: argparse.Namespace) -> Result:
    config = EngineConfig(model=options.model)
    async with await OfflineEngine.start(config) as engine:
        rounds = [await one(engine, options, number) for number in range(-1, options.repeats)]
    figures = medians(rounds[1:])
    ratio = medians([{"r": f["during_itl_ms_p99"] / f["quiet_itl_ms_p50"]} for f in rounds[1:]])
    return Result(
        headline={**figures, "p99_during_over_quiet_median": ratio["r"]},
        details={"rounds": rounds[1:]},
        chart=Chart(
            f"{options.streams} decoding streams, a prompt of {options.prompt_tokens} tokens",
            "inter-token time, ms",
            {
                "undisturbed, median": {"lorax": figures["quiet_itl_ms_p50"]},
                "during the prompt, median": {"lorax": figures["during_itl_ms_p50"]},
                "during the prompt, p99": {"lorax": figures["during_itl_ms_p99"]},
            },
        ),
    )


async def one(engine: OfflineEngine, options: argparse.Namespace, number: int) -> dict[str, float]:
    """One round: the streams undisturbed, then with the long prompt among them."""
    seed = options.seed + 3 * (number + 1)

    def streams(seed: int) -> asyncio.Task[list[list[float]]]:
        work = fixed_shape(
            options.streams, 32, options.new_tokens, vocab_size=engine.vocab_size, seed=seed
        )

        async def tokens() -> list[list[float]]:
            return [trace.tokens for trace in (await drive(engine, work)).traces]

        return asyncio.create_task(tokens())

    quiet = gaps_within(await streams(seed), 0.0, float("inf"))
    running = streams(seed + 1)
    # Into the middle of their decoding.
    await asyncio.sleep(0.25 * options.new_tokens * percentile(quiet, 50) + 0.1)
    long = fixed_shape(1, options.prompt_tokens, 2, vocab_size=engine.vocab_size, seed=seed + 2)
    (trace,) = (await drive(engine, long)).traces
    during = gaps_within(await running, trace.sent, trace.tokens[0])
    if not during:
        raise RuntimeError("the streams ended before the long prompt: raise --new-tokens")
    return {
        "quiet_itl_ms_p50": 1e3 * percentile(quiet, 50),
        "during_itl_ms_p50": 1e3 * percentile(during, 50),
        "during_itl_ms_p99": 1e3 * percentile(during, 99),
        "long_ttft_ms": 1e3 * trace.ttft,
    }


def gaps_within(streams: list[list[float]], start: float, end: float) -> list[float]:
    """The times between tokens that overlap ``[start, end]``, but each stream's first one, in which
    the others' prompts are computed."""
    return [
        after - before
        for tokens in streams
        for before, after in itertools.pairwise(tokens[1:])
        if after > start and before < end
    ]


if __name__ == "__main__":
    flags = parser(__doc__)
    flags.add_argument("--streams", type=int, default=8)
    flags.add_argument("--new-tokens", type=int, default=200, help="of each stream")
    flags.add_argument("--prompt-tokens", type=int, default=2000, help="of the long prompt")
    run("long_prompt", flags, measure)
