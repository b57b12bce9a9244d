"""S-LoRA's synthetic workload (arXiv:2311.03285, section 7.1): more and more adapters."""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np

from benchmarks.gpu.bench import Bench, say
from benchmarks.gpu.serving import LocalEngine
from benchmarks.measure import digits
from benchmarks.workloads import s_lora

__all__ = ["measure"]


def measure(bench: Bench) -> dict[str, Any]:
    """The same requests, all there at once, spread evenly over more and more adapters.

    Adapters of one rank share their weights in host memory; on the device each has its own copy, so
    that what does not fit there is copied again and again, as it would be.
    """
    sizes = bench.sizes
    _run(bench, sizes.populations[0], sizes.rows)  # what is built at first use is built then
    runs = []
    for population in (0, *sizes.populations):
        runs.append(_run(bench, population, sizes.requests))
        say(f"slora: {population} adapters done")
    least, most = runs[1], runs[-1]
    return {
        "lengths": list(sizes.lengths),
        "ranks": list(sizes.slora_ranks),
        "requests": sizes.requests,
        "runs": runs,
        "most_over_fewest": digits(most["output_tokens_per_s"] / least["output_tokens_per_s"]),
    }


def _run(bench: Bench, population: int, count: int) -> dict[str, float]:
    """``count`` requests over so many adapters; 0 is the base model alone."""
    sizes = bench.sizes
    engine = LocalEngine(bench)
    ranks = sizes.slora_ranks
    versions = [engine.add(bench.adapter(ranks[n % len(ranks)])) for n in range(population)]
    order = np.random.default_rng(0).permutation(count).tolist()
    names = [str(place % population) if population else None for place in order]
    requests = s_lora(sizes.lengths, names, vocab_size=bench.llama.spec.vocab_size, seed=0)
    started = time.perf_counter()
    sent = [
        engine.submit(
            request.prompt,
            request.new_tokens,
            None if request.adapter is None else versions[int(request.adapter)],
        )
        for request in requests
    ]
    engine.finish()
    seconds = time.perf_counter() - started
    adapters = engine.stats.adapters
    tokens = sum(len(engine.times[request]) for request in sent)
    result = {
        "adapters": population,
        "seconds": digits(seconds),
        "output_tokens_per_s": digits(tokens / seconds),
        "requests_per_s": digits(count / seconds),
        "ttft_ms_p50": digits(1e3 * statistics.median(engine.ttft(each) for each in sent)),
        "device_evictions": adapters.device_evictions,
    }
    bench.release()
    return result
