"""Measure the GPU path on random weights: ``python -m benchmarks.gpu``.

Each part writes ``gpu_PART_SHAPE.json`` as soon as it ends. The last line on stdout is one of JSON,
made of all such files in ``--out``, with the date of each part and null for what was not measured.
A part that fails has no file; it is named on stderr, as is one of which a case or a peer failed,
and the exit code is 1.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import adapter_load, decode, disturbance, kernels, peers, prefill, slora
from benchmarks.gpu.bench import Bench, say
from benchmarks.gpu.report import decode_chart, figures, read_parts
from benchmarks.gpu.roofline import draw_roofline
from benchmarks.gpu.shapes import SHAPES, Shape
from benchmarks.plot import draw
from benchmarks.record import write_result
from lorax_serve.config import KERNELS

PARTS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "kernels": kernels.measure,
    "decode": decode.measure,
    "prefill": prefill.measure,
    "adapter_load": adapter_load.measure,
    "disturbance": disturbance.measure,
    "slora": slora.measure,
    # Last: it changes transformers' model, and takes the memory that is left.
    "peers": peers.measure,
}


def main() -> int:
    """Run the parts; the number of those that failed, at most 1."""
    flags = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    flags.add_argument(
        "--part", nargs="*", choices=PARTS, default=list(PARTS), help="none: only the last line"
    )
    flags.add_argument("--shape", choices=SHAPES, default="8b")
    flags.add_argument("--device", default="cuda", help="cpu is for --shape tiny")
    flags.add_argument("--kernels", choices=KERNELS, default="auto", help="as lorax-serve's")
    flags.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = flags.parse_args()
    if options.part and options.device.startswith("cuda") and not torch.cuda.is_available():
        flags.error("no CUDA device: --shape tiny --device cpu shows that all of it runs")
    shape, out = SHAPES[options.shape], options.out
    failed = run(shape, torch.device(options.device), options.kernels, options.part, out)
    results = read_parts(out, shape.name, tuple(PARTS))
    print(json.dumps(figures(shape, results)), flush=True)
    plot(shape, results, out)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def run(
    shape: Shape, device: torch.device, kernels_flag: str, parts: list[str], out: Path
) -> list[str]:
    """Run parts and write their results; returns the names of those that failed."""
    if not parts:
        return []
    for part in parts:
        (out / f"gpu_{part}_{shape.name}.json").unlink(missing_ok=True)
    started = time.perf_counter()
    try:
        bench = Bench(shape, device, kernels_flag)
    except Exception:  # what was measured before is still to be summed up
        traceback.print_exc()
        return parts
    ready = time.perf_counter() - started
    say(f"{shape.name} on {_name(device)}: ready in {ready:.1f} s")
    failed = []
    for part in parts:
        started = time.perf_counter()
        try:
            result = PARTS[part](bench)
        except Exception:  # the other parts may still have their figures
            traceback.print_exc()
            failed.append(part)
            with contextlib.suppress(Exception):  # after a fault of the device nothing works
                bench.release()
            continue
        if errors := _errors(result):
            failed.append(f"{part} ({errors} of its cases)")
        seconds = time.perf_counter() - started
        say(f"{part}: {seconds:.1f} s")
        context = {
            "shape": shape.name,
            "device": _name(device),
            "dtype": bench.config.dtype,
            "triton": _triton_version(),
            "ready_seconds": round(ready, 1),
            "part_seconds": round(seconds, 1),
        }
        write_result(out, f"gpu_{part}_{shape.name}", {**context, **result})
    return failed


def _errors(result: object) -> int:
    """How many cases or peers of a part have no figures, but an error."""
    if isinstance(result, dict):
        return ("error" in result) + sum(_errors(value) for value in result.values())
    return sum(map(_errors, result)) if isinstance(result, list) else 0


def plot(shape: Shape, results: dict[str, dict[str, Any]], out: Path) -> None:
    """Draw the parts that have something to draw."""
    if "decode" in results:
        chart = decode_chart(shape, results["decode"])
        draw(chart, out / f"gpu_decode_{shape.name}.png")
    if "kernels" in results:
        title = f"Kernels at the sizes of Llama {shape.name}, {results['kernels']['device']}"
        draw_roofline(results["kernels"], title, out / f"gpu_kernels_{shape.name}.png")


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def _triton_version() -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("triton")
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
