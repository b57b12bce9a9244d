"""Loss curves: as a PNG by matplotlib, which is an extra, and as SVG for a page, by nothing."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from html import escape
from typing import Any

from lorax_train.records.log import Curves, Points

__all__ = ["COLOURS", "smoothed", "to_png", "to_svg"]

COLOURS = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2", "#be185d", "#4d7c0f")

_WINDOW = 20
_MOST_POINTS = 600
_WIDTH, _HEIGHT = 720, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 12, 12, 40


def smoothed(points: Points, window: int = _WINDOW) -> Points:
    """The mean of each point and those before it, ``window`` in all."""
    out: Points = []
    total = 0.0
    for i, (step, loss) in enumerate(points):
        total += loss - (points[i - window][1] if i >= window else 0.0)
        out.append((step, total / min(i + 1, window)))
    return out


def to_png(curves: Curves, title: str) -> bytes:
    """Draw one run.

    Raises:
        ImportError: when there is no matplotlib.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    if curves.train:
        axes.plot(*zip(*curves.train, strict=True), color=COLOURS[0], alpha=0.25)
        mean = smoothed(curves.train)
        axes.plot(*zip(*mean, strict=True), color=COLOURS[0], label="train (mean of 20 steps)")
    if curves.held_out:
        points = zip(*curves.held_out, strict=True)
        axes.plot(*points, color=COLOURS[1], marker="o", markersize=4, label="held out")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.set_title(title, parse_math=False)
    axes.grid(alpha=0.3)
    if curves.train or curves.held_out:
        axes.legend()
    canvas: Any = FigureCanvasAgg(figure)
    out = io.BytesIO()
    canvas.print_png(out)
    return out.getvalue()


def to_svg(runs: Sequence[tuple[str, Curves]]) -> str:
    """Draw runs over each other: losses of steps pale, their means as lines, held-out losses with
    dots and dashes. Text is escaped.

    Args:
        runs: names and losses.

    Returns:
        An ``<svg>`` element; empty where there is nothing to draw.
    """
    everything = [point for _, curves in runs for point in (*curves.train, *curves.held_out)]
    if not everything:
        return ""
    steps = [step for step, _ in everything]
    losses = [loss for _, loss in everything]
    x_ticks, y_ticks = _ticks(min(steps), max(steps)), _ticks(min(losses), max(losses))
    low, high = min(*losses, *y_ticks), max(*losses, *y_ticks)
    first, last = min(steps), max(*steps, min(steps) + 1)

    def x(step: float) -> float:
        return _LEFT + (step - first) / (last - first) * (_WIDTH - _LEFT - _RIGHT)

    def y(loss: float) -> float:
        part = (loss - low) / ((high - low) or 1.0)
        return _HEIGHT - _BOTTOM - part * (_HEIGHT - _TOP - _BOTTOM)

    def line(points: Points, colour: str, style: str) -> str:
        path = " ".join(f"{x(step):.1f},{y(loss):.1f}" for step, loss in _thinned(points))
        return f'<polyline points="{path}" fill="none" stroke="{colour}" {style}/>'

    out = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="loss by step" '
        'font-family="sans-serif" font-size="11">'
    ]
    for tick in y_ticks:
        at = f"{y(tick):.1f}"
        out.append(
            f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at}" y2="{at}" class="grid"/>'
            f'<text x="{_LEFT - 6}" y="{at}" dy="4" text-anchor="end">{tick:g}</text>'
        )
    out += [
        f'<text x="{x(tick):.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{tick:g}</text>'
        for tick in x_ticks
        if tick == int(tick)
    ]
    out.append(f'<text x="{_WIDTH / 2}" y="{_HEIGHT - 6}" text-anchor="middle">step</text>')
    for i, (name, curves) in enumerate(runs):
        colour = COLOURS[i % len(COLOURS)]
        out.append(f"<g><title>{escape(name)}</title>")
        if curves.train:
            out.append(line(curves.train, colour, 'stroke-opacity="0.25"'))
            out.append(line(smoothed(curves.train), colour, 'stroke-width="1.8"'))
        if curves.held_out:
            out.append(line(curves.held_out, colour, 'stroke-width="1.4" stroke-dasharray="5 4"'))
            out += [
                f'<circle cx="{x(step):.1f}" cy="{y(loss):.1f}" r="3.2" fill="{colour}">'
                f"<title>{escape(name)}: held-out loss {loss:.4f} at step {step}</title></circle>"
                for step, loss in _thinned(curves.held_out)
            ]
        out.append("</g>")
    return "".join([*out, "</svg>"])


def _thinned(points: Points) -> Points:
    """Not more points than can be seen; the last one stays."""
    every = math.ceil(len(points) / _MOST_POINTS)
    return points if every <= 1 else [*points[::every], points[-1]]


def _ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers within ``low`` and ``high``, at least one."""
    span = (high - low) or abs(high) or 1.0
    raw = span / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    start = math.ceil(low / step)
    ticks = [i * step for i in range(start, math.floor(high / step) + 1)]
    return ticks or [low]
