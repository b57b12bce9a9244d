"""``report.html``: a run on one page that needs no other file, and no network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from lorax_train.records.curves import COLOURS, to_svg
from lorax_train.records.log import Curves
from lorax_train.records.summary import Summary
from lorax_train.report import serving_commands

__all__ = ["Report", "render_page"]

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --quiet: #8882; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 780px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 2em; }
table { border-collapse: collapse; width: 100%; font-size: 0.93em; }
th, td { text-align: left; padding: 0.25em 0.8em 0.25em 0; border-bottom: 1px solid var(--line); }
th { font-weight: 600; } td { overflow-wrap: anywhere; } table.facts td:first-child { width: 34%; }
pre { background: var(--quiet); padding: 0.8em; white-space: pre-wrap; overflow-wrap: anywhere; }
pre .read { opacity: 0.55; } pre .learned { background: #2563eb33; }
svg { width: 100%; height: auto; } svg text { fill: currentColor; } .grid { stroke: var(--line); }
.key { display: inline-block; width: 1em; height: 0.7em; margin-right: 0.3em; }
.legend span.name { margin-right: 1.2em; } .saved { font-weight: 600; }
"""


@dataclass(frozen=True, slots=True)
class Report:
    """One adapter on a page.

    Attributes:
        summary: of its run.
        curves: its losses.
        example: one row, in pieces, each with whether it is learned.
        cut: how many of the row's tokens are not shown.
        served: whether ``lorax-serve`` takes the base model.
    """

    summary: Summary
    curves: Curves
    example: Sequence[tuple[str, bool]]
    cut: int
    served: bool


def render_page(report: Report, together: Sequence[Report] = ()) -> str:
    """The page of one adapter; whatever comes from outside is escaped.

    Args:
        report: of the adapter.
        together: all that were trained in one run, if there were others.
    """
    summary = report.summary
    sections = [
        _section("Figures", _facts(summary.figures)),
        _section("Loss", _drawing([(summary.name, report.curves)])),
        _section("Held-out loss", _held_out(summary)),
        _section("Data", _facts({"base model": summary.base, **summary.data})),
        _section("One row", _example(report)),
        _section("How to serve it", _serving(report)),
        _section("Settings", _facts(summary.settings)),
        _section("Command", _code([summary.command]) if summary.command else ""),
    ]
    if len(together) > 1:
        sections.insert(2, _section("Trained together", _compared(together)))
    name = escape(summary.name)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{name}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head><body>\n<h1>{name}</h1>\n"
        f"<p>A LoRA adapter for <code>{escape(summary.base)}</code>, trained on "
        f"<code>{escape(summary.data['file'])}</code>.</p>\n"
        + "".join(sections)
        + "</body></html>\n"
    )


def _section(title: str, content: str) -> str:
    return f"<h2>{title}</h2>\n{content}\n" if content else ""


def _facts(facts: Mapping[str, str]) -> str:
    rows = (f"<tr><td>{escape(k)}</td><td>{escape(v)}</td></tr>" for k, v in facts.items())
    return f'<table class="facts">{"".join(rows)}</table>'


def _drawing(runs: Sequence[tuple[str, Curves]]) -> str:
    drawing = to_svg(runs)
    if not drawing:
        return "<p>No losses were logged.</p>"
    names = "".join(
        f'<span class="name"><span class="key" style="background:{COLOURS[i % len(COLOURS)]}">'
        f"</span>{escape(name)}</span>"
        for i, (name, _) in enumerate(runs)
    )
    return (
        f'{drawing}<p class="legend">{names}line: mean of 20 steps; pale: each step; dashes and '
        "dots: held out</p>"
    )


def _held_out(summary: Summary) -> str:
    if not summary.evaluations:
        return ""
    rows = [
        f"<tr{_mark(each == summary.saved)}><td>{each.step}</td><td>{each.loss:.4f}</td>"
        f"<td>{'these weights were saved' if each == summary.saved else ''}</td></tr>"
        for each in summary.evaluations
    ]
    head = "<tr><th>after step</th><th>held-out loss</th><th></th></tr>"
    return f"<table>{head}{''.join(rows)}</table>"


def _mark(saved: bool) -> str:
    return ' class="saved"' if saved else ""


def _example(report: Report) -> str:
    parts = "".join(
        f'<span class="{"learned" if learned else "read"}">{escape(text)}</span>'
        for text, learned in report.example
    )
    more = f" … ({report.cut} more tokens)" if report.cut else ""
    return f"<p>What is marked is learned, the rest is read.</p><pre>{parts}{more}</pre>"


def _serving(report: Report) -> str:
    if not report.served:
        return "<p><code>lorax-serve</code> does not serve this base model; PEFT does.</p>"
    return _code(serving_commands(report.summary.base, report.summary.directory))


def _code(lines: Sequence[str]) -> str:
    return f"<pre>{escape(chr(10).join(lines))}</pre>"


def _compared(together: Sequence[Report]) -> str:
    shown = ("rank, alpha", "steps", "loss, latest steps", "held-out loss after")
    head = "".join(f"<th>{escape(key)}</th>" for key in ("adapter", "learning rate", *shown))
    rows = "".join(
        "<tr>"
        + "".join(
            f"<td>{escape(value)}</td>"
            for value in (
                each.summary.name,
                each.summary.settings.get("optimizer.lr", ""),
                *(each.summary.figures[key] for key in shown),
            )
        )
        + "</tr>"
        for each in together
    )
    drawing = _drawing([(each.summary.name, each.curves) for each in together])
    return f"<table><tr>{head}</tr>{rows}</table>{drawing}"
