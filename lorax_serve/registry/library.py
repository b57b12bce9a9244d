"""The adapters that a server keeps on its own disk: fetched, checked, recorded, cleaned up.

Knows sources, content and the catalogue, and runs them on threads of its own. The disk's threads
are not the source's, so that a source that hangs holds up no restart, unload or rolling back, nor
what it does give. Knows nothing of what is in memory, nor of requests.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import NamedTuple, TypeVar

from lorax_serve.errors import AdapterConflict, LoraxError, SourceFailed, SourceReason, StoreFailed
from lorax_serve.registry.source_threads import SourceThreads
from lorax_serve.registry.upload import Upload
from lorax_serve.sources import FetchLimits, Source, WatchableSource
from lorax_serve.sources.transfer import place
from lorax_serve.store.catalog import Catalog, NameRecord, Recorded, Unloaded
from lorax_serve.store.content import ContentStore, Stage
from lorax_serve.store.recovery import recover, remove_unreferenced

__all__ = ["Fetched", "Library"]

_DISK_THREADS = 4
_MOST_FETCHES = 16
# Sources keep to their limits by themselves, network time-outs included. Beyond that hang mounts
# and name servers, which nothing can interrupt.
_GRACE_SECONDS = 15.0

_T = TypeVar("_T")

log = logging.getLogger(__name__)


class Fetched(NamedTuple):
    """Content that is on this server's disk, whole and durable.

    Attributes:
        digest: of the content; "" if that is not known.
        directory: where it is.
        source, path, signature: where it came from, and how it is known there; the source is None
            if it was uploaded.
    """

    digest: str
    directory: Path
    source: str | None
    path: str
    signature: str


class Library:
    """A state directory and the source that fills it. Open it once, close it at the end.

    Args:
        state: the directory; only one server may use it.
        source: where adapters come from; None: what is there is served, nothing comes in.
        limits: of one fetch.
        history: earlier versions kept for each name.

    Attributes:
        keeps: whether what is loaded is kept, with its earlier versions.

    Raises:
        StoreFailed: the directory is in use, damaged, or cannot be written.
        Overloaded: the disk is full.
    """

    keeps = True

    def __init__(
        self, state: Path, source: Source | None, limits: FetchLimits, history: int
    ) -> None:
        self.source = source
        self._limits = limits
        self._fetches = SourceThreads(_MOST_FETCHES)
        # One that hangs is not joined by another one at each pass.
        self._listings = SourceThreads(1)
        with ExitStack() as opened:
            self._content = opened.enter_context(ContentStore(state))
            self._catalog = opened.enter_context(Catalog(state / "catalog.db", history))
            self._recovery = recover(self._content, self._catalog)
            self._threads = ThreadPoolExecutor(_DISK_THREADS, thread_name_prefix="library")
            opened.callback(self._threads.shutdown, wait=False, cancel_futures=True)
            self._opened = opened.pop_all()
        for name in (*self._recovery.missing, *self._recovery.damaged):
            log.error("adapter %s was loaded, but its content in %s is damaged", name, state)

    def close(self) -> None:
        """Let another server use the directory."""
        self._opened.close()

    @asynccontextmanager
    async def fetch(
        self, path: str, expected: str | None = None, source: Source | None = None
    ) -> AsyncIterator[Fetched]:
        """Bring an adapter's files onto this disk.

        They stay if they were recorded by the end of the block.

        Args:
            path: of the adapter in the source.
            expected: the digest that it must have.
            source: another one than this library's.

        Raises:
            AdapterConflict: there is no source.
            SourceFailed: the source did not give it; nothing is left of it.
            AdapterRejected: a file is missing, or has another digest.
            StoreFailed, Overloaded: the disk.
        """
        source = source or self.source
        if source is None:
            raise AdapterConflict("this server loads no adapters: start it with --adapters")
        async with self._stage() as stage:
            signature = await self._ask(
                self._fetches,
                place(source.uri, path),
                lambda: source.fetch(path, stage.path, self._limits),
            )
            digest = await self._run(lambda: self._content.commit(stage, expected))
            yield Fetched(digest, self._content.path(digest), source.uri, path, signature)

    @asynccontextmanager
    async def receive(self, upload: Upload) -> AsyncIterator[Fetched]:
        """Bring what a client sends onto this disk. It stays if it was recorded by the end of the
        block.

        Raises:
            InvalidRequest: other bytes came than were announced.
            AdapterRejected: their digest is another.
            SourceFailed: they are too many, or did not come in time.
            StoreFailed, Overloaded: the disk.
        """
        limits = self._limits
        if upload.nbytes > limits.max_bytes:
            raise SourceFailed(
                SourceReason.TOO_LARGE,
                f"the upload has {upload.nbytes} bytes, more than the limit of {limits.max_bytes} "
                "(--max-adapter-bytes)",
            )
        async with self._stage() as stage:
            try:
                async with asyncio.timeout(limits.seconds):
                    await upload.write(
                        stage.path, lambda file, data: self._run(lambda: file.write(data))
                    )
            except TimeoutError as error:
                raise SourceFailed(
                    SourceReason.TIMEOUT,
                    f"the upload did not come within {limits.seconds:g} s (--fetch-seconds)",
                ) from error
            digest = await self._run(lambda: self._content.commit(stage, upload.digest))
            yield Fetched(digest, self._content.path(digest), None, "", "")

    async def record(self, name: str, fetched: Fetched, weight: int, pinned: bool) -> Recorded:
        """Have ``name`` mean this content from now on, also after a restart.

        Returns:
            The load's sequence number on this server, and the content that nothing refers to now,
            which stays until it is ``clean``ed.
        """
        return await self._run(
            lambda: self._catalog.record_load(
                name,
                fetched.digest,
                source=fetched.source,
                path=fetched.path,
                signature=fetched.signature,
                weight=weight,
                pinned=pinned,
            )
        )

    async def record_origin(self, name: str, fetched: Fetched) -> None:
        """Remember where the content that ``name`` has already was found, and how it is known
        there: so that it is not fetched again until it changes."""
        await self._run(
            lambda: self._catalog.set_origin(name, fetched.source, fetched.path, fetched.signature)
        )

    async def turns_down(self, name: str, fetched: Fetched) -> bool:
        """Whether somebody has rolled ``name`` back from this content of a source, or unloaded it;
        then it is not fetched again until it changes."""
        source = fetched.source
        assert source is not None
        return await self._run(
            lambda: self._catalog.turns_down(name, fetched.digest, source, fetched.signature)
        )

    async def set_weight(self, name: str, weight: int) -> None:
        """Change the share of a name."""
        await self._run(lambda: self._catalog.set_weight(name, weight))

    async def set_pinned(self, name: str, pinned: bool) -> None:
        """Change whether a name is pinned."""
        await self._run(lambda: self._catalog.set_pinned(name, pinned))

    async def unloaded(self) -> list[Unloaded]:
        """What was unloaded and not loaded again since."""
        return await self._run(self._catalog.unloaded)

    async def set_unloaded(self, name: str, source: str, signature: str) -> None:
        """Note what a source has of a name that was unloaded."""
        await self._run(lambda: self._catalog.set_unloaded(name, source, signature))

    async def forget(self, name: str) -> frozenset[str]:
        """Have ``name`` mean nothing; returns the content that nothing refers to now, which stays
        until it is ``clean``ed."""
        return await self._run(lambda: self._catalog.record_unload(name))

    async def roll_back(self, name: str, digest: str | None) -> NameRecord:
        """Have ``name`` mean an earlier version again, the last one or that with this digest.

        Raises:
            AdapterNotFound: there is no such name.
            AdapterConflict, InvalidRequest: it has no such version.
        """
        return await self._run(lambda: self._catalog.roll_back(name, digest))

    async def clean(self, digests: Iterable[str]) -> int:
        """Delete content that no name and no history refers to; returns its bytes."""
        try:
            return await self._run(
                lambda: remove_unreferenced(self._content, self._catalog, digests)
            )
        except LoraxError as error:  # it is found again at the next start
            log.warning("content cannot be deleted: %s", error)
            return 0

    async def names(self) -> list[NameRecord]:
        """What was recorded."""
        return await self._run(self._catalog.names)

    async def find(self, name: str) -> NameRecord | None:
        """What was recorded of a name; None if it means nothing."""
        return await self._run(lambda: self._catalog.get(name))

    async def history(self, name: str) -> list[str]:
        """The digests of a name's earlier versions, the last first."""
        versions = await self._run(lambda: self._catalog.history(name))
        return [version.digest for version in versions]

    async def sequence_of(self, name: str, digest: str) -> int:
        """The number of the load that made an earlier version; 0 if it is forgotten."""
        versions = await self._run(lambda: self._catalog.history(name))
        return next((each.sequence for each in versions if each.digest == digest), 0)

    def directory(self, digest: str) -> Path:
        """Where content is.

        Raises:
            StoreFailed: it is not there, or not whole.
        """
        return self._content.path(digest)

    async def check(self, digest: str) -> None:
        """Read content, and compare its bytes with its digest.

        Raises:
            StoreFailed: it is not there, or has other bytes.
        """
        if not await self._run(lambda: self._content.verify(digest)):
            raise StoreFailed(
                f"{self._content.root}: the content {digest} has been damaged on the disk; load "
                "the adapter again"
            )

    async def listing(self) -> dict[str, str] | None:
        """What the source has: signatures by path; None if it cannot be listed.

        Raises:
            SourceFailed: the source did not say.
        """
        source = self.source
        if not isinstance(source, WatchableSource):
            return None
        return await self._ask(self._listings, source.uri, source.list)

    async def signature(self, path: str, source: Source) -> str:
        """How the content of ``path`` in a source is known there now.

        Raises:
            InvalidRequest: the path is malformed.
            SourceFailed: the source did not say.
        """
        what = place(source.uri, path)
        return await self._ask(self._fetches, what, lambda: source.signature(path))

    @asynccontextmanager
    async def _stage(self) -> AsyncIterator[Stage]:
        """A directory to write an adapter's files in; what was committed stays if it was recorded
        by the end of the block."""
        stack, stages = ExitStack(), list[Stage]()
        try:
            await self._run(lambda: stages.append(stack.enter_context(self._content.stage())))
            yield stages[0]
        finally:
            await self._run(stack.close)  # half of a large file takes its time to go
            await self.clean([stage.digest for stage in stages if stage.digest is not None])

    async def _ask(self, threads: SourceThreads, what: str, work: Callable[[], _T]) -> _T:
        seconds = self._limits.seconds + _GRACE_SECONDS
        try:
            return await threads.run(work, seconds)
        except TimeoutError:
            raise SourceFailed(
                SourceReason.TIMEOUT,
                f"{what}: the source gave nothing within {seconds:g} s; check the network, or the "
                "mount, and try again",
            ) from None

    async def _run(self, work: Callable[[], _T]) -> _T:
        """Do ``work`` on a thread of the disk's. A call that is cancelled still waits for its end:
        what is cleaned up after it must not be in use by then."""
        future = asyncio.get_running_loop().run_in_executor(self._threads, work)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            await asyncio.wait([future])
            raise
