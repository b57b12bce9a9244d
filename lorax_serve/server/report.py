"""From a ``LoadReport`` to its message, whole or cut to what fits into a status."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lorax_serve.pb.lorax.v1 import adapter_pb2 as pb
from lorax_serve.report import LoadReport, ProbeOutcome

__all__ = ["report_bytes", "report_message"]

# 4 KiB in base64, which is how it travels.
_MAX_BYTES = 3072
_MAX_TEXT = 100
_MAX_PROBLEM = 400

_OUTCOMES = {
    ProbeOutcome.NONE: pb.PROBE_OUTCOME_UNSPECIFIED,
    ProbeOutcome.UNCHECKED: pb.PROBE_OUTCOME_UNCHECKED,
    ProbeOutcome.PASSED: pb.PROBE_OUTCOME_PASSED,
    ProbeOutcome.FAILED: pb.PROBE_OUTCOME_FAILED,
}


def report_message(report: LoadReport) -> Any:
    """The ``LoadReport`` message."""
    probe = report.probe
    return pb.LoadReport(
        digest=report.digest,
        base_model=_text(report.base_model),
        variants=report.variants,
        modules=[
            pb.ModuleReport(
                path=each.path, kind=each.kind, rank=each.rank, alpha=each.alpha, scale=each.scale
            )
            for each in report.modules
        ],
        matched=map(_text, report.matched),
        unmatched=map(_text, report.unmatched),
        missing=map(_text, report.missing),
        module_count=report.num_modules,
        matched_count=report.num_matched,
        unmatched_count=report.num_unmatched,
        missing_count=report.num_missing,
        file_bytes=report.file_bytes,
        host_bytes=report.host_bytes,
        warnings=map(_text, report.warnings),
        probe=pb.ProbeReport(
            outcome=_OUTCOMES[probe.outcome],
            difference=probe.difference,
            tolerance=probe.tolerance,
            effect=probe.effect,
            message=_text(probe.message),
        ),
        reject_reason=None if report.reason is None else str(report.reason),
        problems=map(_text, report.problems),
    )


def report_bytes(report: LoadReport) -> bytes:
    """The message's bytes, at most 3 KiB: first the lists of modules and tensors are left out, then
    warnings and all problems but the first, which is cut."""
    brief = report.brief()
    least = replace(
        brief,
        base_model=brief.base_model[:_MAX_TEXT],
        warnings=(),
        problems=tuple(problem[:_MAX_PROBLEM] for problem in brief.problems[:1]),
        probe=replace(brief.probe, message=brief.probe.message[:_MAX_TEXT]),
    )
    data = b""
    for each in (report, brief, least):
        data = report_message(each).SerializeToString()
        if len(data) <= _MAX_BYTES:
            break
    return data


def _text(text: str) -> str:
    # Names of files and strings of a config may hold what is no text, which protobuf refuses.
    return text.encode(errors="replace").decode()
