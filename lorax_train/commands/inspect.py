"""``lorax-train inspect``: what an adapter is, and whether it would be served."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from lorax_serve.adapter import AdapterFiles, inspect, read
from lorax_serve.adapter.probe import PROBE_KEY, Probe
from lorax_serve.checkpoint.architectures import read_spec
from lorax_serve.checkpoint.source import resolve_model
from lorax_serve.errors import AdapterRejected
from lorax_serve.report import LoadReport, ModuleReport
from lorax_train.adapters.stored import base_name
from lorax_train.commands.parsing import CommandParser

__all__ = ["main"]

_NAMES = 8
_LABEL = 12


def main(argv: Sequence[str]) -> int:
    """Print what an adapter directory holds.

    Returns:
        0 if the server would apply it, 1 if it would refuse it.

    Raises:
        TrainingError: an argument is wrong.
        ModelUnsupported: the base cannot be found, or is not served.
    """
    parser = CommandParser("inspect", "Say what an adapter is, and whether it would be served.")
    parser.add_adapter()
    options = parser.parse_args(argv)
    files = _read(options.adapter)
    named = None if files is None else files.config.base_model_name_or_path
    model = base_name(options.model, named)
    report = inspect(options.adapter, read_spec(resolve_model(model)).modules())
    print("\n".join(_lines(options.adapter, model, files, report)))
    return 0 if report.applied else 1


def _read(directory: Path) -> AdapterFiles | None:
    try:
        return read(directory)
    except AdapterRejected:  # which the report says
        return None


def _lines(
    directory: Path, model: str, files: AdapterFiles | None, report: LoadReport
) -> Iterator[str]:
    def line(label: str, text: str) -> str:
        return f"{label:<{_LABEL}} {text}"

    yield line("adapter", str(directory))
    yield line("digest", report.digest or "none: the files could not be read")
    yield line("trained on", report.base_model or "a base that its config does not name")
    yield line("checked with", model)
    yield line("variants", ", ".join(report.variants) or "unknown")
    yield line("bytes", f"{report.file_bytes:,}")
    if files is not None:
        config = files.config
        r, alpha = config.r, config.lora_alpha
        yield line("config", f"r {r}, alpha {alpha:g}, targets {_targets(config.target_modules)}")
        numbers = sum(tensor.numel() for tensor in files.tensors.values())
        dtypes = sorted({str(t.dtype).removeprefix("torch.") for t in files.tensors.values()})
        yield line("tensors", f"{len(files.tensors)}, {numbers:,} numbers, {', '.join(dtypes)}")
    for group, paths in _groups(report.modules).items():
        yield line("modules", f"{len(paths)} with {group}: {_last_names(paths)}")
    if files is not None:
        yield from (line(*row) for row in _metadata(files.metadata))
    for what, names in (("unmatched", report.unmatched), ("missing", report.missing)):
        yield from (line(what, name) for name in names[:_NAMES])
        if len(names) > _NAMES:
            yield line(what, f"{len(names) - _NAMES} more")
    yield from (f"warning: {warning}" for warning in report.warnings)
    yield from (f"problem: {problem}" for problem in report.problems)
    yield "it would be served" if report.applied else f"it would be refused: {report.reason}"


def _targets(names: tuple[str, ...] | str) -> str:
    return names if isinstance(names, str) else ", ".join(names)


def _groups(modules: Sequence[ModuleReport]) -> dict[str, list[str]]:
    """Paths by what is said of them."""
    found: dict[str, list[str]] = {}
    for each in modules:
        said = f"rank {each.rank}, alpha {each.alpha:g}, scale {each.scale:g}"
        found.setdefault(said if each.rank else "weights of their own", []).append(each.path)
    return found


def _last_names(paths: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(path.rpartition(".")[2] for path in paths))


def _metadata(metadata: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """What the trainer has stored in the header of the weights file."""
    for key, value in sorted(metadata.items()):
        if key not in ("format", PROBE_KEY):
            yield key, value
    try:
        probe = Probe.from_metadata(metadata)
    except AdapterRejected:  # which the report says
        return
    if probe is None:
        yield "probe", "none"
        return
    yield (
        "probe",
        f"{len(probe.token_ids)} tokens in {probe.dtype}, moved by up to {probe.effect:.3g}; on "
        f"the base with fingerprint {probe.base_fingerprint[:12]}",
    )
