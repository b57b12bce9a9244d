"""The tokens of running streams while adapters come in beside them."""

from __future__ import annotations

import itertools
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu.adapters import write_adapter
from benchmarks.gpu.bench import Bench, say
from benchmarks.gpu.serving import LocalEngine
from benchmarks.measure import digits, percentile

__all__ = ["measure"]

_PROMPT = 8


def measure(bench: Bench) -> dict[str, Any]:
    """Gaps between tokens of the same streams, in four runs.

    In ``quiet`` nothing else runs. In the others short requests for one token come again and again:
    for the base (``requests``), for adapters that are in host memory but not yet on the device
    (``host``), and for adapters that are read from disk first (``disk``). What loading costs is the
    difference to ``requests``, whose prompts are the same.
    """
    rank = bench.sizes.ranks[0]
    with tempfile.TemporaryDirectory() as place:
        write_adapter(Path(place), bench.adapter_weights(rank))
        runs = {
            name: _run(bench, name, Path(place), rank)
            for name in ("warm-up", "quiet", "requests", "host", "disk")
        }
    del runs["warm-up"]
    calm = runs["requests"]["itl_ms_p99"]
    return {
        "streams": bench.sizes.streams,
        "rank": rank,
        "runs": runs,
        "host_p99_over_requests": digits(runs["host"]["itl_ms_p99"] / calm),
        "disk_p99_over_requests": digits(runs["disk"]["itl_ms_p99"] / calm),
        "disk_p99_over_quiet": digits(runs["disk"]["itl_ms_p99"] / runs["quiet"]["itl_ms_p99"]),
    }


def _run(bench: Bench, kind: str, place: Path, rank: int) -> dict[str, float]:
    sizes = bench.sizes
    engine = LocalEngine(bench)
    prompts = [bench.request(number, sizes.load_prompt).tokens for number in range(sizes.streams)]
    streams = [engine.submit(prompt, sizes.stream_tokens) for prompt in prompts]
    # The first gaps hold the other streams' prompts.
    engine.until(lambda: all(len(engine.times[stream]) > 1 for stream in streams))
    before = {stream: len(engine.times[stream]) for stream in streams}
    intrusions = _intrusions(engine, bench, kind, place, rank)
    count = 0
    for number in itertools.count(1):
        engine.pump()
        if any(len(engine.times[stream]) >= sizes.stream_tokens for stream in streams):
            break
        if number % sizes.load_every == 0 and kind not in ("quiet", "warm-up"):
            count += next(intrusions)
    if not count and kind not in ("quiet", "warm-up"):
        raise RuntimeError(f"{kind}: nothing came in while the streams ran: make them longer")
    gaps = [
        1e3 * (later - earlier)
        for stream in streams
        for earlier, later in itertools.pairwise(engine.times[stream][before[stream] - 1 :])
    ]
    engine.finish()
    bench.release()
    say(f"disturbance: {kind} done")
    return {
        "intrusions": count,
        "itl_ms_p50": digits(statistics.median(gaps)),
        "itl_ms_p99": digits(percentile(gaps, 99)),
        "itl_ms_max": digits(max(gaps)),
    }


def _intrusions(
    engine: LocalEngine, bench: Bench, kind: str, place: Path, rank: int
) -> Iterator[int]:
    """Bring in one request each time; yields how many have come: none while one is being read."""
    prompt = bench.request(0, _PROMPT).tokens
    while True:
        if kind == "requests":
            engine.submit(prompt, 1)
        elif kind == "host":
            engine.submit(prompt, 1, engine.add(bench.adapter(rank)))
        else:
            version = engine.read(place)
            while not engine.is_known(version):
                yield 0
            engine.submit(prompt, 1, version)
        yield 1
