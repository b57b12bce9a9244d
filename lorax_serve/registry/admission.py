"""What requests use: they pin the version that they name, from their admission to their end.

What a request names and is not in memory may be brought in for it: an earlier version that this
server's disk has kept, or what the source has, if adapters are loaded on demand.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Any

from lorax_serve.core import AdapterScale
from lorax_serve.errors import (
    AdapterConflict,
    AdapterNotFound,
    AdapterRejected,
    LoraxError,
    SourceFailed,
    SourceReason,
)
from lorax_serve.registry.background import Background
from lorax_serve.registry.backoff import Backoff
from lorax_serve.registry.compositions import Composed, Compositions
from lorax_serve.registry.in_place import InPlace
from lorax_serve.registry.kept import KeptVersions
from lorax_serve.registry.library import Library
from lorax_serve.registry.names import Names, is_name, split_name
from lorax_serve.registry.version import Adapter

__all__ = ["Admission"]


class Admission:
    """Admits requests to the adapters of a server.

    Args:
        names: what is loaded.
        library: what is on the disk.
        kept: reads earlier versions again.
        compositions: adapters that requests name together.
        background: loads for requests, whatever becomes of them.
        backoff: which names not to try again for a while.
        load: loads a name from the source; None: nothing is loaded on demand.
    """

    def __init__(
        self,
        names: Names,
        library: Library | InPlace,
        kept: KeptVersions,
        compositions: Compositions,
        background: Background,
        backoff: Backoff,
        load: Callable[[str], Coroutine[Any, Any, Adapter]] | None,
    ) -> None:
        self._names = names
        self._library = library
        self._kept = kept
        self._compositions = compositions
        self._background = background
        self._backoff = backoff
        self._load = load
        self._wanted: dict[str, asyncio.Task[Adapter]] = {}
        """Loads that requests wait for."""

    def acquire(self, name: str) -> Adapter:
        """Pin the version that ``name`` means now, or that ``name@digest`` is; ``release`` it when
        the request ends.

        Raises:
            AdapterNotFound: naming what is loaded.
            InvalidRequest: what follows the ``@`` is no digest.
        """
        adapter = self._names.find(*split_name(name))
        if adapter is None:
            raise AdapterNotFound(f"adapter_id {name!r} is not loaded; {self._names}")
        adapter.requests += 1
        adapter.last_used = time.time()
        adapter.hold()
        return adapter

    async def admit(self, name: str) -> Adapter:
        """``acquire``, after bringing in what this server has on its disk, or may load on demand.

        Raises:
            AdapterNotFound, InvalidRequest: as ``acquire``.
            LoraxError: as a load of it.
        """
        with suppress(AdapterNotFound):
            return self.acquire(name)
        base, digest = split_name(name)
        if digest is None and self._load is not None and is_name(base):
            load = self._load
            await self._together(base, lambda: self._load_on_demand(base, load))
        elif digest is not None and base in self._names:
            found = await self._kept.earlier_digest(base, digest)
            if found is None:
                raise AdapterNotFound(await self._no_such_version(base, digest))
            await self._together(f"{base}@{found}", lambda: self._kept.reload(base, found))
        return self.acquire(name)

    async def admit_together(self, named: Sequence[AdapterScale]) -> Adapter:
        """Pin several adapters, added up with their scales, as one; ``release`` it as any other.

        Raises:
            AdapterNotFound, InvalidRequest: as ``acquire``.
            AdapterRejected: one of them is more than LoRA.
            LoraxError: as a load of one of them.
        """
        parts: list[tuple[Adapter, float]] = []
        try:
            for name, scale in named:
                parts.append((await self.admit(name), scale))
            return await self._compositions.acquire(parts)
        except BaseException:
            for adapter, _ in parts:
                adapter.release()
            raise

    def release(self, adapter: Adapter) -> None:
        """Undo one ``acquire``."""
        adapter.release()
        if isinstance(adapter, Composed):
            for part, _ in adapter.parts:
                part.release()
            self._compositions.released(adapter)

    async def _together(self, what: str, load: Callable[[], Coroutine[Any, Any, Adapter]]) -> None:
        """Load once for all requests that wait for it."""
        task = self._wanted.get(what)
        if task is None:
            task = self._wanted[what] = self._background.run(load())
            task.add_done_callback(lambda done: self._wanted.pop(what, None))
        await asyncio.shield(task)

    async def _load_on_demand(
        self, name: str, load: Callable[[str], Coroutine[Any, Any, Adapter]]
    ) -> Adapter:
        """Load what a request names; what failed is left alone for a while."""
        self._backoff.check(name)
        failure: LoraxError
        try:
            await self._check_unrecorded(name)
            return await load(name)
        except AdapterConflict:  # somebody loads it
            raise
        except LoraxError as error:
            failure = error
        # Who sent the request has asked for no load: say which adapter this is about.
        if isinstance(failure, SourceFailed) and failure.reason is SourceReason.NOT_FOUND:
            failure = AdapterNotFound(f"adapter_id {name!r} is not loaded, and {failure}")
        elif isinstance(failure, AdapterRejected):
            text = f"adapter_id {name!r} is not loaded, and is refused: {failure}"
            failure = AdapterRejected(failure.reason, text, failure.report)
        self._backoff.failed(name, failure)
        raise failure

    async def _check_unrecorded(self, name: str) -> None:
        """Refuse to load for a request what means something already, which cannot be served."""
        assert isinstance(self._library, Library)
        record = await self._library.find(name)
        if record is not None and name not in self._names:
            raise AdapterNotFound(
                f"adapter_id {name!r} is not loaded: it means the digest {record.digest:.12}, "
                "which cannot be served now (the server's log says why); load or upload it again "
                "to replace that"
            )

    async def _no_such_version(self, name: str, digest: str) -> str:
        current = self._names.get(name)
        earlier = ", ".join(each[:12] for each in await self._library.history(name))
        means = "nothing" if current is None else current.info.digest[:12]
        return (
            f"adapter_id {f'{name}@{digest}'!r} is not loaded; {name!r} means {means} now, its "
            f"earlier versions are: {earlier or 'none'}"
        )
