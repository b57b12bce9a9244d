"""An adapter that a client sends, on its way to the disk."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from lorax_serve.errors import InvalidRequest
from lorax_serve.store.digest import CONFIG_FILE, WEIGHTS_FILE, is_digest
from lorax_serve.store.disk import disk_errors

__all__ = ["Upload"]

_Write = Callable[[BinaryIO, bytes], Awaitable[object]]


@dataclass(frozen=True, slots=True)
class Upload:
    """What was announced, and the bytes as they come.

    Attributes:
        digest: of the whole: what comes must have it.
        config_bytes, weights_bytes: sizes of the two files.
        chunks: the bytes of the config, then those of the weights.

    Raises:
        InvalidRequest: the digest is none, or a size is 0.
    """

    digest: str
    config_bytes: int
    weights_bytes: int
    chunks: AsyncIterator[bytes]

    def __post_init__(self) -> None:
        if not is_digest(self.digest):
            raise InvalidRequest(
                f"digest {self.digest[:80]!r} must be the 64 hexadecimal digits of the adapter's "
                "digest"
            )
        for name, size in (
            ("config_bytes", self.config_bytes),
            ("weights_bytes", self.weights_bytes),
        ):
            if size < 1:
                raise InvalidRequest(f"{name} must be at least 1, found {size}")

    @property
    def nbytes(self) -> int:
        """Of both files."""
        return self.config_bytes + self.weights_bytes

    async def write(self, directory: Path, write: _Write) -> None:
        """Write the two files into ``directory``.

        Args:
            directory: an empty one.
            write: writes bytes to a file, elsewhere than on the event loop.

        Raises:
            InvalidRequest: more or fewer bytes came than were announced.
            StoreFailed, Overloaded: the disk fails or is full.
        """
        received = 0
        with (
            disk_errors(directory),
            (directory / CONFIG_FILE).open("wb") as config,
            (directory / WEIGHTS_FILE).open("wb") as weights,
        ):
            async for chunk in self.chunks:
                of_config = max(0, self.config_bytes - received)
                received += len(chunk)
                if received > self.nbytes:
                    break
                if of_config:
                    await write(config, chunk[:of_config])
                if len(chunk) > of_config:
                    await write(weights, chunk[of_config:])
        if received != self.nbytes:
            raise InvalidRequest(
                f"data: config_bytes and weights_bytes announced {self.nbytes} bytes, but "
                f"{'more' if received > self.nbytes else received} came; send it again"
            )
