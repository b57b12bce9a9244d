"""What all benchmarks have in common as commands: flags, one line of JSON, a file and a plot."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.plot import Chart, draw
from benchmarks.record import write_result
from lorax_serve.checkpoint.source import EMBEDDED_MODEL

__all__ = ["Result", "parser", "publish", "run"]


@dataclass(frozen=True, slots=True)
class Result:
    """What a benchmark found: ``headline`` is its line on stdout, ``details`` is only in the file.

    ``versions`` are those of packages in peers' own environments.
    """

    headline: Mapping[str, Any]
    details: Mapping[str, Any]
    chart: Chart
    versions: Mapping[str, Mapping[str, str]] | None = None


def parser(doc: str | None, repeats: int = 5) -> argparse.ArgumentParser:
    """The flags that every benchmark has; add its own to it."""
    found = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--model", default=EMBEDDED_MODEL, help="what lorax-serve takes as --model")
    found.add_argument("--repeats", type=int, default=repeats, help="rounds; figures are medians")
    found.add_argument("--seed", type=int, default=0)
    found.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    return found


def run(
    name: str,
    flags: argparse.ArgumentParser,
    measure: Callable[[argparse.Namespace], Awaitable[Result]],
) -> None:
    """Parse the flags, measure, and publish the result under ``name``."""
    options = flags.parse_args()

    async def measured() -> Result:
        return await measure(options)

    publish(name, options, asyncio.run(measured()))


def publish(name: str, options: argparse.Namespace, result: Result) -> None:
    """Write ``name.json`` and ``name.png``, then print the headline as one line of JSON."""
    settings = {key: value for key, value in vars(options).items() if key != "out"}
    content = {
        "settings": {key: _plain(value) for key, value in settings.items()},
        "headline": result.headline,
        **result.details,
    }
    print(write_result(options.out, name, content, result.versions), file=sys.stderr)
    draw(result.chart, options.out / f"{name}.png")
    print(json.dumps(result.headline), flush=True)


def _plain(value: object) -> object:
    return str(value) if isinstance(value, Path) else value
