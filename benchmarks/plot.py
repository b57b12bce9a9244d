"""Bar charts of results, as PNG."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = ["COLOURS", "Chart", "draw"]

# Ours first; told apart in greyscale and by colour-blind readers too.
COLOURS = ("#1b6ca8", "#e6a23c", "#8c8c8c", "#6ab187", "#b3446c", "#4d4d4d")


@dataclass(frozen=True, slots=True)
class Chart:
    """Groups of bars: ``bars[group][series]``, where None is "not measured"."""

    title: str
    unit: str
    bars: Mapping[str, Mapping[str, float | None]]


def draw(chart: Chart, path: Path) -> None:
    """Write the chart to ``path``, 1600 pixels wide."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    series = list(dict.fromkeys(name for group in chart.bars.values() for name in group))
    figure = Figure(figsize=(8, 4), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    width = 0.8 / len(series)
    for number, name in enumerate(series):
        places, heights = [], []
        for at, group in enumerate(chart.bars.values()):
            place = at + (number - (len(series) - 1) / 2) * width
            height = group.get(name)
            if height is not None:
                places.append(place)
                heights.append(height)
            elif name in group:
                axes.text(place, 0, "n/a", ha="center", va="bottom", color="#888888")
        bars = axes.bar(places, heights, 0.94 * width, label=name, color=_colour(number))
        axes.bar_label(bars, labels=[_label(height) for height in heights], padding=2, fontsize=9)
    axes.set_xticks(range(len(chart.bars)), list(chart.bars))
    axes.set_ylabel(chart.unit)
    axes.set_title(chart.title, loc="left", fontsize=11, fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="x", length=0)
    axes.margins(y=0.12)
    if len(series) > 1:
        figure.legend(loc="outside lower center", ncols=min(6, len(series)), frameon=False)
    figure.savefig(path, metadata={"Software": None})


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _label(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
