"""From the parts' results to the figures that the GPU path is judged by."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.gpu.decode import find
from benchmarks.gpu.shapes import Shape
from benchmarks.plot import Chart

__all__ = ["decode_chart", "figures", "read_parts"]


def read_parts(directory: Path, shape: str, parts: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """The results that are there, by part."""
    files = {part: directory / f"gpu_{part}_{shape}.json" for part in parts}
    return {part: json.loads(file.read_text()) for part, file in files.items() if file.exists()}


def figures(shape: Shape, results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """One flat line: None for what was not measured, in parts that did not run or failed.

    ``parts`` says when each part that is in the line was measured, ``devices`` on what.
    """

    def ask(part: str, read: Callable[[Any], Any]) -> Any:
        try:
            return read(results[part])
        except (KeyError, TypeError):  # it did not run, or a peer of it failed
            return None

    sizes, rank = shape.sizes, shape.sizes.ranks[0]
    batch = sizes.peer_batch if sizes.peer_batch in sizes.batches else sizes.batches[-1]

    def case(batch: int, distinct: int, name: str) -> Any:
        return ask("decode", lambda it: (find(it, batch, rank, distinct) or {})[name])

    line: dict[str, Any] = {
        "shape": shape.name,
        "devices": sorted({str(result.get("device")) for result in results.values()}),
        "parts": {part: result.get("date") for part, result in results.items()},
        f"decode_b{batch}_ms": case(batch, 0, "step_ms"),
        f"decode_b{batch}_floor_ms": case(batch, 0, "floor_ms"),
        f"decode_b{batch}_over_floor": case(batch, 0, "over_floor"),
        f"decode_b{batch}_tb_per_s": case(batch, 0, "tb_per_s"),
    }
    for size in sizes.batches:
        for distinct in sorted({*(n for n in sizes.distinct if n <= size), size}):
            line[f"lora_over_base_b{size}_d{distinct}"] = case(size, distinct, "over_base")
    line |= {
        "base_tax": ask("decode", lambda it: it["base_tax"]["resident_over_without"]),
        "top_p_over_greedy": ask("decode", lambda it: it["sampled"]["top_p_over_greedy"]),
        "prefill_tokens_per_s": ask(
            "prefill", lambda it: max(row["base_tokens_per_s"] for row in it["cases"])
        ),
        "prefill_lora_over_base": ask("prefill", lambda it: it["cases"][-1]["lora_over_base"]),
        "step_over_peft_mixed": ask("peers", lambda it: it["peft"]["lorax_over_peft_mixed"]),
        "throughput_over_continuous_batching": ask(
            "peers", lambda it: it["continuous_batching"]["throughput_over_transformers"]
        ),
        "itl_over_continuous_batching": ask(
            "peers", lambda it: it["continuous_batching"]["itl_over_transformers"]
        ),
        "slora_most_over_fewest": ask("slora", lambda it: it["most_over_fewest"]),
        "host_added_ttft_ms": ask("adapter_load", lambda it: it["added_ms"]["host"]),
        "disk_added_ttft_ms": ask("adapter_load", lambda it: it["added_ms"]["disk"]),
        "host_itl_p99_ratio": ask("disturbance", lambda it: it["host_p99_over_requests"]),
        "disk_itl_p99_ratio": ask("disturbance", lambda it: it["disk_p99_over_requests"]),
        "kernels_failed": ask("kernels", lambda it: sum("error" in row for row in it["cases"])),
    }
    return line


def decode_chart(shape: Shape, decode: Mapping[str, Any]) -> Chart:
    """Steps of each batch, with each number of adapters of the first rank, beside the floor."""
    rank = shape.sizes.ranks[0]
    bars: dict[str, dict[str, float | None]] = {}
    for row in decode["cases"]:
        if row["rank"] != rank:
            continue
        group = bars.setdefault(f"batch {row['batch']}", {})
        if not row["distinct"]:
            group["floor"] = row["floor_ms"]
        distinct = row["distinct"]
        # The last of a group has an adapter for each row.
        name = "base" if not distinct else f"{distinct} adapters" if distinct > 1 else "1 adapter"
        if distinct == row["batch"] and distinct not in shape.sizes.distinct:
            name = "one each"
        group[name] = row["step_ms"]
    title = f"Llama {shape.name}, random weights, context {decode['context']}, rank {rank}"
    return Chart(title, "a decoding step, ms", bars)
