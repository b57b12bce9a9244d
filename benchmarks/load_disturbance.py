"""How much does loading an adapter delay the tokens of running streams?

Promise: no token by more than 2 x the median inter-token time + 50 ms. Eight streams run on the
embedded model over gRPC while an adapter (rank 16, all linears) is loaded and unloaded again and
again; each stream's longest gap is compared with the median of all gaps.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from pathlib import Path

from benchmarks.adapters import write_random_adapter
from benchmarks.command import Result, parser, run
from benchmarks.measure import medians
from benchmarks.plot import Chart
from lorax_serve.checkpoint.source import resolve_model
from lorax_serve.client import AsyncClient
from lorax_serve.config import EngineConfig, ServerConfig
from lorax_serve.server.app import Server

STREAMS = 8
NEW_TOKENS = 200
# The first gaps hold the other streams' prompts.
WARM_UP_TOKENS = 5


async def run_streams(client: AsyncClient, *, load: bool) -> tuple[list[float], list[float]]:
    """Run the streams; returns all gaps between tokens and the durations of the loads."""
    gaps: list[float] = []
    loads: list[float] = []

    async def follow() -> None:
        seen, last = 0, time.perf_counter()
        prompt = "Once upon a time"
        async for chunk in client.stream(prompt, max_new_tokens=NEW_TOKENS, ignore_eos=True):
            now = time.perf_counter()
            seen = chunk.generated_token_count
            if seen > WARM_UP_TOKENS:
                gaps.append(now - last)
            last = now

    streams = [asyncio.create_task(follow()) for _ in range(STREAMS)]
    await asyncio.sleep(0.5)
    while load and not any(stream.done() for stream in streams):
        started = time.perf_counter()
        await client.load_adapter("late")
        loads.append(time.perf_counter() - started)
        await client.unload_adapter("late")
        await asyncio.sleep(0.2)
    await asyncio.gather(*streams)
    return gaps, loads


async def measure(options: argparse.Namespace) -> Result:
    with tempfile.TemporaryDirectory() as place:
        write_random_adapter(Path(place) / "late", resolve_model(options.model), 16, seed=0)
        return await _measure(options, Path(place))


async def _measure(options: argparse.Namespace, adapters: Path) -> Result:
    config = ServerConfig(
        engine=EngineConfig(model=options.model, max_batch_size=STREAMS),
        host="127.0.0.1",
        port=0,
        metrics_port=None,
        adapters=adapters,
    )
    rounds = []
    async with Server(config) as server, AsyncClient(f"127.0.0.1:{server.port}") as client:
        await client.unload_adapter("late")
        await run_streams(client, load=False)
        for _ in range(options.repeats):
            quiet, _ = await run_streams(client, load=False)
            busy, loads = await run_streams(client, load=True)
            limit = 2 * statistics.median(busy) + 0.05
            rounds.append(
                {
                    "quiet_itl_ms_p50": 1e3 * statistics.median(quiet),
                    "quiet_itl_ms_max": 1e3 * max(quiet),
                    "loading_itl_ms_p50": 1e3 * statistics.median(busy),
                    "loading_itl_ms_max": 1e3 * max(busy),
                    "load_ms_p50": 1e3 * statistics.median(loads),
                    "limit_ms": 1e3 * limit,
                }
            )
    figures = medians(rounds)
    return Result(
        headline={
            **figures,
            "holds": all(each["loading_itl_ms_max"] <= each["limit_ms"] for each in rounds),
        },
        details={"rounds": rounds},
        chart=Chart(
            f"{STREAMS} streams while an adapter is loaded again and again",
            "inter-token time, ms",
            {
                "undisturbed, median": {"lorax": figures["quiet_itl_ms_p50"]},
                "loading, median": {"lorax": figures["loading_itl_ms_p50"]},
                "loading, longest": {"lorax": figures["loading_itl_ms_max"]},
                "promised at most": {"lorax": figures["limit_ms"]},
            },
        ),
    )


if __name__ == "__main__":
    run("load_disturbance", parser(__doc__), measure)
