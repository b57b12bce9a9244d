"""Adapters that are read from where they are: nothing is kept on the server's disk."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path

from lorax_serve.errors import AdapterConflict, AdapterRejected, InvalidRequest, RejectReason
from lorax_serve.registry.library import Fetched
from lorax_serve.registry.upload import Upload
from lorax_serve.store.catalog import Recorded
from lorax_serve.store.digest import CONFIG_FILE

__all__ = ["InPlace"]


class InPlace:
    """The part of a ``Library`` that needs no state directory. Nothing survives a restart, and of
    a name only one version is served.

    Args:
        root: the only directory that adapters are read from; None refuses all loads.

    Attributes:
        keeps: whether what is loaded is kept, with its earlier versions.
    """

    keeps = False

    def __init__(self, root: Path | None) -> None:
        self.root = root.resolve() if root is not None else None
        self._sequence = itertools.count(1)

    async def listing(self) -> list[str]:
        """The paths of all adapters right below the root."""
        root = self.root
        if root is None:
            return []
        return await asyncio.to_thread(
            lambda: sorted(each.parent.name for each in root.glob(f"*/{CONFIG_FILE}"))
        )

    @asynccontextmanager
    async def fetch(self, path: str) -> AsyncIterator[Fetched]:
        """An adapter's directory, whose digest is not known yet.

        Raises:
            AdapterConflict: there is no root.
            InvalidRequest: the path is malformed or leads outside of it.
            AdapterRejected: there is no such directory.
        """
        directory = self._locate(path)
        yield Fetched("", directory, str(self.root), path, "")

    @asynccontextmanager
    async def receive(self, upload: Upload) -> AsyncIterator[Fetched]:
        """Refuse an upload: there is no place to keep it."""
        raise AdapterConflict(
            "this server takes no uploads: start it with --state DIR, where they are kept"
        )
        yield

    async def record(self, name: str, fetched: Fetched, weight: int, pinned: bool) -> Recorded:
        """The load's sequence number."""
        return Recorded(next(self._sequence), frozenset())

    async def record_origin(self, name: str, fetched: Fetched) -> None:
        """Nothing is kept."""

    async def set_weight(self, name: str, weight: int) -> None:
        """Nothing is kept."""

    async def set_pinned(self, name: str, pinned: bool) -> None:
        """Nothing is kept."""

    async def forget(self, name: str) -> frozenset[str]:
        """Nothing is kept."""
        return frozenset()

    async def clean(self, digests: Iterable[str]) -> int:
        """Nothing is kept."""
        return 0

    async def history(self, name: str) -> list[str]:
        """Nothing is kept."""
        return []

    def _locate(self, wanted: str) -> Path:
        if self.root is None:
            raise AdapterConflict("this server loads no adapters: start it with --adapters DIR")
        if "\0" in wanted:
            raise InvalidRequest("path holds a NUL character")
        try:
            directory = (self.root / wanted).resolve()
            is_directory = directory.is_dir()
        except (OSError, RuntimeError) as error:  # too long, or links that lead round in a circle
            raise AdapterRejected(
                RejectReason.MISSING_FILE,
                f"path {wanted[:140]!r} cannot be followed: a name is too long, or links go round",
            ) from error
        if not directory.is_relative_to(self.root):
            raise InvalidRequest(f"path {wanted!r} leads outside the server's adapter directory")
        if not is_directory:
            raise AdapterRejected(
                RejectReason.MISSING_FILE, f"no directory {wanted!r} in the adapter directory"
            )
        return directory
