"""``--manifest``: where a manifest is written, and what it said when it could last be read."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Protocol

from lorax_serve.errors import InvalidRequest, SourceFailed, SourceReason
from lorax_serve.registry.manifest import Manifest, parse_manifest
from lorax_serve.registry.source_threads import SourceThreads
from lorax_serve.sources import open_object

__all__ = ["ManifestReader"]

# A ConfigMap has a megabyte at most.
_MAX_BYTES = 4 << 20
# Of a bucket. A mount or a name server that hangs is given up a little later, by whoever asks.
_SECONDS = 20.0
_GRACE_SECONDS = 5.0


class ManifestReader:
    """Reads a manifest again and again, for one task.

    Args:
        written: a file's path, or ``s3://bucket/path``. A file is opened anew each time, since
            Kubernetes replaces a link to it; an object is downloaded when its ETag has changed.

    Attributes:
        where: it is written, as messages call it.
        last: what it said when it could last be read; None until then.

    Raises:
        InvalidRequest: that is no place of a manifest, or boto3 is not installed.
    """

    def __init__(self, written: str) -> None:
        self.last: Manifest | None = None
        self._place: _Place = _open(written)
        self.where = self._place.uri
        self._found: tuple[bytes, Manifest | str] | None = None
        """What was last read, and what that means, or why it means nothing."""
        # A read that hangs is not joined by another one at each pass, nor waited for at the end.
        self._threads = SourceThreads(1)

    async def read(self) -> Manifest:
        """What it says now.

        Raises:
            InvalidRequest: it cannot be opened, or nobody can say what it means as a whole.
            SourceFailed: the bucket did not give it, or nothing came in time.
        """
        text = await self._read()
        if self._found is None or self._found[0] != text:  # parsing a long one takes seconds
            self._found = text, await asyncio.to_thread(_parsed, text, self.where)
        found = self._found[1]
        if isinstance(found, str):
            raise InvalidRequest(found)
        self.last = found
        return found

    async def _read(self) -> bytes:
        seconds = _SECONDS + _GRACE_SECONDS
        try:
            return await self._threads.run(lambda: self._place.read(_MAX_BYTES, _SECONDS), seconds)
        except SourceFailed as error:
            raise SourceFailed(error.reason, f"manifest {error}") from error
        except TimeoutError:
            raise SourceFailed(
                SourceReason.TIMEOUT,
                f"manifest {self.where}: nothing came within {seconds:g} s; check the network, or "
                "the mount, and try again",
            ) from None


class _Place(Protocol):
    """What has the text. Errors of ``InvalidRequest`` say that it is a manifest; those of
    ``SourceFailed`` begin with the URI."""

    @property
    def uri(self) -> str:
        """What messages call it."""

    def read(self, most: int, seconds: float) -> bytes:
        """All of it, at most so many bytes, within this time if a network is between."""


class _File:
    """A file, which may be another one each time; one that hangs is the caller's to give up."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @property
    def uri(self) -> str:
        return str(self._path)

    def read(self, most: int, seconds: float) -> bytes:
        try:
            with self._path.open("rb") as file:
                text = file.read(most + 1)
        except OSError as error:
            raise InvalidRequest(
                f"manifest {self._path} cannot be read: {error.strerror}"
            ) from error
        if len(text) > most:
            raise InvalidRequest(f"manifest {self._path} has more than {most} bytes")
        return text


def _open(written: str) -> _Place:
    if "://" in written:
        return open_object(written, "manifest")
    if not written or "\0" in written:
        raise InvalidRequest(
            f"manifest {written[:200]!r} names nothing; give --manifest PATH or --manifest "
            "s3://bucket/path"
        )
    return _File(Path(written).expanduser())


def _parsed(text: bytes, where: str) -> Manifest | str:
    try:
        return parse_manifest(text, where)
    except InvalidRequest as error:
        return str(error)
