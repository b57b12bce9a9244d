"""Brings what is served into line with what should be: the catalogue, and what the source has.

The catalogue is the manifest: what was acknowledged is served, after each start, until it is
unloaded. What the source has anew or changed is loaded. What disappears from the source stays: an
unmounted disk or a slip in a bucket must take nobody's adapter away. What somebody decided stands:
a name that was uploaded, loaded from another path, or rolled back is left alone, and what was
unloaded comes back when it changes. What fails is tried again, after twice as long each time; what
was refused, when its files change.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from functools import partial

from lorax_serve.errors import (
    AdapterConflict,
    AdapterRejected,
    InvalidRequest,
    LoraxError,
    SourceFailed,
    SourceReason,
    StoreFailed,
)
from lorax_serve.registry.backoff import Backoff
from lorax_serve.registry.library import Library
from lorax_serve.registry.registry import AdapterRegistry
from lorax_serve.store.catalog import NameRecord

__all__ = ["Reconciler"]

_PROGRESS_SECONDS = 5.0
# A start waits for the first pass. A source that hangs must not hold it up once for each adapter.
_MOST_TIMEOUTS = 3

log = logging.getLogger(__name__)


class Reconciler:
    """Works on a registry and its library.

    Args:
        registry: serves.
        library: remembers.
        from_source: whether what the source lists is loaded; if not, only the catalogue counts.
        clock: seconds that never go back.

    Attributes:
        failures: what could not be loaded when it was last tried, by name; under the source's URI
            why that could not be listed.
    """

    def __init__(
        self,
        registry: AdapterRegistry,
        library: Library,
        *,
        from_source: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.failures: dict[str, LoraxError] = {}
        self._registry = registry
        self._library = library
        self._from_source = from_source
        self._backoff = Backoff(clock)
        self._refused: dict[str, str] = {}
        """Signatures of what was refused."""

    async def run_once(self) -> None:
        """One pass over everything."""
        records = {record.name: record for record in await self._library.names()}
        for record in records.values():
            if not self._registry.is_loaded(record.name):
                version = f"{record.name}@{record.digest}"
                await self._try(record.name, partial(self._restore, record), version=version)
        listing = await self._listing()
        if listing is None:
            return
        self._refused = {name: each for name, each in self._refused.items() if name in listing}
        for name in self.failures.keys() - records.keys() - listing.keys():
            del self.failures[name]  # it is neither recorded nor in the source any more
        changed = self._new_in(listing, records)
        for name in await self._unloaded(changed):
            del changed[name]
        last_word = time.monotonic()
        timeouts = 0
        for done, (name, signature) in enumerate(changed.items()):
            if timeouts == _MOST_TIMEOUTS:
                log.error(
                    "the source hangs: %d adapters wait for a later pass", len(changed) - done
                )
                break
            if time.monotonic() - last_word > _PROGRESS_SECONDS:
                last_word = time.monotonic()
                log.info("%d of %d new adapters looked at", done, len(changed))
            before = self.failures.get(name)
            await self._try(
                name, partial(self._registry.follow, name, records.get(name)), signature
            )
            error = self.failures.get(name)
            timeouts += error is not before and _timed_out(error)

    async def run_for_ever(self, seconds: float) -> None:
        """A pass every so many seconds, until cancelled."""
        while True:
            await asyncio.sleep(seconds)
            try:
                await self.run_once()
            except LoraxError as error:  # the disk, say
                log.error("adapters cannot be reconciled now: %s", error)
            except Exception:  # a defect of ours, but the next pass may do
                log.exception("adapters cannot be reconciled now")

    async def _restore(self, record: NameRecord) -> None:
        try:
            await self._registry.restore(record)
        except StoreFailed:
            source = self._library.source
            rolled_back = record.fetched not in (record.digest, None)  # the source has another
            if source is None or record.source != source.uri or rolled_back:
                raise
            log.warning("adapter %s is damaged on disk: fetching it again", record.name)
            await self._registry.load(record.name, record.path, record.weight, record.pinned)

    async def _listing(self) -> dict[str, str] | None:
        """Signatures by path of what is to be loaded from the source; None if it does not say."""
        source = self._library.source
        if source is None or not self._from_source:
            return {}
        found: dict[str, str] = {}

        async def list_source() -> None:
            found.update(await self._library.listing() or {})

        return found if await self._try(source.uri, list_source) else None

    def _new_in(self, listing: dict[str, str], records: dict[str, NameRecord]) -> dict[str, str]:
        """Signatures by name of what is not served as the source has it; what failed comes last."""
        source = self._library.source
        changed = {}
        for path in sorted(listing, key=lambda path: (path in self.failures, path)):
            signature = listing[path]
            record = records.get(path)
            if record is not None and source is not None:
                elsewhere = record.source is None or record.path != path
                known = (record.source, record.signature) == (source.uri, signature)
                if elsewhere or known:
                    continue
            if self._refused.get(path) != signature:
                changed[path] = signature
        return changed

    async def _unloaded(self, changed: dict[str, str]) -> list[str]:
        """Those that were unloaded, and are in the source as they were then."""
        source = self._library.source
        found = []
        for name, where, signature, _ in (
            await self._library.unloaded() if source and changed else ()
        ):
            if name not in changed:
                continue
            if signature is None and source is not None:
                await self._library.set_unloaded(name, source.uri, changed[name])
            elif (where, signature) != (source and source.uri, changed[name]):
                continue
            found.append(name)
        return found

    async def _try(
        self,
        name: str,
        work: Callable[[], Awaitable[object]],
        signature: str = "",
        version: str | None = None,
    ) -> bool:
        """Do ``work`` unless it is to be left alone now; whether it was done.

        Args:
            name: what it is about.
            work: fails with a ``LoraxError``.
            signature: of the files; if they are refused, only other ones are tried again.
            version: what is left alone after a failure, if not all of ``name``.
        """
        version = version or name
        try:
            self._backoff.check(version)
        except LoraxError:
            return False
        try:
            await work()
        except AdapterConflict:  # somebody else loads it
            return False
        except LoraxError as error:
            self.failures[name] = error
            if isinstance(error, AdapterRejected | InvalidRequest) and signature:
                self._refused[name] = signature
                log.error("adapter %s refused: %s", name, error)
            else:
                seconds = self._backoff.failed(version, error)
                log.error("%s failed, to be tried again in %.0f s: %s", name, seconds, error)
            return False
        self._backoff.succeeded(version)
        self._refused.pop(name, None)
        self.failures.pop(name, None)
        return True


def _timed_out(error: LoraxError | None) -> bool:
    return isinstance(error, SourceFailed) and error.reason is SourceReason.TIMEOUT
