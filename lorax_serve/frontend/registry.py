"""Names of adapters: which version answers to a name, and who still uses which version.

A version is content under a name; its identity is the content's digest, and its number is the
load's sequence number. A request names an adapter, or one of its versions (``name@digest``), and
pins it when it is admitted. Loading a name again makes it mean the new version at once, and rolling
back makes it mean an earlier one again. With a library, earlier versions stay within reach; without
one, the old version is freed with its last request. All methods run on the event loop's thread.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
import re
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar

from lorax_serve.core import AdapterInfo, AdapterScale, Part
from lorax_serve.errors import (
    AdapterConflict,
    AdapterNotFound,
    AdapterRejected,
    InvalidRequest,
    LoraxError,
    RejectReason,
    SourceFailed,
    SourceReason,
)
from lorax_serve.frontend.backoff import Backoff
from lorax_serve.frontend.compositions import Composed, Compositions
from lorax_serve.frontend.library import Fetched, Library
from lorax_serve.frontend.version import Adapter, AdapterState
from lorax_serve.report import LoadReport
from lorax_serve.store.catalog import NameRecord

__all__ = ["Adapter", "AdapterLoader", "AdapterRegistry", "AdapterState", "RegistryListener"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_DIGEST = re.compile(r"[0-9a-f]{12,64}")

_T = TypeVar("_T")

_PROGRESS_SECONDS = 5.0
_CLOSE_SECONDS = 5.0
_MAX_WEIGHT = 100
# Names in a message; there may be thousands.
_MOST_SHOWN = 8

log = logging.getLogger(__name__)


class AdapterLoader(Protocol):
    """What the registry needs of the engine."""

    async def load_adapter(self, version: int, path: str) -> AdapterInfo:
        """Read and check an adapter, which is ``version`` from then on."""

    async def inspect_adapter(self, path: str) -> LoadReport:
        """Say what a load would find."""

    async def compose_adapter(self, version: int, parts: tuple[Part, ...]) -> AdapterInfo:
        """Add several adapters up, which are ``version`` from then on."""

    async def drop_adapter(self, version: int) -> int:
        """Free a version; returns its bytes."""


class RegistryListener:
    """Told of loads, unloads and refusals; this one ignores them (metrics override it)."""

    def loaded(self, adapter: Adapter) -> None:
        """A version is ready."""

    def rejected(self, name: str, reason: str) -> None:
        """A load failed for ``reason``."""

    def unloaded(self, adapter: Adapter) -> None:
        """A version's memory is free."""


class AdapterRegistry:
    """The adapters of a server.

    Args:
        engine: loads and frees the weights.
        root: without a library, the only directory that adapters are read from; None refuses all
            loads.
        listener: told of every change.
        library: keeps what is loaded, and its earlier versions, on this server's disk.
        history: how many earlier versions of a name stay loaded.
        on_demand: whether a request loads what it names from the library's source.
        clock: seconds that never go back.
    """

    def __init__(
        self,
        engine: AdapterLoader,
        root: Path | None,
        listener: RegistryListener | None = None,
        library: Library | None = None,
        *,
        history: int = 0,
        on_demand: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._library = library
        self._history = history if library is not None else 0
        self._on_demand = on_demand and library is not None
        self._root = root.resolve() if root is not None else None
        self._listener = listener or RegistryListener()
        self._by_name: dict[str, Adapter] = {}
        self._earlier: dict[str, dict[str, Adapter]] = {}
        """Superseded versions by name and digest, the oldest first."""
        self._draining: dict[int, Adapter] = {}
        self._background: set[asyncio.Task[Any]] = set()
        self._loading: set[str] = set()
        self._wanted: dict[str, asyncio.Task[Adapter]] = {}
        """Loads that requests wait for."""
        self._backoff = Backoff(clock)
        self._last_key = 0
        self._compositions = Compositions(
            engine, self._next_key, _hold, self.release, self._in_background
        )

    def acquire(self, name: str) -> Adapter:
        """Pin the version that ``name`` means now, or that ``name@digest`` is; ``release`` it when
        the request ends.

        Raises:
            AdapterNotFound: naming what is loaded.
            InvalidRequest: what follows the ``@`` is no digest.
        """
        adapter = self._find(*_split(name))
        if adapter is None:
            raise AdapterNotFound(f"adapter_id {name!r} is not loaded; {self._known()}")
        adapter.requests += 1
        adapter.last_used = time.time()
        _hold(adapter)
        return adapter

    async def admit(self, name: str) -> Adapter:
        """``acquire``, after bringing in what this server has on its disk, or may load on demand.

        Raises:
            AdapterNotFound, InvalidRequest: as ``acquire``.
            LoraxError: as ``load``.
        """
        with suppress(AdapterNotFound):
            return self.acquire(name)
        if self._library is not None:
            base, digest = _split(name)
            if digest is None and self._on_demand and _NAME.fullmatch(base):
                await self._together(base, lambda: self._load_on_demand(base))
            elif digest is not None and base in self._by_name:
                found = await self._earlier_digest(base, digest)
                if found is not None:
                    await self._together(f"{base}@{found}", lambda: self._reload(base, found))
        return self.acquire(name)

    def release(self, adapter: Adapter) -> None:
        """Undo one ``acquire``."""
        assert adapter.references > 0, f"{adapter.name} was released too often"
        adapter.references -= 1
        if adapter.references == 0:
            adapter.unused.set()
        if isinstance(adapter, Composed):
            self._compositions.released(adapter)

    async def admit_together(self, named: Sequence[AdapterScale]) -> Adapter:
        """Pin several adapters, added up with their scales, as one; ``release`` it as any other.

        Raises:
            AdapterNotFound, InvalidRequest: as ``acquire``.
            AdapterRejected: one of them is more than LoRA.
            LoraxError: as ``load``.
        """
        parts: list[tuple[Adapter, float]] = []
        try:
            for name, scale in named:
                parts.append((await self.admit(name), scale))
            return await self._compositions.acquire(parts)
        finally:
            for adapter, _ in parts:
                self.release(adapter)

    def adapters(self) -> list[Adapter]:
        """All loaded versions, by name, those that drain included."""
        earlier = [adapter for found in self._earlier.values() for adapter in found.values()]
        everyone = [*self._by_name.values(), *earlier, *self._draining.values()]
        return sorted(everyone, key=lambda adapter: (adapter.name, adapter.version))

    async def load(self, name: str, path: str | None = None, weight: int | None = None) -> Adapter:
        """Load the adapter at ``path`` (in the root or source; default ``name``) under ``name``.

        Loading the content that ``name`` already has changes its weight at most; anything else
        replaces it for new requests. (Without a library, content must come from where it came from
        to be the same: it is read from there again.) The load goes on even if this call is
        cancelled. With a library, what this returns is still there after a restart.

        Args:
            name: what requests will call it.
            path: its directory.
            weight: its share of a busy server, in [1, 100]; None keeps what the name had.

        Raises:
            InvalidRequest: the name, the path or the weight is malformed, or the path leaves the
                root.
            AdapterConflict: the name is being loaded already, or there is no place to load from.
            SourceFailed: the source did not give it.
            AdapterRejected: the files cannot be applied exactly; what was loaded before stays.
            Overloaded: the adapter alone is larger than the memory for adapters.
        """
        self._check_free(name)
        if weight is not None and not 1 <= weight <= _MAX_WEIGHT:
            raise InvalidRequest(f"weight must be in [1, {_MAX_WEIGHT}], found {weight}")
        self._loading.add(name)
        return await asyncio.shield(self._in_background(self._load(name, path, weight)))

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
        if name not in self._by_name:
            raise AdapterNotFound(f"adapter {name!r} is not loaded; {self._known()}")
        if self._library is None:
            raise AdapterConflict(
                "this server keeps no earlier versions: start it with --state DIR to roll back"
            )
        if digest is not None and not _DIGEST.fullmatch(digest):
            raise InvalidRequest(f"digest {digest[:80]!r} must be 12 to 64 hexadecimal digits")
        self._check_free(name)
        self._loading.add(name)
        return await asyncio.shield(self._in_background(self._roll_back(name, digest)))

    async def _roll_back(self, name: str, digest: str | None) -> Adapter:
        assert self._library is not None
        try:
            target = await self._earlier_digest(name, digest)
            if target is None:
                known = ", ".join(each[:12] for each in await self._library.history(name))
                what = "no earlier version" if digest is None else f"no earlier version {digest}"
                raise AdapterConflict(f"adapter {name!r} has {what}; it has: {known or 'none'}")
            if target not in self._earlier.get(name, {}):
                await self._reload(name, target)
            record = await self._library.roll_back(name, target)
        finally:
            self._loading.discard(name)
        adapter = self._earlier[name].pop(target)
        adapter.version, adapter.weight = record.sequence, record.weight
        adapter.state = AdapterState.READY
        self._flip(adapter)
        return adapter

    async def _load(self, name: str, path: str | None, weight: int | None) -> Adapter:
        try:
            _check_name(name)
            if self._library is None:
                return await self._load_in_place(name, self._locate(path or name), weight)
            async with self._library.fetch(path or name) as fetched:
                return await self._load_fetched(self._library, name, fetched, weight)
        except (AdapterRejected, SourceFailed) as error:
            self._listener.rejected(name, error.reason)
            raise
        except LoraxError as error:
            self._listener.rejected(name, type(error).__name__)
            raise
        finally:
            self._loading.discard(name)

    async def _load_in_place(self, name: str, directory: Path, weight: int | None) -> Adapter:
        key = self._next_key()
        info = await self._engine.load_adapter(key, str(directory))
        current = self._by_name.get(name)
        # The same content from elsewhere is a new version: the old directory may not be there any
        # more when its weights have to be read again.
        if current is not None and (current.info.digest, current.path) == (info.digest, directory):
            await self._engine.drop_adapter(key)
            current.weight = weight or current.weight
            return current
        adapter = Adapter(name, key, info, directory, key)
        adapter.weight = weight or (1 if current is None else current.weight)
        self._flip(adapter)
        return adapter

    async def _load_fetched(
        self, library: Library, name: str, fetched: Fetched, weight: int | None
    ) -> Adapter:
        current = self._by_name.get(name)
        if current is not None and current.info.digest == fetched.digest:
            await library.record_origin(name, fetched)
            if weight not in (None, current.weight):
                await library.set_weight(name, weight or current.weight)
            current.weight = weight or current.weight
            return current
        key = self._next_key()
        info = await self._engine.load_adapter(key, str(fetched.directory))
        weight = weight or (1 if current is None else current.weight)
        try:
            version = await library.record(name, fetched, weight)
        except BaseException:
            await self._engine.drop_adapter(key)
            raise
        adapter = Adapter(name, version, info, fetched.directory, key, weight)
        self._flip(adapter)
        return adapter

    async def _load_on_demand(self, name: str) -> Adapter:
        """Load what a request names; what failed is left alone for a while."""
        self._backoff.check(name)
        failure: LoraxError
        try:
            adapter = await self.load(name)
        except LoraxError as error:
            failure = error
        else:
            self._backoff.succeeded(name)
            return adapter
        # Who sent the request has asked for no load: say which adapter this is about.
        if isinstance(failure, SourceFailed) and failure.reason is SourceReason.NOT_FOUND:
            failure = AdapterNotFound(f"adapter_id {name!r} is not loaded, and {failure}")
        elif isinstance(failure, AdapterRejected):
            text = f"adapter_id {name!r} is not loaded, and is refused: {failure}"
            failure = AdapterRejected(failure.reason, text, failure.report)
        self._backoff.failed(name, failure)
        raise failure

    async def _reload(self, name: str, digest: str) -> Adapter:
        """Load an earlier version from this server's disk, as ``name@digest``."""
        assert self._library is not None
        directory, key = self._library.directory(digest), self._next_key()
        info = await self._engine.load_adapter(key, str(directory))
        adapter = Adapter(name, 0, info, directory, key, state=AdapterState.SUPERSEDED)
        adapter.unused.set()
        if name not in self._by_name or self._by_name[name].info.digest == digest:
            await self._engine.drop_adapter(key)  # it was unloaded or rolled back meanwhile
            raise AdapterConflict(f"adapter {name!r} was changed by another call; try again")
        adapter.version = await self._library.sequence_of(name, digest)
        self._earlier.setdefault(name, {})[digest] = adapter
        self._listener.loaded(adapter)
        return adapter

    async def _earlier_digest(self, name: str, digest: str | None) -> str | None:
        """The whole digest of an earlier version that begins with ``digest``; the last, if None."""
        assert self._library is not None
        history = await self._library.history(name)
        return next((each for each in history if each.startswith(digest or "")), None)

    async def _together(self, what: str, load: Callable[[], Coroutine[Any, Any, Adapter]]) -> None:
        """Load once for all requests that wait for it."""
        task = self._wanted.get(what)
        if task is None:
            task = self._wanted[what] = self._in_background(load())
            task.add_done_callback(lambda done: self._wanted.pop(what, None))
        await asyncio.shield(task)

    def _flip(self, adapter: Adapter) -> None:
        """Let the name mean this version from now on."""
        current = self._by_name.get(adapter.name)
        if adapter.references == 0:
            adapter.unused.set()
        self._by_name[adapter.name] = adapter
        earlier = self._earlier.setdefault(adapter.name, {})
        twin = earlier.pop(adapter.info.digest, None)
        if twin is not None:
            self._retire(twin)
        if current is not None:
            current.state = AdapterState.SUPERSEDED
            earlier[current.info.digest] = current
        while len(earlier) > self._history:
            self._retire(earlier.pop(next(iter(earlier))))
        if not earlier:
            del self._earlier[adapter.name]
        log.info(
            "adapter %s loaded: version %d, digest %.12s",
            adapter.name,
            adapter.version,
            adapter.info.digest,
        )
        self._listener.loaded(adapter)

    async def inspect(self, name: str, path: str | None = None) -> LoadReport:
        """What ``load`` would find; nothing is loaded, and a refusal is a report.

        Raises:
            LoraxError: as ``load``, where no adapter was found to look at.
        """
        _check_name(name)
        if self._library is None:
            return await self._engine.inspect_adapter(str(self._locate(path or name)))
        # To its end, so that a call that is cancelled leaves nothing on the disk.
        work = self._in_background(self._inspect_fetched(self._library, path or name))
        return await asyncio.shield(work)

    async def _inspect_fetched(self, library: Library, path: str) -> LoadReport:
        async with library.fetch(path) as fetched:
            return await self._engine.inspect_adapter(str(fetched.directory))

    async def unload(self, name: str) -> int:
        """Take ``name`` away at once, wait for its last request, free it; returns the bytes.

        The unload goes on even if this call is cancelled.

        Raises:
            AdapterNotFound: naming what is loaded.
        """
        if name not in self._by_name:
            raise AdapterNotFound(f"adapter {name!r} is not loaded; {self._known()}")
        if self._library is not None:
            self._check_free(name)
            self._loading.add(name)
            try:
                await asyncio.shield(self._in_background(self._library.forget(name)))
            finally:
                self._loading.discard(name)
        versions = [self._by_name.pop(name), *self._earlier.pop(name, {}).values()]
        draining = [self._retire(adapter) for adapter in versions]
        return sum(await asyncio.shield(asyncio.gather(*draining)))

    async def load_all(self) -> dict[str, LoraxError]:
        """Load every adapter directory in the root; returns the refusals by name. With a library,
        that is the reconciler's work."""
        failures: dict[str, LoraxError] = {}
        if self._root is None:
            return failures
        directories = [
            each for each in sorted(self._root.iterdir()) if (each / "adapter_config.json").exists()
        ]
        last_word = time.monotonic()
        for done, directory in enumerate(directories):
            if time.monotonic() - last_word > _PROGRESS_SECONDS:
                last_word = time.monotonic()
                log.info("%d of %d adapters loaded", done - len(failures), len(directories))
            try:
                await self.load(directory.name)
            except LoraxError as error:
                failures[directory.name] = error
                log.error("adapter %s refused: %s", directory.name, error)
        return failures

    def is_loaded(self, name: str) -> bool:
        """Whether ``name`` means a version now."""
        return name in self._by_name

    async def restore(self, record: NameRecord) -> None:
        """Serve what was recorded before the server stopped.

        Raises:
            AdapterConflict: the name is being loaded.
            StoreFailed: its content is not whole.
            LoraxError: as ``load``.
        """
        assert self._library is not None
        self._check_free(record.name)
        self._loading.add(record.name)
        try:
            key, directory = self._next_key(), self._library.directory(record.digest)
            info = await self._engine.load_adapter(key, str(directory))
        finally:
            self._loading.discard(record.name)
        adapter = Adapter(record.name, record.sequence, info, directory, key, record.weight)
        self._flip(adapter)

    async def close(self) -> None:
        """Give up what is still being loaded or waits to be freed. The engine is there still."""
        for task in self._background:
            task.cancel()
        if self._background:
            await asyncio.wait(self._background, timeout=_CLOSE_SECONDS)

    def _retire(self, adapter: Adapter) -> asyncio.Task[int]:
        adapter.state = AdapterState.DRAINING
        self._draining[adapter.key] = adapter
        self._compositions.leave(adapter)
        return self._in_background(self._drain(adapter))

    async def _drain(self, adapter: Adapter) -> int:
        await adapter.unused.wait()
        nbytes = await self._engine.drop_adapter(adapter.key)
        del self._draining[adapter.key]
        if self._library is not None:
            await self._library.clean([adapter.info.digest])
        log.info("adapter %s unloaded: version %d", adapter.name, adapter.version)
        self._listener.unloaded(adapter)
        return nbytes

    def _in_background(self, work: Coroutine[Any, Any, _T]) -> asyncio.Task[_T]:
        """Run ``work`` to its end, whatever becomes of the caller."""
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        # A caller that went away leaves nobody to retrieve the error: it was logged or counted.
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        return task

    def _find(self, name: str, digest: str | None) -> Adapter | None:
        current = self._by_name.get(name)
        if digest is None or current is None:
            return current
        versions = [current, *self._earlier.get(name, {}).values()]
        return next((each for each in versions if each.info.digest.startswith(digest)), None)

    def _check_free(self, name: str) -> None:
        if name in self._loading:
            raise AdapterConflict(f"adapter {name!r} is being loaded by another call")

    def _next_key(self) -> int:
        self._last_key += 1
        return self._last_key

    def _locate(self, wanted: str) -> Path:
        if self._root is None:
            raise AdapterConflict("this server loads no adapters: start it with --adapters DIR")
        if "\0" in wanted:
            raise InvalidRequest("path holds a NUL character")
        try:
            directory = (self._root / wanted).resolve()
            is_directory = directory.is_dir()
        except (OSError, RuntimeError) as error:  # too long, or links that lead round in a circle
            raise AdapterRejected(
                RejectReason.MISSING_FILE,
                f"path {wanted[:140]!r} cannot be followed: a name is too long, or links go round",
            ) from error
        if not directory.is_relative_to(self._root):
            raise InvalidRequest(f"path {wanted!r} leads outside the server's adapter directory")
        if not is_directory:
            raise AdapterRejected(
                RejectReason.MISSING_FILE, f"no directory {wanted!r} in the adapter directory"
            )
        return directory

    def _known(self) -> str:
        if not self._by_name:
            return "no adapter is loaded"
        shown = heapq.nsmallest(_MOST_SHOWN, self._by_name)
        more = len(self._by_name) - len(shown)
        return f"loaded: {', '.join(shown)}{f' and {more} more' if more else ''}"


def _hold(adapter: Adapter) -> None:
    adapter.references += 1
    adapter.unused.clear()


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise InvalidRequest(
            f"adapter_id {name[:140]!r} is not a valid name: letters, digits, '.', '_' and "
            "'-', at most 128, the first a letter or digit"
        )


def _split(adapter_id: str) -> tuple[str, str | None]:
    """``name`` or ``name@digest``."""
    name, at, digest = adapter_id.partition("@")
    if at and not _DIGEST.fullmatch(digest):
        raise InvalidRequest(
            f"adapter_id {adapter_id[:200]!r}: after '@' come 12 to 64 hexadecimal digits of a "
            "version's digest"
        )
    return name, digest if at else None
