"""Policies side by side, as PNG."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from benchmarks.cluster_simulation.figures import TIERS
from benchmarks.plot import COLOURS

__all__ = ["draw_policies"]

_Figures = Mapping[str, Mapping[str, Mapping[str, float]]]


def draw_policies(found: _Figures, path: Path) -> None:
    """Four panels of ``found[scenario][policy][figure]``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    ((tiers, ttft), (moved, spread)) = figure.subplots(2, 2)
    scenarios, policies = list(found), list(next(iter(found.values())))
    labels = [policy.replace("_", " ") for policy in policies]

    bottom = [0.0] * len(policies)
    for number, tier in enumerate(TIERS):
        heights = [100 * found[scenarios[0]][policy][f"found_{tier}"] for policy in policies]
        bars = tiers.bar(labels, heights, 0.6, bottom, label=tier, color=COLOURS[number])
        texts = [f"{height:.0f}" if height >= 4 else "" for height in heights]
        tiers.bar_label(bars, labels=texts, label_type="center", color="white", fontsize=9)
        bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
    tiers.set_title(f"Where requests found their adapter, {scenarios[0]}, %", loc="left")
    tiers.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=4, frameon=False)

    for axes, title, name in (
        (ttft, "TTFT p99, ms", "ttft_ms_p99"),
        (moved, "Bytes read from disk and fetched, GB", "gb"),
        (spread, "The busiest replica over the mean one", "busy"),
    ):
        width = 0.8 / len(scenarios)
        for number, scenario in enumerate(scenarios):
            heights = [_value(found[scenario][policy], name) for policy in policies]
            places = [at + (number - (len(scenarios) - 1) / 2) * width for at in range(len(labels))]
            bars = axes.bar(places, heights, 0.94 * width, label=scenario, color=COLOURS[number])
            axes.bar_label(bars, fmt="{:.4g}", padding=2, fontsize=9)
        axes.set_xticks(range(len(labels)), labels)
        axes.set_title(title, loc="left")
        axes.margins(y=0.12)
    ttft.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=2, frameon=False)
    for axes in (tiers, ttft, moved, spread):
        axes.spines[["top", "right"]].set_visible(False)
        axes.title.set_fontsize(10)
    figure.savefig(path, metadata={"Software": None})


def _value(figures: Mapping[str, float], name: str) -> float:
    if name == "gb":
        return figures["gb_from_source"] + figures["gb_from_disk"]
    if name == "busy":
        return figures["busy_most"] / figures["busy_mean"]
    return figures[name]
