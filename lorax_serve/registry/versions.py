"""The versions that the engine holds: who uses them, when they are freed, who is told."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from lorax_serve.core import AdapterInfo, AdapterTier, AdapterWork, Freed, Part
from lorax_serve.errors import LoraxError
from lorax_serve.registry.background import Background
from lorax_serve.registry.events import RegistryListener
from lorax_serve.registry.in_place import InPlace
from lorax_serve.registry.library import Library
from lorax_serve.registry.names import Names
from lorax_serve.registry.version import Adapter, AdapterState
from lorax_serve.report import LoadReport

__all__ = ["AdapterEngine", "Versions"]

log = logging.getLogger(__name__)


class AdapterEngine(Protocol):
    """What is needed of the engine."""

    async def load_adapter(self, version: int, path: str) -> AdapterInfo:
        """Read and check an adapter, which is ``version`` from then on."""

    async def inspect_adapter(self, path: str) -> LoadReport:
        """Say what a load would find."""

    async def compose_adapter(self, version: int, parts: tuple[Part, ...]) -> AdapterInfo:
        """Add several adapters up, which are ``version`` from then on."""

    async def drop_adapter(self, version: int) -> Freed:
        """Free a version; returns its bytes."""

    async def pin_adapter(self, version: int, instead_of: int | None = None) -> None:
        """Keep a version in host memory."""

    async def unpin_adapter(self, version: int) -> None:
        """Let a version leave host memory again."""

    async def find_adapters(self) -> dict[int, AdapterTier]:
        """Where each version is."""

    async def find_work(self) -> AdapterWork:
        """Which versions have requests."""


class Versions:
    """All versions, and their end: one that no name and no history has any more drains, and is
    freed with its last request.

    Args:
        engine: holds the weights.
        library: holds the files.
        names: which of them the names mean.
        background: runs what must not end with a call.
        listeners: told of every change.

    Attributes:
        on_retired: called with each version that begins to drain.
    """

    def __init__(
        self,
        engine: AdapterEngine,
        library: Library | InPlace,
        names: Names,
        background: Background,
        listeners: Sequence[RegistryListener],
    ) -> None:
        self.on_retired: Callable[[Adapter], None] = lambda adapter: None
        self._engine = engine
        self._library = library
        self._names = names
        self._background = background
        self._listeners = listeners
        self._draining: dict[int, Adapter] = {}
        self._last_key = 0

    def __iter__(self) -> Iterator[Adapter]:
        """All, those that drain included."""
        yield from self._names
        yield from self._draining.values()

    def next_key(self) -> int:
        """A number for the engine that no other version has."""
        self._last_key += 1
        return self._last_key

    def flip(self, adapter: Adapter) -> None:
        """Let its name mean this version from now on."""
        before = self._names.get(adapter.name)
        left_over = self._names.put(adapter)
        if before is not None:
            if before.pinned:
                before.pinned = False
                self._background.run(self._engine.unpin_adapter(before.key))
            if before not in left_over:
                self.tell_changed(before)
        for each in left_over:
            self.retire(each)
        log.info(
            "adapter %s loaded: version %d, digest %.12s",
            adapter.name,
            adapter.version,
            adapter.info.digest,
        )
        self._tell_loaded(adapter)

    def add_earlier(self, adapter: Adapter) -> None:
        """Take a version that its name meant before."""
        self._names.add_earlier(adapter)
        self._tell_loaded(adapter)

    def retire(self, adapter: Adapter) -> asyncio.Task[Freed]:
        """Let a version that no name has any more end with its last request."""
        adapter.state = AdapterState.DRAINING
        self._draining[adapter.key] = adapter
        self.tell_changed(adapter)
        self.on_retired(adapter)
        return self._background.run(self._drain(adapter))

    def clean(self, digests: Iterable[str]) -> asyncio.Task[Freed]:
        """Delete content that nothing refers to and no version has; returns the bytes.

        Versions that are read again from the disk need theirs until they end, and take it along.
        """
        held = {adapter.info.digest for adapter in self}
        return self._background.run(self._clean([each for each in digests if each not in held]))

    @contextmanager
    def telling(self, name: str) -> Iterator[None]:
        """Tell the listeners why a load has failed."""
        try:
            yield
        except LoraxError as error:
            failure = error  # a name that outlives this block
            self._tell(lambda listener: listener.refused(name, failure))
            raise

    def tell_changed(self, adapter: Adapter) -> None:
        """Tell the listeners that something about a version is different."""
        self._tell(lambda listener: listener.changed(adapter))

    async def _drain(self, adapter: Adapter) -> Freed:
        await adapter.unused.wait()
        freed = await self._engine.drop_adapter(adapter.key)
        del self._draining[adapter.key]
        freed = freed.plus(await self.clean([adapter.info.digest]))
        log.info("adapter %s unloaded: version %d", adapter.name, adapter.version)
        self._tell(lambda listener: listener.unloaded(adapter))
        return freed

    async def _clean(self, digests: Sequence[str]) -> Freed:
        return Freed(disk=await self._library.clean(digests))

    def _tell_loaded(self, adapter: Adapter) -> None:
        self._tell(lambda listener: listener.loaded(adapter))

    def _tell(self, what: Callable[[RegistryListener], None]) -> None:
        for listener in self._listeners:
            try:
                what(listener)
            except Exception:  # a defect of its own, which must not leave a change half done
                log.exception("a listener failed")
