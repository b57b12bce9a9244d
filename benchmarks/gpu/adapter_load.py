"""How much longer the first token takes where the adapter comes from disk, or from the host."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu.adapters import write_adapter
from benchmarks.gpu.bench import Bench, say
from benchmarks.gpu.serving import LocalEngine
from benchmarks.measure import digits
from lorax_serve.core import AdapterTier

__all__ = ["measure"]


def measure(bench: Bench) -> dict[str, Any]:
    """One request at a time on an idle engine with one device slot and host memory for two.

    Three adapters take turns there, so that in each round one comes from disk, is used again in its
    slot, and makes way for one from host memory. "disk" is a file that was just written: what the
    system reads from is its page cache. ``load_ms`` is a first load, with all its checks.
    """
    sizes, rank = bench.sizes, bench.sizes.ranks[0]
    nbytes = bench.adapter(rank).nbytes
    prompt = bench.request(0, sizes.load_prompt).tokens
    seconds: dict[str, list[float]] = {name: [] for name in ("base", "disk", "device", "host")}
    loads = []
    with tempfile.TemporaryDirectory() as place:
        write_adapter(Path(place), bench.adapter_weights(rank))
        engine = LocalEngine(bench, adapter_slots=1, max_adapter_bytes=int(2.5 * nbytes))
        versions = []
        for _ in range(3):
            started = time.perf_counter()
            version = engine.read(Path(place))
            engine.until(lambda wanted=version: engine.is_known(wanted))  # type: ignore[misc]
            loads.append(time.perf_counter() - started)
            versions.append(version)

        def ask(version: int | None, tier: AdapterTier | None) -> float:
            if version is not None and engine.tier(version) is not tier:
                raise RuntimeError(f"the adapter is not where it should be: {tier}")
            request = engine.submit(prompt, 1, version)
            engine.finish()
            return engine.ttft(request)

        for number in range(-2, sizes.loads):  # two rounds to warm up
            turn, third = versions[number % 2], versions[2]
            times = {
                "base": ask(None, None),
                "disk": ask(turn, AdapterTier.DISK),
                "device": ask(turn, AdapterTier.DEVICE),
                "host": ask(third, AdapterTier.HOST),
            }
            if number >= 0:
                for name, each in times.items():
                    seconds[name].append(each)
    bench.release()
    copies = [
        bench.seconds(lambda: bench.runner.put_adapter(0, bench.adapter(rank)))
        for _ in range(sizes.loads)
    ]
    bench.release()
    ms = {name: 1e3 * statistics.median(some) for name, some in seconds.items()}
    say("adapter_load done")
    return {
        "rank": rank,
        "adapter_bytes": nbytes,
        "prompt_tokens": sizes.load_prompt,
        "ttft_ms": {name: digits(each) for name, each in ms.items()},
        "added_ms": {name: digits(ms[name] - ms["base"]) for name in ("device", "host", "disk")},
        "load_ms": digits(1e3 * statistics.median(loads)),
        "copy_ms": digits(1e3 * statistics.median(copies)),
        "copy_gb_per_s": digits(nbytes / statistics.median(copies) / 1e9),
    }
