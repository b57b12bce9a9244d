"""What is said of an adapter that was loaded, or was not: plain data, without tensors.

Nothing here imports anything else of this project, since an error carries a report with it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum

__all__ = ["LoadReport", "ModuleReport", "ProbeOutcome", "ProbeReport", "RejectReason"]


class RejectReason(StrEnum):
    """Why an adapter was refused: a closed set, used as a metric label."""

    MISSING_FILE = "missing_file"
    BAD_CONFIG = "bad_config"
    BAD_FILE = "bad_file"
    UNSUPPORTED = "unsupported"
    NO_MATCH = "no_match"
    UNEXPECTED_TENSOR = "unexpected_tensor"
    MISSING_TENSOR = "missing_tensor"
    SHAPE_MISMATCH = "shape_mismatch"
    RANK_MISMATCH = "rank_mismatch"
    NOT_FINITE = "not_finite"
    PROBE_FAILED = "probe_failed"


@dataclass(frozen=True, slots=True)
class ModuleReport:
    """A module of the base model that the adapter changes.

    Attributes:
        path: of the module in the base model.
        kind: a value of ``ModuleKind``.
        rank: of its LoRA; 0 if the adapter replaces tensors or rows of it only.
        alpha: as the config gives it for this module; 0 without LoRA.
        scale: what multiplies ``x @ A.T @ B.T``; 0 without LoRA.
    """

    path: str
    kind: str
    rank: int = 0
    alpha: float = 0.0
    scale: float = 0.0


class ProbeOutcome(StrEnum):
    """What became of an adapter's golden probe."""

    NONE = "none"
    """The adapter has none, or was refused before it was looked at."""
    UNCHECKED = "unchecked"
    """It has one that was not computed."""
    PASSED = "passed"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class ProbeReport:
    """The check of an adapter's golden probe.

    Attributes:
        outcome: what became of it.
        difference: the worst one from what was trained, as a logit; 0 if it was not computed.
        tolerance: the largest difference that passes.
        effect: the adapter's own part of the probe's logits.
        message: why it failed; else empty.
    """

    outcome: ProbeOutcome = ProbeOutcome.NONE
    difference: float = 0.0
    tolerance: float = 0.0
    effect: float = 0.0
    message: str = ""


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What was found in an adapter's files, and what became of it.

    The counts hold even where a report was shortened on its way and the lists are gone.

    Attributes:
        digest: SHA-256 (hex) of the files; empty if they could not be read.
        base_model: ``base_model_name_or_path`` of the config; empty if it has none.
        variants: words for what is in it, such as ``lora``, ``dora`` and ``modules_to_save``.
        modules: what it changes, in the base model's order.
        matched: names of the tensors that have a place.
        unmatched: names of those that have none.
        missing: names of those that the config asks for and the file does not have.
        num_modules, num_matched, num_unmatched, num_missing: lengths of the lists.
        file_bytes: of the two files.
        host_bytes: that it takes in host memory; 0 if that is not known.
        warnings: one line each, of what is applied but should be known.
        probe: the check of its golden probe.
        reason: the class of the first problem; None if the adapter is applied.
        problems: one line for each reason to refuse it, the first to be told first.
    """

    digest: str = ""
    base_model: str = ""
    variants: tuple[str, ...] = ()
    modules: tuple[ModuleReport, ...] = ()
    matched: tuple[str, ...] = ()
    unmatched: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    num_modules: int = 0
    num_matched: int = 0
    num_unmatched: int = 0
    num_missing: int = 0
    file_bytes: int = 0
    host_bytes: int = 0
    warnings: tuple[str, ...] = ()
    probe: ProbeReport = field(default_factory=ProbeReport)
    reason: RejectReason | None = None
    problems: tuple[str, ...] = ()

    @property
    def applied(self) -> bool:
        """Whether there is no reason to refuse the adapter."""
        return self.reason is None

    def refused(self, reason: RejectReason, message: str) -> LoadReport:
        """The same with one more problem, whose reason counts unless there is one already."""
        problems = (*self.problems, message)
        return replace(self, reason=self.reason or reason, problems=problems)

    def brief(self) -> LoadReport:
        """The same without the lists of modules and tensors."""
        return replace(self, modules=(), matched=(), unmatched=(), missing=())
