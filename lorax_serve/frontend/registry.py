"""Names of adapters: which version answers to a name, and who still uses which version.

A version is one load; its number is the load's sequence number. A request pins the version that
its name meant when it was admitted. Loading a name again makes it mean the new version at once;
the old one is freed with its last request. All methods run on the event loop's thread.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Coroutine
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Protocol, TypeVar

from lorax_serve.core import AdapterInfo
from lorax_serve.errors import (
    AdapterConflict,
    AdapterNotFound,
    AdapterRejected,
    InvalidRequest,
    LoraxError,
    RejectReason,
)

__all__ = ["Adapter", "AdapterLoader", "AdapterRegistry", "AdapterState", "RegistryListener"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")

_T = TypeVar("_T")

_PROGRESS_SECONDS = 5.0
_MAX_WEIGHT = 100

log = logging.getLogger(__name__)


class AdapterState(Enum):
    """The life of a version."""

    READY = "ready"
    DRAINING = "draining"
    """Unloaded or replaced: no new requests, the running ones finish with it."""


@dataclass(slots=True, eq=False)
class Adapter:
    """One loaded version of an adapter."""

    name: str
    version: int
    info: AdapterInfo
    path: Path
    weight: int = 1
    """Its share of a busy server against others."""
    state: AdapterState = AdapterState.READY
    references: int = 0
    requests: int = 0
    last_used: float = field(default_factory=time.time)
    """Unix time of the last admission, or of the load."""
    unused: asyncio.Event = field(default_factory=asyncio.Event)
    """Set while no request holds it."""


class AdapterLoader(Protocol):
    """What the registry needs of the engine."""

    async def load_adapter(self, version: int, path: str) -> AdapterInfo:
        """Read and check an adapter, which is ``version`` from then on."""

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
        root: the only directory that adapters are read from; None refuses all loads.
        listener: told of every change.
    """

    def __init__(
        self,
        engine: AdapterLoader,
        root: Path | None,
        listener: RegistryListener | None = None,
    ) -> None:
        self._engine = engine
        self._root = root.resolve() if root is not None else None
        self._listener = listener or RegistryListener()
        self._by_name: dict[str, Adapter] = {}
        self._draining: dict[int, Adapter] = {}
        self._background: set[asyncio.Task[Any]] = set()
        self._loading: set[str] = set()
        self._last_version = 0

    def acquire(self, name: str) -> Adapter:
        """Pin the version that ``name`` means now; ``release`` it when the request ends.

        Raises:
            AdapterNotFound: naming what is loaded.
        """
        adapter = self._by_name.get(name)
        if adapter is None:
            raise AdapterNotFound(f"adapter_id {name!r} is not loaded; {self._known()}")
        adapter.references += 1
        adapter.requests += 1
        adapter.last_used = time.time()
        adapter.unused.clear()
        return adapter

    def release(self, adapter: Adapter) -> None:
        """Undo one ``acquire``."""
        assert adapter.references > 0, f"{adapter.name} was released too often"
        adapter.references -= 1
        if adapter.references == 0:
            adapter.unused.set()

    def adapters(self) -> list[Adapter]:
        """All loaded versions, by name, those that drain included."""
        everyone = [*self._by_name.values(), *self._draining.values()]
        return sorted(everyone, key=lambda adapter: (adapter.name, adapter.version))

    async def load(self, name: str, path: str | None = None, weight: int | None = None) -> Adapter:
        """Load the adapter directory ``path`` (inside the root; default ``name``) under ``name``.

        Loading the content that ``name`` already has, from where it has it, changes its weight at
        most; anything else replaces it for new requests. The load goes on even if this call is
        cancelled.

        Args:
            name: what requests will call it.
            path: its directory.
            weight: its share of a busy server, in [1, 100]; None keeps what the name had.

        Raises:
            InvalidRequest: the name, the path or the weight is malformed, or the path leaves the
                root.
            AdapterConflict: the name is being loaded already, or no root is configured.
            AdapterRejected: the files cannot be applied exactly; what was loaded before stays.
            Overloaded: the adapter alone is larger than the memory for adapters.
        """
        if name in self._loading:
            raise AdapterConflict(f"adapter {name!r} is being loaded by another call")
        if weight is not None and not 1 <= weight <= _MAX_WEIGHT:
            raise InvalidRequest(f"weight must be in [1, {_MAX_WEIGHT}], found {weight}")
        self._loading.add(name)
        return await asyncio.shield(self._in_background(self._load(name, path, weight)))

    async def _load(self, name: str, path: str | None, weight: int | None) -> Adapter:
        try:
            directory = self._locate(name, path)
            self._last_version += 1
            version = self._last_version
            info = await self._engine.load_adapter(version, str(directory))
        except AdapterRejected as error:
            self._listener.rejected(name, error.reason)
            raise
        except LoraxError as error:
            self._listener.rejected(name, type(error).__name__)
            raise
        finally:
            self._loading.discard(name)
        current = self._by_name.get(name)
        # The same content from elsewhere is a new version: the old directory may not be there any
        # more when its weights have to be read again.
        if current is not None and (current.info.digest, current.path) == (info.digest, directory):
            await self._engine.drop_adapter(version)
            current.weight = weight or current.weight
            return current
        adapter = Adapter(name, version, info, directory)
        adapter.weight = weight or (1 if current is None else current.weight)
        adapter.unused.set()
        self._by_name[name] = adapter
        if current is not None:
            self._retire(current)
        log.info("adapter %s loaded: version %d, digest %.12s", name, version, info.digest)
        self._listener.loaded(adapter)
        return adapter

    async def unload(self, name: str) -> int:
        """Take ``name`` away at once, wait for its last request, free it; returns the bytes.

        The unload goes on even if this call is cancelled.

        Raises:
            AdapterNotFound: naming what is loaded.
        """
        adapter = self._by_name.pop(name, None)
        if adapter is None:
            raise AdapterNotFound(f"adapter {name!r} is not loaded; {self._known()}")
        return await asyncio.shield(self._retire(adapter))

    async def load_all(self) -> dict[str, LoraxError]:
        """Load every adapter directory in the root; returns the refusals by name."""
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

    def _retire(self, adapter: Adapter) -> asyncio.Task[int]:
        adapter.state = AdapterState.DRAINING
        self._draining[adapter.version] = adapter
        return self._in_background(self._drain(adapter))

    async def _drain(self, adapter: Adapter) -> int:
        await adapter.unused.wait()
        nbytes = await self._engine.drop_adapter(adapter.version)
        del self._draining[adapter.version]
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

    def _locate(self, name: str, path: str | None) -> Path:
        if not _NAME.fullmatch(name):
            raise InvalidRequest(
                f"adapter_id {name[:140]!r} is not a valid name: letters, digits, '.', '_' and "
                "'-', at most 128, the first a letter or digit"
            )
        if self._root is None:
            raise AdapterConflict("this server loads no adapters: start it with --adapters DIR")
        wanted = path or name
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
        names = sorted(self._by_name)
        if not names:
            return "no adapter is loaded"
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        return f"loaded: {', '.join(names[:8])}{more}"
