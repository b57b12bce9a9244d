"""What the server's process and the engine's process say to each other.

Pickled lists of commands go down, one ``StepReport`` a step comes up. The two ends are parent and
child of one program, so pickle is safe here, and only here.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass, field

from lorax_serve.core import (
    AdapterInfo,
    AdapterTier,
    AdapterWork,
    EngineStats,
    Freed,
    ModelInfo,
    Part,
    SamplingParams,
    TokenOutput,
)
from lorax_serve.errors import LoraxError
from lorax_serve.report import LoadReport

__all__ = [
    "HEADER_BYTES",
    "Abort",
    "CheckIntegrity",
    "Command",
    "DropAdapter",
    "InspectAdapter",
    "LoadAdapter",
    "Reply",
    "StepReport",
    "Stop",
    "Submit",
    "decode",
    "encode",
]

HEADER_BYTES = 8


@dataclass(frozen=True, slots=True)
class Submit:
    """Start a request. Its outputs come as ``TokenOutput`` in the step reports."""

    request_id: int
    tokens: tuple[int, ...]
    adapter: int | None
    sampling: SamplingParams
    max_new_tokens: int
    min_new_tokens: int
    eos_token_ids: frozenset[int]
    priority: int = 0
    weight: int = 1


@dataclass(frozen=True, slots=True)
class Abort:
    """Forget a request before the next step; nothing more is reported of it."""

    request_id: int


@dataclass(frozen=True, slots=True)
class LoadAdapter:
    """Read an adapter, or compose several, into host memory. Replied with ``AdapterInfo`` or the
    refusal."""

    call_id: int
    version: int
    path: str
    parts: tuple[Part, ...] = ()


@dataclass(frozen=True, slots=True)
class InspectAdapter:
    """Look at an adapter as if to load it. Replied with its ``LoadReport``, also if refused."""

    call_id: int
    path: str


@dataclass(frozen=True, slots=True)
class DropAdapter:
    """Free an adapter that no request uses. Replied with what was ``Freed``."""

    call_id: int
    version: int


@dataclass(frozen=True, slots=True)
class PinAdapter:
    """Keep an adapter in host memory from now on. Replied with None, or ``Overloaded``.

    Attributes:
        instead_of: a pinned version that is to be unpinned next, whose room it may count on.
    """

    call_id: int
    version: int
    instead_of: int | None = None


@dataclass(frozen=True, slots=True)
class UnpinAdapter:
    """Let an adapter leave host memory again. Replied with None."""

    call_id: int
    version: int


@dataclass(frozen=True, slots=True)
class FindAdapters:
    """Ask where all adapters are. Replied with a dict of ``AdapterTier`` by version."""

    call_id: int


@dataclass(frozen=True, slots=True)
class FindWork:
    """Ask which adapters have requests. Replied with an ``AdapterWork``."""

    call_id: int


@dataclass(frozen=True, slots=True)
class CheckIntegrity:
    """Check all accounting. Replied with a tuple of problems, empty if there is none."""

    call_id: int


@dataclass(frozen=True, slots=True)
class Stop:
    """Leave the step loop."""


Command = (
    Submit
    | Abort
    | LoadAdapter
    | InspectAdapter
    | DropAdapter
    | PinAdapter
    | UnpinAdapter
    | FindAdapters
    | FindWork
    | CheckIntegrity
    | Stop
)
Answer = (
    AdapterInfo
    | LoadReport
    | ModelInfo
    | Freed
    | dict[int, AdapterTier]
    | AdapterWork
    | tuple[str, ...]
    | None
)


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer to a command with a ``call_id``: a value, or an error to raise."""

    call_id: int
    value: Answer = None
    error: LoraxError | None = None


@dataclass(slots=True)
class StepReport:
    """Everything that happened since the last report."""

    tokens: list[TokenOutput] = field(default_factory=list)
    replies: list[Reply] = field(default_factory=list)
    stats: EngineStats = field(default_factory=EngineStats)


def encode(message: object) -> bytes:
    """A frame: the body's length in ``HEADER_BYTES`` bytes, then the pickled body."""
    body = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    return len(body).to_bytes(HEADER_BYTES, "little") + body


def decode(body: bytes) -> object:
    """The message of a frame's body."""
    return pickle.loads(body)
