"""One loaded version of an adapter, as the server's process knows it."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from lorax_serve.core import AdapterInfo

__all__ = ["Adapter", "AdapterState"]


class AdapterState(Enum):
    """The life of a version."""

    READY = "ready"
    SUPERSEDED = "superseded"
    """Its name means another version now; requests reach it as ``name@digest``."""
    DRAINING = "draining"
    """Unloaded or replaced: no new requests, the running ones finish with it."""


@dataclass(slots=True, eq=False)
class Adapter:
    """One loaded version of an adapter.

    Attributes:
        version: the load's sequence number on this server.
        key: what the engine calls it.
    """

    name: str
    version: int
    info: AdapterInfo
    path: Path
    key: int = 0
    weight: int = 1
    """Its share of a busy server against others."""
    pinned: bool = False
    """Whether its weights never leave host memory."""
    state: AdapterState = AdapterState.READY
    references: int = 0
    requests: int = 0
    last_used: float = field(default_factory=time.time)
    """Unix time of the last admission, or of the load."""
    unused: asyncio.Event = field(default_factory=asyncio.Event)
    """Set while nobody holds it."""

    def __post_init__(self) -> None:
        self.unused.set()

    @property
    def going(self) -> bool:
        """Whether it is freed with its last request."""
        return self.state is AdapterState.DRAINING
