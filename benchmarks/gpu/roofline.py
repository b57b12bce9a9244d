"""What the kernels reach of the memory's bandwidth, by the bytes that they move."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.plot import COLOURS

__all__ = ["draw_roofline"]

_MARKERS = "osD^vP*X<>"


def draw_roofline(kernels: Mapping[str, Any], title: str, path: Path) -> None:
    """Write a result of ``kernels.measure`` as a plot: a point a case, and the roof over them."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    cases = [case for case in kernels["cases"] if "us" in case]
    names = list(dict.fromkeys(case["name"].partition(" ")[0] for case in cases))
    for number, name in enumerate(names):
        own = [case for case in cases if case["name"].partition(" ")[0] == name]
        axes.plot(
            [case["bytes"] / 1e6 for case in own],
            [case["tb_per_s"] for case in own],
            _MARKERS[number % len(_MARKERS)],
            color=COLOURS[number % len(COLOURS)],
            label=name,
            markersize=5,
            alpha=0.8,
        )
    if cases:
        sizes = [case["bytes"] for case in cases]
        places = np.geomspace(min(sizes), max(sizes), 200)
        peak = kernels["bandwidth_tb_per_s"]
        seconds = kernels["launch_us"] / 1e6 + places / (peak * 1e12)
        axes.plot(places / 1e6, places / seconds / 1e12, "-", color="#444444", label="roof")
        axes.axhline(peak, linestyle=":", color="#888888", label=f"{peak:g} TB/s")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("bytes that must be moved, MB")
    axes.set_ylabel("achieved, TB/s")
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    figure.savefig(path, metadata={"Software": None})
