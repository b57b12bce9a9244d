"""The adapters of a server: which version answers to a name, and how that is changed.

A version is content under a name; its identity is the content's digest, and its number is the
load's sequence number. A request names an adapter, or one of its versions (``name@digest``), and
pins it when it is admitted (``admission``). Loading a name again makes it mean the new version at
once, and rolling back makes it mean an earlier one again. Where nothing keeps earlier versions, the
old one is freed with its last request. All methods run on the event loop's thread.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack

from lorax_serve.core import AdapterTier, Freed
from lorax_serve.errors import AdapterConflict, AdapterNotFound, InvalidRequest, LoraxError
from lorax_serve.registry.admission import Admission
from lorax_serve.registry.background import Background
from lorax_serve.registry.backoff import Backoff
from lorax_serve.registry.compositions import Compositions
from lorax_serve.registry.events import RegistryListener
from lorax_serve.registry.in_place import InPlace
from lorax_serve.registry.kept import KeptVersions
from lorax_serve.registry.library import Fetched, Library
from lorax_serve.registry.names import Names, check_digest, check_name
from lorax_serve.registry.residency import Residency, residency_of
from lorax_serve.registry.upload import Upload
from lorax_serve.registry.version import MAX_WEIGHT, Adapter
from lorax_serve.registry.versions import AdapterEngine, Versions
from lorax_serve.report import LoadReport
from lorax_serve.store.catalog import NameRecord

__all__ = ["AdapterRegistry"]

log = logging.getLogger(__name__)


class AdapterRegistry:
    """The adapters of a server.

    Args:
        engine: loads and frees the weights.
        library: where adapters come from, and what keeps them on this server's disk.
        listeners: told of every change.
        history: how many earlier versions of a name stay loaded.
        on_demand: whether a request loads what it names from the library's source.
        clock: seconds that never go back.

    Attributes:
        admission: what requests use.
    """

    def __init__(
        self,
        engine: AdapterEngine,
        library: Library | InPlace,
        listeners: Sequence[RegistryListener] = (),
        *,
        history: int = 0,
        on_demand: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._library = library
        self._names = names = Names(history if library.keeps else 0)
        self._background = background = Background()
        self._versions = versions = Versions(engine, library, names, background, listeners)
        self._kept = KeptVersions(engine, library, names, versions)
        self._loading: set[str] = set()
        self._backoff = Backoff(clock)
        self._compositions = compositions = Compositions(engine, versions, background)
        versions.on_retired = compositions.leave
        self.admission = Admission(
            names,
            library,
            self._kept,
            compositions,
            background,
            self._backoff,
            self.load if on_demand and library.keeps else None,
        )

    def adapters(self) -> list[Adapter]:
        """All loaded versions, by name, those that drain included."""
        return sorted(self._versions, key=lambda adapter: (adapter.name, adapter.version))

    async def tiers(self) -> dict[int, AdapterTier]:
        """Where the versions' weights are, by key."""
        return await self._engine.find_adapters()

    async def residency(self) -> Residency:
        """Which names are in memory, and which have requests."""
        tiers, work = await asyncio.gather(self._engine.find_adapters(), self._engine.find_work())
        return residency_of(self._versions, self._compositions, tiers, work)

    def is_loaded(self, name: str) -> bool:
        """Whether ``name`` means a version now."""
        return name in self._names

    async def load(
        self,
        name: str,
        path: str | None = None,
        weight: int | None = None,
        pinned: bool | None = None,
    ) -> Adapter:
        """Load the adapter at ``path`` (in the root or source; default ``name``) under ``name``.

        Loading the content that ``name`` already has changes its weight and pin at most; anything
        else replaces it for new requests. (Where nothing is kept, content must come from where it
        came from to be the same: it is read from there again.) The load goes on even if this call
        is cancelled. With a state directory, what this returns is still there after a restart.

        Args:
            name: what requests will call it.
            path: its directory.
            weight: its share of a busy server, in [1, 100]; None keeps what the name had.
            pinned: whether its weights never leave host memory; None keeps what the name had.

        Raises:
            InvalidRequest: the name, the path or the weight is malformed, or the path leaves the
                root.
            AdapterConflict: the name is being loaded already, or there is no place to load from.
            SourceFailed: the source did not give it.
            AdapterRejected: the files cannot be applied exactly; what was loaded before stays.
            Overloaded: the adapter is larger than the memory for adapters beside pinned ones.
        """
        return await self.load_from(name, self._library.fetch(path or name), weight, pinned)

    async def load_from(
        self,
        name: str,
        fetching: AbstractAsyncContextManager[Fetched],
        weight: int | None = None,
        pinned: bool | None = None,
    ) -> Adapter:
        """``load`` what a library fetches; the rest is as there.

        Args:
            name: what requests will call it.
            fetching: is entered for this.
            weight: as there.
            pinned: as there.
        """
        _check_weight(weight)
        self._begin(name)
        return await asyncio.shield(
            self._background.run(self._load(name, fetching, weight, pinned))
        )

    async def upload(
        self, name: str, upload: Upload, weight: int | None = None, pinned: bool | None = None
    ) -> Adapter:
        """Load what a client sends under ``name``; the rest is as ``load``.

        If this call is cancelled before all has come, nothing is left of it.

        Raises:
            LoraxError: as ``load``; AdapterRejected also if the bytes have another digest.
        """
        _check_weight(weight)
        self._begin(name)
        try:
            with self._versions.telling(name):
                check_name(name)
                async with AsyncExitStack() as stack:
                    fetched = await stack.enter_async_context(self._library.receive(upload))
                    received = stack.pop_all()
        except BaseException:
            self._loading.discard(name)
            raise
        return await asyncio.shield(
            self._background.run(self._take(name, received, fetched, weight, pinned))
        )

    async def inspect(self, name: str, path: str | None = None) -> LoadReport:
        """What ``load`` would find; nothing is loaded, and a refusal is a report.

        Raises:
            LoraxError: as ``load``, where no adapter was found to look at.
        """
        check_name(name)
        # To its end, so that a call that is cancelled leaves nothing on the disk.
        return await asyncio.shield(self._background.run(self._inspect(path or name)))

    async def close(self) -> None:
        """Give up what is still being loaded or waits to be freed. The engine is there still."""
        await self._background.close()

    async def update(
        self, name: str, weight: int | None = None, pinned: bool | None = None
    ) -> Adapter:
        """Change the weight or the pin of what ``name`` means; None leaves it as it is.

        Raises:
            AdapterNotFound: naming what is loaded.
            AdapterConflict: the name is being loaded.
            InvalidRequest: the weight is out of range.
            Overloaded: pinning it would leave others no room.
        """
        _check_weight(weight)
        adapter = self._loaded(name)
        self._begin(name)
        return await asyncio.shield(self._background.run(self._update(adapter, weight, pinned)))

    async def roll_back(self, name: str, digest: str | None = None) -> Adapter:
        """Make ``name`` mean an earlier version again: the last one, or that with this digest.

        Returns:
            That version, with a new sequence number. The one it replaces can be rolled back to.

        Raises:
            AdapterNotFound: naming what is loaded.
            AdapterConflict: the name is being loaded, has no such version, or nothing is kept of
                earlier versions.
            InvalidRequest: the digest is none.
        """
        self._loaded(name)
        if isinstance(self._library, InPlace):
            raise AdapterConflict(
                "this server keeps no earlier versions: start it with --state DIR to roll back"
            )
        if digest is not None:
            check_digest(digest)
        self._begin(name)
        return await asyncio.shield(
            self._background.run(self._roll_back(self._library, name, digest))
        )

    async def unload(self, name: str) -> Freed:
        """Take ``name`` away at once, wait for its last request, free it; returns the bytes.

        The unload goes on even if this call is cancelled.

        Raises:
            AdapterNotFound: naming what is loaded.
            AdapterConflict: the name is being loaded.
        """
        freeing = await self.take_away(name)
        freed = Freed()
        for each in await asyncio.shield(asyncio.gather(*freeing)):
            freed = freed.plus(each)
        return freed

    async def take_away(self, name: str) -> list[asyncio.Task[Freed]]:
        """Take ``name`` away at once; its last request is not waited for.

        Returns:
            What frees its versions.

        Raises:
            AdapterNotFound, AdapterConflict: as ``unload``.
        """
        self._loaded(name)
        self._begin(name)
        return await asyncio.shield(self._background.run(self._unload(name)))

    async def follow(self, name: str, record: NameRecord | None) -> None:
        """Load what the source has of ``name``, unless somebody has turned away from that content.

        Args:
            name: and its path in the source.
            record: what was recorded of it when this was decided.

        Raises:
            AdapterConflict: the name is being loaded, or another call has changed it meanwhile.
            LoraxError: as ``load``.
        """
        assert isinstance(self._library, Library)
        self._begin(name)
        await asyncio.shield(self._background.run(self._follow(self._library, name, record)))

    async def restore(self, record: NameRecord) -> None:
        """Serve what was recorded before the server stopped.

        Raises:
            AdapterConflict: the name is being loaded, or another call has changed it meanwhile.
            StoreFailed: its content is not whole.
            LoraxError: as ``load``.
        """
        assert isinstance(self._library, Library)
        self._begin(record.name)
        try:
            await self._check_unchanged(self._library, record.name, record)
            with self._versions.telling(record.name):
                adapter = await self._kept.read(record.name, record.digest)
            adapter.version, adapter.weight = record.sequence, record.weight
            if record.pinned:
                try:
                    await self._engine.pin_adapter(adapter.key)
                    adapter.pinned = True
                except LoraxError as error:  # it is served all the same
                    log.error("adapter %s is not pinned any more: %s", record.name, error)
            self._versions.flip(adapter)
        finally:
            self._loading.discard(record.name)

    # What goes on in the background, whatever becomes of the caller

    async def _load(
        self,
        name: str,
        fetching: AbstractAsyncContextManager[Fetched],
        weight: int | None,
        pinned: bool | None,
    ) -> Adapter:
        try:
            with self._versions.telling(name):
                check_name(name)
                async with fetching as fetched:
                    return await self._bring_in(name, fetched, weight, pinned)
        finally:
            self._loading.discard(name)

    async def _follow(self, library: Library, name: str, record: NameRecord | None) -> None:
        try:
            await self._check_unchanged(library, name, record)
            with self._versions.telling(name):
                check_name(name)
                async with library.fetch(name) as fetched:
                    if await library.turns_down(name, fetched):
                        return
                    weight = pinned = None
                    if record is not None and name not in self._names:  # it was not restored
                        weight, pinned = record.weight, record.pinned
                    await self._bring_in(name, fetched, weight, pinned)
        finally:
            self._loading.discard(name)

    async def _check_unchanged(
        self, library: Library, name: str, record: NameRecord | None
    ) -> None:
        """Refuse to act on what somebody has changed before ``_begin`` kept others away."""
        if await library.find(name) != record:
            raise AdapterConflict(f"adapter {name!r} was changed by another call; try again")

    async def _inspect(self, path: str) -> LoadReport:
        async with self._library.fetch(path) as fetched:
            return await self._engine.inspect_adapter(str(fetched.directory))

    async def _take(
        self,
        name: str,
        received: AsyncExitStack,
        fetched: Fetched,
        weight: int | None,
        pinned: bool | None,
    ) -> Adapter:
        try:
            with self._versions.telling(name):
                async with received:
                    return await self._bring_in(name, fetched, weight, pinned)
        finally:
            self._loading.discard(name)

    async def _bring_in(
        self, name: str, fetched: Fetched, weight: int | None, pinned: bool | None
    ) -> Adapter:
        current = self._names.get(name)
        if current is not None and current.info.digest == fetched.digest:
            await self._library.record_origin(name, fetched)
            return await self._set(current, weight, pinned)
        key = self._versions.next_key()
        info = await self._engine.load_adapter(key, str(fetched.directory))
        same = (info.digest, fetched.directory)
        if current is not None and (current.info.digest, current.path) == same:
            await self._engine.drop_adapter(key)
            return await self._set(current, weight, pinned)
        adapter = Adapter(name, 0, info, fetched.directory, key)
        adapter.weight = weight or (1 if current is None else current.weight)
        adapter.pinned = current is not None and current.pinned if pinned is None else pinned
        try:
            await self._pin(adapter, current)
            recorded = await self._library.record(name, fetched, adapter.weight, adapter.pinned)
        except BaseException:
            await self._engine.drop_adapter(key)
            raise
        adapter.version = recorded.sequence
        self._versions.flip(adapter)
        self._backoff.succeeded(name)
        self._versions.clean(recorded.unreferenced)
        return adapter

    async def _update(self, adapter: Adapter, weight: int | None, pinned: bool | None) -> Adapter:
        try:
            return await self._set(adapter, weight, pinned)
        finally:
            self._loading.discard(adapter.name)

    async def _set(self, adapter: Adapter, weight: int | None, pinned: bool | None) -> Adapter:
        changed = False
        if pinned is not None and pinned != adapter.pinned:
            await self._set_pinned(adapter, pinned)
            changed = True
        if weight is not None and weight != adapter.weight:
            await self._library.set_weight(adapter.name, weight)
            adapter.weight = weight
            changed = True
        if changed:
            self._versions.tell_changed(adapter)
        return adapter

    async def _set_pinned(self, adapter: Adapter, pinned: bool) -> None:
        """What is recorded is pinned in the engine at all times."""
        if pinned:
            await self._engine.pin_adapter(adapter.key)
        try:
            await self._library.set_pinned(adapter.name, pinned)
            adapter.pinned = pinned
        finally:
            if not adapter.pinned:
                await self._engine.unpin_adapter(adapter.key)

    async def _pin(self, adapter: Adapter, before: Adapter | None) -> None:
        """Pin a version that is to be, if its name says so."""
        if adapter.pinned:
            instead = before.key if before is not None and before.pinned else None
            await self._engine.pin_adapter(adapter.key, instead)

    async def _roll_back(self, library: Library, name: str, digest: str | None) -> Adapter:
        try:
            target = await self._kept.earlier_digest(name, digest)
            if target is None:
                known = ", ".join(each[:12] for each in await library.history(name))
                what = "no earlier version" if digest is None else f"no earlier version {digest}"
                raise AdapterConflict(f"adapter {name!r} has {what}; it has: {known or 'none'}")
            adapter = self._names.earlier(name, target) or await self._kept.reload(name, target)
            current = self._names.get(name)
            adapter.pinned = current is not None and current.pinned
            try:
                await self._pin(adapter, current)
                record = await library.roll_back(name, target)
            except BaseException:  # it stays an earlier version
                if adapter.pinned:
                    adapter.pinned = False
                    await self._engine.unpin_adapter(adapter.key)
                raise
            adapter.version, adapter.weight = record.sequence, record.weight
            self._versions.flip(adapter)
            return adapter
        finally:
            self._loading.discard(name)

    async def _unload(self, name: str) -> list[asyncio.Task[Freed]]:
        try:
            unreferenced = await self._library.forget(name)
            draining = [self._versions.retire(adapter) for adapter in self._names.remove(name)]
            return [*draining, self._versions.clean(unreferenced)]
        finally:
            self._loading.discard(name)

    def _loaded(self, name: str) -> Adapter:
        adapter = self._names.get(name)
        if adapter is None:
            raise AdapterNotFound(f"adapter {name!r} is not loaded; {self._names}")
        return adapter

    def _begin(self, name: str) -> None:
        """Keep other changes of the name away, until it is taken from ``_loading``."""
        if name in self._loading:
            raise AdapterConflict(
                f"adapter {name!r} is being loaded by another call; try again when that has ended"
            )
        self._loading.add(name)


def _check_weight(weight: int | None) -> None:
    if weight is not None and not 1 <= weight <= MAX_WEIGHT:
        raise InvalidRequest(f"weight must be in [1, {MAX_WEIGHT}], found {weight}")
