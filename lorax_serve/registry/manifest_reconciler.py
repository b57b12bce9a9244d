"""Brings what is served into line with a manifest, and keeps it so.

Unlike a source that is watched (``reconciler``), a manifest says what is *not* wanted too: what
somebody takes out of it is unloaded. Each entry is a task of its own, so that one that fails, or
whose source hangs, holds up no other; nor does the manifest's own place.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from lorax_serve.errors import (
    AdapterConflict,
    AdapterRejected,
    InvalidRequest,
    LoraxError,
    SourceFailed,
    StoreFailed,
)
from lorax_serve.registry.background import Background
from lorax_serve.registry.backoff import Backoff
from lorax_serve.registry.library import Library
from lorax_serve.registry.manifest import Entry
from lorax_serve.registry.manifest_reader import ManifestReader
from lorax_serve.registry.registry import AdapterRegistry
from lorax_serve.sources import Source, WatchableSource, open_source
from lorax_serve.store.catalog import NameRecord

__all__ = ["ManifestReconciler"]

_MOST_AT_ONCE = 8
# How long a pass waits for what the manifest says now, before it begins with what it said last.
_READ_SECONDS = 1.0

log = logging.getLogger(__name__)


class ManifestReconciler:
    """Works on a registry and its library.

    Args:
        registry: serves; nobody else changes what it has.
        library: remembers, so that a restart needs no source.
        reader: of the manifest. What it has read before holds until it can read it again.
        root: where the directories are that entries may name; None: they may name none.
        clock: seconds that never go back.

    Attributes:
        failures: what could not be served when it was last tried, by name; under the manifest's
            place why that could not be read.
        read_errors: how often that could not be read.
        wanted: how many adapters should be served.
    """

    def __init__(
        self,
        registry: AdapterRegistry,
        library: Library,
        reader: ManifestReader,
        root: Path | None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.failures: dict[str, LoraxError] = {}
        self.read_errors = 0
        self._registry = registry
        self._library = library
        self._reader = reader
        self._root = None if root is None else Path(os.path.abspath(root))
        self._backoff = Backoff(clock)
        self._background = Background()
        self._places = asyncio.Semaphore(_MOST_AT_ONCE)
        self._at_work: dict[str, asyncio.Task[None]] = {}
        self._sources: dict[str, Source] = {}

    @property
    def wanted(self) -> int:
        """How many adapters should be served; 0 until a manifest has been read."""
        manifest = self._reader.last
        return len(manifest.names) if manifest is not None else 0

    async def run_once(self) -> None:
        """Read the manifest, and do one pass, to its end: every entry has been tried."""
        await self._read()
        await self._begin_pass()
        if self._at_work:
            await asyncio.wait(list(self._at_work.values()))

    async def run_for_ever(self, seconds: float) -> None:
        """Read the manifest and begin a pass every so many seconds, until cancelled.

        While a read hangs, passes begin with what was read last, and one more when it has ended.
        """
        reading: asyncio.Task[None] | None = None
        while True:
            if reading is None:
                await asyncio.sleep(seconds)
                reading = self._background.run(self._read())
                await asyncio.wait([reading], timeout=_READ_SECONDS)
            else:
                await asyncio.wait([reading], timeout=seconds)
            try:
                if reading.done():
                    ended, reading = reading, None
                    ended.result()
                await self._begin_pass()
            except LoraxError as error:  # the disk, say
                log.error("the manifest cannot be followed now: %s", error)
            except Exception:  # a defect of ours, but the next pass may do
                log.exception("the manifest cannot be followed now")

    async def close(self) -> None:
        """Give up what is still at work."""
        await self._background.close()

    async def _begin_pass(self) -> None:
        """Begin to bring what is served into line with what the manifest said last."""
        records = {record.name: record for record in await self._library.names()}
        manifest = self._reader.last
        entries = {} if manifest is None else manifest.entries
        rest = records.keys() - entries.keys()
        if manifest is not None and manifest.all_named:
            for name in rest - manifest.broken.keys():
                self._start(name, self._unload(name))
            rest &= manifest.broken.keys()
        # What a manifest says that cannot be read, as a whole or of this name, may be anything:
        # what was served goes on until somebody mends it.
        wanted = {name: _as_recorded(records[name]) for name in rest} | {**entries}
        for name in sorted(wanted, key=lambda name: (name in self.failures, name)):
            entry, record = wanted[name], records.get(name)
            if self._is_served(entry, record):
                self._succeeded(entry)
            else:
                self._start(name, self._try(entry, record))

    async def _read(self) -> None:
        """Take in what the manifest says now, or note why it says nothing; one call at a time."""
        where = self._reader.where
        try:
            manifest = await self._reader.read()
        except (InvalidRequest, SourceFailed) as error:
            self.read_errors += 1
            if str(error) != str(self.failures.get(where)):
                log.error("what the last good manifest says is served: %s", error)
            self.failures[where] = error
            return
        if where in self.failures:
            log.info("manifest %s can be read again", where)
        for name in self.failures.keys() - manifest.names:
            del self.failures[name]
        for name, broken in manifest.broken.items():
            if str(broken) != str(self.failures.get(name)):
                log.error("%s", broken)
            self.failures[name] = broken

    def _is_served(self, entry: Entry, record: NameRecord | None) -> bool:
        """Whether there is nothing to do, as far as can be told without asking the source."""
        if record is None or not self._registry.is_loaded(entry.name) or entry.digest is None:
            return False
        wanted = (entry.digest, entry.weight, entry.pinned)
        return (record.digest, record.weight, record.pinned) == wanted

    def _start(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        """Do ``work``, unless something is at work on that name already: then a later pass will."""
        if name in self._at_work:
            work.close()
            return
        task = self._at_work[name] = self._background.run(work)
        task.add_done_callback(lambda done: self._at_work.pop(name, None))

    async def _try(self, entry: Entry, record: NameRecord | None) -> None:
        """Serve an entry, unless it has failed and is to be left alone now."""
        attempt = repr(entry)  # another entry under the same name is tried at once
        try:
            self._backoff.check(attempt)
        except LoraxError:
            return
        try:
            async with self._places:
                await self._serve(entry, record)
        except AdapterConflict:  # an unload that has not ended; the next pass will do
            return
        except LoraxError as error:
            self.failures[entry.name] = error
            seconds = self._backoff.failed(attempt, error)
            log.error("%s failed, to be tried again in %.0f s: %s", entry.name, seconds, error)
        except Exception as error:
            log.exception("%s failed", entry.name)
            self.failures[entry.name] = LoraxError(f"internal error: {type(error).__name__}")
        else:
            self._backoff.succeeded(attempt)
            self._succeeded(entry)

    def _succeeded(self, entry: Entry) -> None:
        if entry.source:  # else it is what was, in place of a broken one
            self.failures.pop(entry.name, None)

    async def _serve(self, entry: Entry, record: NameRecord | None) -> None:
        registry, library, name = self._registry, self._library, entry.name
        if record is not None and not registry.is_loaded(name):
            try:
                await registry.restore(record)
            except (StoreFailed, AdapterRejected) as error:
                if not entry.source:
                    raise
                log.warning("adapter %s is fetched again: %s", name, error)
                record = None
        if record is not None and entry.digest == record.digest:
            await registry.update(name, entry.weight, entry.pinned)
            return
        if record is not None and entry.digest in await library.history(name):
            await registry.roll_back(name, entry.digest)
            await registry.update(name, entry.weight, entry.pinned)
            return
        source, path = self._place(entry.source)
        if record is not None and entry.digest is None and await self._same(record, source, path):
            await registry.update(name, entry.weight, entry.pinned)
            return
        fetching = library.fetch(path, entry.digest, source)
        await registry.load_from(name, fetching, entry.weight, entry.pinned)

    async def _same(self, record: NameRecord, source: Source, path: str) -> bool:
        """Whether the source has what is served. The Hub is not asked: see docs/registry.md."""
        if (record.source, record.path) != (source.uri, path):
            return False
        if record.fetched not in (record.digest, None):  # an earlier version, by its digest
            return False
        if not isinstance(source, WatchableSource):
            return True
        return record.signature == await self._library.signature(path, source)

    async def _unload(self, name: str) -> None:
        """Take away what the manifest does not have any more, after its last request."""
        try:
            if self._registry.is_loaded(name):
                log.info("adapter %s is not in the manifest any more", name)
                await self._registry.take_away(name)
            else:  # it could not be restored
                await self._library.clean(await self._library.forget(name))
        except AdapterConflict:
            return
        except LoraxError as error:
            log.error("adapter %s cannot be unloaded now: %s", name, error)

    def _place(self, written: str) -> tuple[Source, str]:
        """The source that an entry names, and the adapter's path in it.

        Raises:
            InvalidRequest: it is malformed, or a directory outside of the root.
        """
        scheme, separator, rest = written.partition("://")
        if not separator:
            return self._directory(written)
        if scheme.lower() == "file":
            raise InvalidRequest(f"source {written[:200]!r}: give a directory inside --adapters")
        if scheme.lower() != "s3":
            return self._source(written), ""
        # One source a bucket: each has a client of its own, whose making takes time.
        bucket, _, path = rest.partition("/")
        return self._source(f"s3://{bucket}"), path.rstrip("/")

    def _directory(self, written: str) -> tuple[Source, str]:
        root = self._root
        if root is None:
            raise InvalidRequest(
                f"source {written[:200]!r} is a directory: start the server with --adapters DIR, "
                "which it must be inside"
            )
        path = written
        if os.path.isabs(written):
            if not Path(os.path.normpath(written)).is_relative_to(root):
                raise InvalidRequest(f"source {written[:200]!r} is not inside --adapters {root}")
            path = os.path.relpath(written, root)
        return self._source(str(root)), path

    def _source(self, uri: str) -> Source:
        if uri not in self._sources:
            self._sources[uri] = open_source(uri)
        return self._sources[uri]


def _as_recorded(record: NameRecord) -> Entry:
    return Entry(record.name, "", record.digest, record.weight, record.pinned)
