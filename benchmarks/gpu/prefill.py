"""Prompt tokens a second, of one prompt and of several in a step, with and without adapters."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.gpu.bench import Bench, advance, say
from benchmarks.gpu.shapes import PEAK_FLOPS
from benchmarks.measure import digits
from lorax_serve.core import BASE, Batch

__all__ = ["measure"]


def measure(bench: Bench) -> dict[str, Any]:
    """Each case computes whole prompts in one step, again and again in the same KV rows."""
    sizes = bench.sizes
    rank = sizes.ranks[0]
    bench.fill_slots(rank, max(count for count, _ in sizes.prompts))
    cases = []
    for count, length in sizes.prompts:
        seconds = {with_lora: _seconds(bench, count, length, with_lora) for with_lora in (0, 1)}
        tokens = count * length
        cases.append(
            {
                "prompts": count,
                "length": length,
                "base_ms": digits(1e3 * seconds[0]),
                "base_tokens_per_s": digits(tokens / seconds[0]),
                "base_share_of_peak": digits(
                    _flops(bench, count, length) / seconds[0] / PEAK_FLOPS
                ),
                "lora_ms": digits(1e3 * seconds[1]),
                "lora_tokens_per_s": digits(tokens / seconds[1]),
                "lora_over_base": digits(seconds[1] / seconds[0]),
            }
        )
        say(f"prefill: {count} x {length} done")
    bench.release()
    return {"rank": rank, "cases": cases}


def _seconds(bench: Bench, count: int, length: int, with_lora: int) -> float:
    """The median of some steps; with LoRA, each prompt has its own adapter."""
    rows = [bench.request(row, length) for row in range(count)]
    for place, row in enumerate(rows):
        row.adapter_slot = place if with_lora else BASE
    batch = Batch(prefills=[(row, length) for row in rows])
    times = []
    for number in range(2 + bench.sizes.rounds * 3):
        seconds = bench.seconds(lambda: advance(bench.runner, batch))
        for row in rows:
            del row.tokens[length:]
            row.computed = 0
        if number >= 2:
            times.append(seconds)
    return statistics.median(times)


def _flops(bench: Bench, count: int, length: int) -> int:
    """Of the layers' linears and of attention; logits are of the last tokens only."""
    spec = bench.llama.spec
    linears = sum(site.in_features * site.out_features for site in spec.sites())
    attention = spec.num_layers * spec.num_heads * spec.head_dim * length  # half of it is masked
    return 2 * count * length * (linears + attention)
