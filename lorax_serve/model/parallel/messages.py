"""What rank 0 tells the other ranks, over pipes that it shares with nobody else.

Messages are pickled: both ends are one program, as in ``engine.messages``.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch

from lorax_serve.checkpoint.part import Part
from lorax_serve.config import EngineConfig
from lorax_serve.core import RowCopy
from lorax_serve.model.adapters.arena import ArenaAdapter
from lorax_serve.model.adapters.folded import FoldedAdapter
from lorax_serve.model.layout import Layout

__all__ = [
    "Begin",
    "Clear",
    "Copy",
    "Failed",
    "Follow",
    "Forget",
    "LogitsAfter",
    "Order",
    "Put",
    "Record",
    "Stop",
    "receive",
    "receive_adapter",
    "send",
    "send_adapter",
]


@dataclass(frozen=True, slots=True)
class Begin:
    """Become a rank.

    Attributes:
        config: rank 0's, with the device of this rank.
        directory: of the model.
        dtype: of weights and activations.
        part: this rank.
        meeting: see ``group.join``.
        threads: of the CPU.
    """

    config: EngineConfig
    directory: str
    dtype: torch.dtype
    part: Part
    meeting: str
    threads: int


@dataclass(frozen=True, slots=True)
class Record:
    """``PagedSteps.record``."""


@dataclass(frozen=True, slots=True)
class Copy:
    """``PagedSteps.copy``."""

    copies: Sequence[RowCopy]


@dataclass(frozen=True, slots=True)
class Follow:
    """``PagedSteps.follow``."""

    layout: Layout


@dataclass(frozen=True, slots=True)
class LogitsAfter:
    """``PagedSteps.logits_after``."""

    layout: Layout


@dataclass(frozen=True, slots=True)
class Put:
    """``PagedSteps.put`` of an adapter that was sent, or still is on its way."""

    slot: int
    key: int


@dataclass(frozen=True, slots=True)
class Clear:
    """``PagedSteps.clear``."""

    slot: int


@dataclass(frozen=True, slots=True)
class Forget:
    """Free the host memory of adapters that were sent."""

    keys: Sequence[int]


@dataclass(frozen=True, slots=True)
class Stop:
    """End."""


Order = Record | Copy | Follow | LogitsAfter | Put | Clear | Forget | Stop


@dataclass(frozen=True, slots=True)
class Failed:
    """A rank's last word."""

    error: str


@dataclass(frozen=True, slots=True)
class _Header:
    """Of an adapter; its blob of ``size`` elements follows as it is."""

    key: int
    size: int
    dtype: torch.dtype
    sites: frozenset[int]
    max_rank: int
    rest: FoldedAdapter | None


def send(pipe: Connection, message: object) -> None:
    """Send a message."""
    # Not pipe.send: torch would have it share a tensor's memory instead of sending it.
    pipe.send_bytes(pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL))


def receive(pipe: Connection) -> object:
    """The next message.

    Raises:
        EOFError, OSError: the other end has gone.
    """
    return pickle.loads(pipe.recv_bytes())


def send_adapter(pipe: Connection, key: int, adapter: ArenaAdapter) -> None:
    """Send an adapter, which is known by ``key`` from then on."""
    blob = adapter.blob
    header = _Header(key, len(blob), blob.dtype, adapter.sites, adapter.max_rank, adapter.rest)
    send(pipe, header)
    if len(blob):
        pipe.send_bytes(_bytes(blob))


def receive_adapter(pipe: Connection, *, pinned: bool) -> tuple[int, ArenaAdapter]:
    """The next adapter and its key; its blob in pinned memory, if that is asked for.

    Raises:
        EOFError, OSError: the other end has gone.
    """
    header = receive(pipe)
    assert isinstance(header, _Header)
    blob = torch.empty(header.size, dtype=header.dtype, pin_memory=pinned)
    if header.size:
        pipe.recv_bytes_into(_bytes(blob))
    return header.key, ArenaAdapter(blob, header.sites, header.max_rank, header.rest)


def _bytes(blob: torch.Tensor) -> memoryview:
    raw: memoryview = blob.view(torch.uint8).numpy().data
    return raw
