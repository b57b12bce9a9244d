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

import torch

from benchmarks.record import write_result
from lorax_serve.adapter import LoRAConfig, save
from lorax_serve.adapter.weights import tensor_name
from lorax_serve.client import AsyncClient
from lorax_serve.config import EngineConfig, ServerConfig
from lorax_serve.model.source import resolve_model
from lorax_serve.model.spec import DecoderSpec
from lorax_serve.server.app import Server

STREAMS = 8
NEW_TOKENS = 200
# The first gaps hold the other streams' prompts.
WARM_UP_TOKENS = 5


def write_random_adapter(directory: Path, rank: int, seed: int) -> None:
    """An adapter of small random weights on all linears of the embedded model."""
    modules = DecoderSpec.from_directory(resolve_model("smollm2-135m")).linear_modules()
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for path, shape in modules.items():
        if not shape.is_output:
            a = torch.randn(rank, shape.in_features, generator=generator)
            b = torch.randn(shape.out_features, rank, generator=generator)
            tensors[tensor_name(path, "A")] = 0.02 * a
            tensors[tensor_name(path, "B")] = 0.02 * b
    config = LoRAConfig(r=rank, lora_alpha=rank, target_modules="all-linear")
    save(directory, config, tensors)


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


async def measure(adapters: Path) -> dict[str, object]:
    config = ServerConfig(
        engine=EngineConfig(max_batch_size=STREAMS),
        host="127.0.0.1",
        port=0,
        metrics_port=None,
        adapters=adapters,
    )
    async with Server(config) as server, AsyncClient(f"127.0.0.1:{server.port}") as client:
        await client.unload_adapter("late")
        await run_streams(client, load=False)
        quiet, _ = await run_streams(client, load=False)
        busy, loads = await run_streams(client, load=True)
    limit = 2 * statistics.median(busy) + 0.05
    return {
        "quiet_itl_ms": {"median": 1e3 * statistics.median(quiet), "max": 1e3 * max(quiet)},
        "loading_itl_ms": {"median": 1e3 * statistics.median(busy), "max": 1e3 * max(busy)},
        "loads": len(loads),
        "load_ms_median": 1e3 * statistics.median(loads),
        "limit_ms": 1e3 * limit,
        "holds": max(busy) <= limit,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        write_random_adapter(Path(place) / "late", 16, seed=0)
        result = asyncio.run(measure(Path(place)))
    print(result)
    print(write_result(options.out, "load_disturbance", result))


if __name__ == "__main__":
    main()
