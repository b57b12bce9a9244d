"""Every error that this project raises on purpose, in one tree.

::

    LoraxError
    ├── InvalidRequest          a field of a request or a flag is wrong
    ├── AdapterRejected         adapter files that cannot be applied exactly as PEFT would
    ├── AdapterNotFound         no adapter of that name is loaded
    ├── AdapterConflict         the adapter's state does not allow the operation
    ├── SourceFailed            the place that adapters come from did not give one
    ├── ModelUnsupported        a base model that cannot be found, read or run exactly
    ├── TrainingError           training data or settings that cannot work
    ├── Overloaded              a limit on waiting requests, memory or the disk is reached
    ├── Draining                the server is shutting down
    ├── EngineFailed            the engine's process failed or has died
    └── StoreFailed             the state directory cannot be read, written or trusted

``lorax_serve.server.status`` maps them to gRPC codes. Nothing here imports anything but the report
of a load, which a refused adapter carries.
"""

from __future__ import annotations

from enum import StrEnum

from lorax_serve.report import LoadReport, RejectReason

__all__ = [
    "AdapterConflict",
    "AdapterNotFound",
    "AdapterRejected",
    "Draining",
    "EngineFailed",
    "InvalidRequest",
    "LoraxError",
    "ModelUnsupported",
    "Overloaded",
    "RejectReason",
    "SourceFailed",
    "SourceReason",
    "StoreFailed",
    "TrainingError",
]


class LoraxError(Exception):
    """Base of all errors raised on purpose. The message says what to do, and is safe to show."""


class InvalidRequest(LoraxError):
    """A request's field is out of range or contradicts another; the message names the field."""


class AdapterRejected(LoraxError):
    """An adapter that cannot be applied exactly; nothing of it was loaded.

    Attributes:
        reason: the class of the defect, for metrics and for callers that branch on it.
        report: all that was found until then; None where no load has looked at the adapter.
    """

    def __init__(
        self, reason: RejectReason, message: str, report: LoadReport | None = None
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.report = report

    def __reduce__(
        self,
    ) -> tuple[type[AdapterRejected], tuple[RejectReason, str, LoadReport | None]]:
        return type(self), (self.reason, str(self), self.report)


class AdapterNotFound(LoraxError):
    """A request names an adapter that is not loaded."""


class AdapterConflict(LoraxError):
    """The adapter is loading, unloading or otherwise not in a state for this operation."""


class SourceReason(StrEnum):
    """Why a source did not give an adapter: a closed set, used as a metric label."""

    NOT_FOUND = "not_found"
    UNAVAILABLE = "unavailable"
    """Down, refusing connections, or failing by its own account."""
    TIMEOUT = "timeout"
    TRUNCATED = "truncated"
    """Another number of bytes than announced, or damaged on the way."""
    TOO_LARGE = "too_large"
    DENIED = "denied"
    """Bad or missing credentials, or a request that the source will never answer."""
    CHANGED = "changed"
    """The adapter was written to while it was read."""


_RETRYABLE = frozenset(
    {
        SourceReason.UNAVAILABLE,
        SourceReason.TIMEOUT,
        SourceReason.TRUNCATED,
        SourceReason.CHANGED,
    }
)


class SourceFailed(LoraxError):
    """A source of adapters did not give one; what was fetched so far is worth nothing.

    Attributes:
        reason: the class of the failure, for metrics and for callers that branch on it.
    """

    def __init__(self, reason: SourceReason, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    @property
    def retryable(self) -> bool:
        """Whether the same fetch may succeed later without anybody's doing."""
        return self.reason in _RETRYABLE

    def __reduce__(self) -> tuple[type[SourceFailed], tuple[SourceReason, str]]:
        return type(self), (self.reason, str(self))


class ModelUnsupported(LoraxError):
    """The base model cannot be found, or cannot be run exactly as transformers runs it."""


class TrainingError(LoraxError):
    """Training data or settings that cannot work; the message names the row, flag or tensor."""


class Overloaded(LoraxError):
    """A limit (waiting requests, adapter memory, the disk) is reached; try again later."""


class Draining(LoraxError):
    """The server is shutting down and takes no new work."""


class EngineFailed(LoraxError):
    """The engine failed on this request's step, or its process has died."""


class StoreFailed(LoraxError):
    """The state directory is in use, damaged, or cannot be read or written; a person must act."""
