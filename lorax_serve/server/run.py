"""A server's life as a process: until a signal, or until its engine dies."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable

from lorax_serve.config import ServerConfig
from lorax_serve.server.app import Server

__all__ = ["run"]

_SIGNALS = (signal.SIGTERM, signal.SIGINT)

log = logging.getLogger(__name__)


async def run(config: ServerConfig, on_ready: Callable[[Server], None]) -> int:
    """Serve until SIGTERM or SIGINT, then drain. A second signal ends the process at once.

    Args:
        config: the server's settings.
        on_ready: called when requests are let in.

    Returns:
        The exit code: 0 after a signal, 1 if the engine's process died.

    Raises:
        LoraxError: the server could not be started.
    """
    asked = asyncio.Event()
    loop = asyncio.get_running_loop()

    def ask() -> None:
        asked.set()
        for number in _SIGNALS:
            loop.remove_signal_handler(number)

    for number in _SIGNALS:
        loop.add_signal_handler(number, ask)
    server = Server(config)
    if not await _unless(asked, asyncio.create_task(server.start())):
        return 0
    on_ready(server)
    await _unless(asked, asyncio.create_task(server.failed.wait()))
    if not server.failed.is_set():
        log.info("draining: up to %g s for running requests", config.drain_seconds)
    await server.stop()
    return 1 if server.failed.is_set() else 0


async def _unless(event: asyncio.Event, work: asyncio.Task[object]) -> bool:
    """Wait for ``work``, but cancel it if ``event`` comes first; whether it was done."""
    waiting = asyncio.create_task(event.wait())
    try:
        await asyncio.wait([work, waiting], return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            work.cancel()
            await asyncio.wait([work])
        if work.cancelled():
            return False
        work.result()
        return True
    finally:
        waiting.cancel()
