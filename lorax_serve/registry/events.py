"""What happens to adapters, for whoever wants to know: metrics, logs, and calls that watch."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from enum import Enum

from lorax_serve.errors import Draining, LoraxError, Overloaded
from lorax_serve.registry.version import Adapter

__all__ = ["AdapterEvent", "AdapterWatchers", "EventKind", "RegistryListener"]

# Beyond that, a watcher does not read. Each takes about a kilobyte.
_MOST_UNREAD = 4096


class RegistryListener:
    """Told of every change; this one ignores them."""

    def loaded(self, adapter: Adapter) -> None:
        """A version is ready."""

    def changed(self, adapter: Adapter) -> None:
        """Its state is another, its weight, or whether it is pinned."""

    def refused(self, name: str, error: LoraxError) -> None:
        """A load failed."""

    def unloaded(self, adapter: Adapter) -> None:
        """A version's memory is free."""


class EventKind(Enum):
    """What an event tells."""

    PRESENT = "present"
    """It was there when the watch began."""
    SYNCED = "synced"
    """All that was there has been told."""
    LOADED = "loaded"
    CHANGED = "changed"
    UNLOADED = "unloaded"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class AdapterEvent:
    """One change.

    Attributes:
        adapter: as it was then; None with ``SYNCED`` and ``REFUSED``.
        error: why a load failed, with ``REFUSED``.
    """

    kind: EventKind
    name: str = ""
    adapter: Adapter | None = None
    error: LoraxError | None = None


class AdapterWatchers(RegistryListener):
    """Passes events on to calls that watch, each at its own pace. None of them delays another, or
    the registry."""

    def __init__(self) -> None:
        self._queues: dict[asyncio.Queue[AdapterEvent | LoraxError], str | None] = {}
        """And the only name that one wants."""
        self._closed = False

    def __len__(self) -> int:
        return len(self._queues)

    async def watch(
        self, present: Iterable[Adapter], name: str | None = None
    ) -> AsyncIterator[AdapterEvent]:
        """What is there, ``SYNCED``, then every change, until the server stops.

        Args:
            present: all versions that are loaded now.
            name: the only one to tell of; None tells of all.

        Raises:
            Overloaded: the caller has not read for too long, and would have missed something.
            Draining: the server stops.
        """
        queue: asyncio.Queue[AdapterEvent | LoraxError] = asyncio.Queue()
        self._queues[queue] = name
        if self._closed:
            queue.put_nowait(_stopping())
        try:
            for adapter in [copy.copy(each) for each in present]:
                if name in (None, adapter.name):
                    yield AdapterEvent(EventKind.PRESENT, adapter.name, adapter)
            yield AdapterEvent(EventKind.SYNCED)
            while True:
                event = await queue.get()
                if isinstance(event, LoraxError):
                    raise event
                yield event
        finally:
            self._queues.pop(queue, None)

    def close(self) -> None:
        """End all watches."""
        self._closed = True
        for queue in self._queues:
            queue.put_nowait(_stopping())

    def loaded(self, adapter: Adapter) -> None:
        """A version is ready."""
        self._send(EventKind.LOADED, adapter)

    def changed(self, adapter: Adapter) -> None:
        """Its state is another, its weight, or whether it is pinned."""
        self._send(EventKind.CHANGED, adapter)

    def unloaded(self, adapter: Adapter) -> None:
        """A version's memory is free."""
        self._send(EventKind.UNLOADED, adapter)

    def refused(self, name: str, error: LoraxError) -> None:
        """A load failed."""
        self._put(AdapterEvent(EventKind.REFUSED, name, error=error))

    def _send(self, kind: EventKind, adapter: Adapter) -> None:
        if self._queues:
            self._put(AdapterEvent(kind, adapter.name, copy.copy(adapter)))

    def _put(self, event: AdapterEvent) -> None:
        for queue, name in list(self._queues.items()):
            if name not in (None, event.name):
                continue
            queue.put_nowait(event)
            if queue.qsize() > _MOST_UNREAD:
                del self._queues[queue]
                while not queue.empty():
                    queue.get_nowait()
                queue.put_nowait(
                    Overloaded(
                        f"more than {_MOST_UNREAD} changes were waiting to be read; watch again, "
                        "which begins with all that is there"
                    )
                )


def _stopping() -> LoraxError:
    return Draining("the server is shutting down; watch another one")
