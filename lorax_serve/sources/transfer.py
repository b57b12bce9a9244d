"""One fetch in progress: what is left of its limits, and the files it writes."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path

from lorax_serve.errors import SourceFailed, SourceReason
from lorax_serve.sources.source import FetchLimits, shown

__all__ = ["NETWORK_SECONDS", "Transfer", "place"]

NETWORK_SECONDS = 10.0
"""How long a server may be silent."""


def place(uri: str, path: str, file: str = "") -> str:
    """What messages call a file of an adapter."""
    return shown("/".join(part for part in (uri, path, file) if part))


class Transfer:
    """Writes an adapter's files within limits, which start to run now.

    Args:
        adapter: what messages call it.
        into: the directory that gets the files.
        limits: of all files together.
    """

    def __init__(self, adapter: str, into: Path, limits: FetchLimits) -> None:
        self._adapter = adapter
        self._into = into
        self._limits = limits
        self._end = time.monotonic() + limits.seconds
        self._bytes_left = limits.max_bytes

    def seconds_left(self) -> float:
        """What is left of the time; positive.

        Raises:
            SourceFailed: TIMEOUT, nothing is.
        """
        left = self._end - time.monotonic()
        if left <= 0:
            raise SourceFailed(
                SourceReason.TIMEOUT,
                f"{self._adapter}: was not fetched within {self._limits.seconds:g} s; try again, "
                "or allow more time (--fetch-seconds)",
            )
        return left

    def network_seconds(self) -> float:
        """How long the next call to a server may wait; raises as ``seconds_left``."""
        return min(self.seconds_left(), NETWORK_SECONDS)

    def write(self, file: str, size: int, chunks: Iterable[bytes]) -> None:
        """Write one file; the time is looked at before each chunk.

        Args:
            file: its name.
            size: the bytes that were announced.
            chunks: its bytes in order; what iterating raises is passed on.

        Raises:
            SourceFailed: TOO_LARGE before anything is read; TRUNCATED if the chunks are more or
                less than announced; TIMEOUT; UNAVAILABLE if the file cannot be written.
        """
        if size > self._bytes_left:
            raise SourceFailed(
                SourceReason.TOO_LARGE,
                f"{self._adapter}/{file}: has {size} bytes, which makes the adapter larger than "
                f"the limit of {self._limits.max_bytes}; raise that (--max-adapter-bytes) if it is "
                "meant to be",
            )
        self._bytes_left -= size
        received = 0
        target = self._create(file)
        try:
            for chunk in chunks:
                self.seconds_left()
                received += len(chunk)
                if received > size:
                    break
                self._append(target, chunk, file)
        finally:
            os.close(target)
        self.seconds_left()
        if received != size:
            more = "more" if received > size else f"{received}"
            raise SourceFailed(
                SourceReason.TRUNCATED,
                f"{self._adapter}/{file}: {size} bytes were announced and {more} came; try again",
            )

    def _create(self, file: str) -> int:
        try:
            return os.open(self._into / file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except OSError as error:
            raise self._unwritable(file, error) from error

    def _append(self, target: int, chunk: bytes, file: str) -> None:
        rest = memoryview(chunk)
        try:
            while rest:
                rest = rest[os.write(target, rest) :]
        except OSError as error:
            raise self._unwritable(file, error) from error

    def _unwritable(self, file: str, error: OSError) -> SourceFailed:
        return SourceFailed(
            SourceReason.UNAVAILABLE,
            f"{self._adapter}/{file}: its copy cannot be written ({error.strerror}); check the "
            f"space and permissions of {self._into.parent}",
        )
