"""What a Service of Kubernetes is to a connection: one of its pods, as long as it lives."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from types import TracebackType

__all__ = ["Service"]


class Service:
    """Forwards each connection to one address of several, in turn. Use it in ``async with``.

    Args:
        addresses: as ``host:port``. They may change; connections that are there stay.

    Attributes:
        address: its own.
    """

    def __init__(self, addresses: Sequence[str]) -> None:
        self.addresses = list(addresses)
        self.address = ""
        self._turn = itertools.count()
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> Service:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._server is not None:
            self._server.close()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, port = self.addresses[next(self._turn) % len(self.addresses)].split(":")
        try:
            there, back = await asyncio.open_connection(host, int(port))
        except OSError:
            writer.close()
            return
        await asyncio.gather(_copy(reader, back), _copy(there, writer))


async def _copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    """All that comes; then the target is closed."""
    try:
        while data := await source.read(1 << 16):
            target.write(data)
            await target.drain()
    except OSError:  # one of the two has gone
        pass
    finally:
        target.close()
