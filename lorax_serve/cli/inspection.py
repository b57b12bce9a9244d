"""``lorax adapters inspect``: what a load would find, from a server or from the files alone."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lorax_serve.cli.table import table
from lorax_serve.client import LoadReport, ModuleReport, ProbeOutcome, ProbeReport, Unavailable

__all__ = ["inspect"]

_NAMES = 8


def inspect(client: Any, options: argparse.Namespace) -> int:
    """Print what a load of ``options.path`` would find.

    Without a server, which has its own directory of adapters, a local directory is looked at here.

    Returns:
        0 if it would be applied, 1 if it would be refused.
    """
    path = Path(options.path)
    if options.local or options.model or (path.is_dir() and not options.server):
        report = _local(path, options.model)
    else:
        name = path.name
        try:
            report = client.inspect_adapter(name, None if name == options.path else options.path)
        except Unavailable as error:
            if not path.is_dir():
                raise
            print(f"lorax: {error}; looking at the files here", file=sys.stderr)
            report = _local(path, options.model)
    print("\n".join(_lines(report)))
    return 0 if report.applied else 1


def _local(path: Path, model: str | None) -> LoadReport:
    # Here, because the client starts without torch.
    from lorax_serve.adapter import inspect as inspect_files
    from lorax_serve.checkpoint.source import EMBEDDED_MODEL, resolve_model
    from lorax_serve.checkpoint.spec_cache import load_spec

    return inspect_files(path, load_spec(resolve_model(model or EMBEDDED_MODEL)).modules())


def _lines(report: LoadReport) -> Iterator[str]:
    memory = f", {report.host_bytes:,} in host memory" if report.host_bytes else ""
    yield f"digest    {report.digest or 'none: the files could not be read'}"
    yield f"trained   on {report.base_model or 'a base model that its config does not name'}"
    yield f"variants  {', '.join(report.variants) or 'unknown'}"
    yield f"bytes     {report.file_bytes:,} in files{memory}"
    yield (
        f"tensors   {report.num_matched} matched, {report.num_unmatched} unmatched, "
        f"{report.num_missing} missing"
    )
    for what, names in (("unmatched", report.unmatched), ("missing", report.missing)):
        for name in names[:_NAMES]:
            yield f"          {what}: {name}"
        if len(names) > _NAMES:
            yield f"          {what}: {len(names) - _NAMES} more"
    yield f"probe     {_probe(report.probe)}"
    if report.modules:
        yield ""
        yield from table(list(_groups(report.modules)))
        yield ""
    for warning in report.warnings:
        yield f"warning: {warning}"
    for problem in report.problems:
        yield f"problem: {problem}"
    yield "it would be applied" if report.applied else f"it would be refused: {report.reason}"


def _groups(modules: Sequence[ModuleReport]) -> Iterator[tuple[str, ...]]:
    """Modules of one rank, alpha and scale by row, with the last parts of their paths."""
    found: dict[tuple[str, ...], list[str]] = {}
    for each in modules:
        numbers = (f"{each.rank}", f"{each.alpha:g}", f"{each.scale:g}")
        key: tuple[str, ...] = (each.kind, *(numbers if each.rank else "---"))
        found.setdefault(key, []).append(each.path.rpartition(".")[2])
    yield "KIND", "RANK", "ALPHA", "SCALE", "MODULES", "NAMES"
    for key, names in found.items():
        yield *key, str(len(names)), ", ".join(dict.fromkeys(names))


def _probe(probe: ProbeReport) -> str:
    figures = (
        f"difference {probe.difference:.3g}, tolerance {probe.tolerance:.3g}, "
        f"effect {probe.effect:.3g}"
    )
    match probe.outcome:
        case ProbeOutcome.NONE:
            return "none"
        case ProbeOutcome.UNCHECKED:
            return f"not computed; effect {probe.effect:.3g}"
        case outcome:
            return f"{outcome}: {figures}"
