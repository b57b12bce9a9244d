"""The versions that this server's disk has kept, read again when somebody wants them."""

from __future__ import annotations

from lorax_serve.errors import AdapterConflict, AdapterRejected, StoreFailed
from lorax_serve.registry.in_place import InPlace
from lorax_serve.registry.library import Library
from lorax_serve.registry.names import Names
from lorax_serve.registry.version import Adapter, AdapterState
from lorax_serve.registry.versions import AdapterEngine, Versions

__all__ = ["KeptVersions"]


class KeptVersions:
    """Reads what the library keeps. Where it keeps nothing, there are no earlier versions.

    Args:
        engine: reads and checks the weights.
        library: holds the files.
        names: what is loaded.
        versions: take what was read.
    """

    def __init__(
        self, engine: AdapterEngine, library: Library | InPlace, names: Names, versions: Versions
    ) -> None:
        self._engine = engine
        self._library = library
        self._names = names
        self._versions = versions

    async def earlier_digest(self, name: str, digest: str | None) -> str | None:
        """The whole digest of an earlier version that begins with ``digest``; the last, if None."""
        history = await self._library.history(name)
        return next((each for each in history if each.startswith(digest or "")), None)

    async def reload(self, name: str, digest: str) -> Adapter:
        """Load an earlier version, as ``name@digest``.

        Raises:
            AdapterConflict: it is an earlier version no more.
            LoraxError: as ``read``.
        """
        assert isinstance(self._library, Library)
        adapter = await self.read(name, digest)
        adapter.state = AdapterState.SUPERSEDED
        adapter.version = await self._library.sequence_of(name, digest)
        current, twin = self._names.get(name), self._names.earlier(name, digest)
        if twin is None and adapter.version and current and current.info.digest != digest:
            self._versions.add_earlier(adapter)
            return adapter
        # It was unloaded, rolled back, forgotten, or read by another call meanwhile.
        await self._engine.drop_adapter(adapter.key)
        if twin is not None:
            return twin
        raise AdapterConflict(f"adapter {name!r} was changed by another call; try again")

    async def read(self, name: str, digest: str) -> Adapter:
        """Load content that this server's disk has kept, if it is what it was.

        Raises:
            StoreFailed: it is not there, or has other bytes.
            LoraxError: the engine does not take it.
        """
        assert isinstance(self._library, Library)
        directory, key = self._library.directory(digest), self._versions.next_key()
        try:
            info = await self._engine.load_adapter(key, str(directory))
        except AdapterRejected:
            await self._library.check(digest)
            raise
        if info.digest != digest:
            await self._engine.drop_adapter(key)
            await self._library.check(digest)
            raise StoreFailed(f"{directory} was changed while it was read; try again")
        return Adapter(name, 0, info, directory, key)
