"""One loaded version of an adapter, as the server's process knows it."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from lorax_serve.core import AdapterInfo

__all__ = ["MAX_WEIGHT", "Adapter", "AdapterState"]

MAX_WEIGHT = 100
"""Of an adapter's share of a busy server; the least is 1."""


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
    """Requests that use it, by itself or together with others."""
    compositions: int = 0
    """Compositions that are made of it, whether or not a request uses them."""
    requests: int = 0
    last_used: float = field(default_factory=time.time)
    """Unix time of the last admission, or of the load."""
    unused: asyncio.Event = field(default_factory=asyncio.Event)
    """Set while neither requests nor compositions hold it."""

    def __post_init__(self) -> None:
        self.unused.set()

    @property
    def going(self) -> bool:
        """Whether it is freed with its last request."""
        return self.state is AdapterState.DRAINING

    def hold(self) -> None:
        """For a request."""
        self.references += 1
        self.unused.clear()

    def release(self) -> None:
        """Undo one ``hold``."""
        assert self.references > 0, f"{self.name} was released too often"
        self.references -= 1
        self._settle()

    def bind(self) -> None:
        """Make it a part of a composition."""
        self.compositions += 1
        self.unused.clear()

    def unbind(self) -> None:
        """Undo one ``bind``."""
        assert self.compositions > 0, f"{self.name} was let go too often"
        self.compositions -= 1
        self._settle()

    def _settle(self) -> None:
        if self.references == self.compositions == 0:
            self.unused.set()
