"""Threads for calls that may take very long, or never return."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import TypeVar

__all__ = ["SourceThreads"]

_T = TypeVar("_T")


class SourceThreads:
    """Runs calls to a source, each on a thread of its own.

    The threads are daemons: one that hangs does not keep the process from ending, as one of a pool
    would. For one event loop.

    Args:
        most: threads at a time.
    """

    def __init__(self, most: int) -> None:
        self._free = asyncio.Semaphore(most)

    async def run(self, work: Callable[[], _T], seconds: float) -> _T:
        """Call ``work`` once there is a thread for it, and return what it returns.

        Raises:
            TimeoutError: all this took longer than ``seconds``. The call goes on, and counts, until
                it returns.
        """
        loop = asyncio.get_running_loop()
        done: Future[_T] = Future()

        def release(_: object) -> None:
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(self._free.release)

        def call() -> None:
            done.set_running_or_notify_cancel()
            try:
                result = work()
            except BaseException as error:
                done.set_exception(error)
            else:
                done.set_result(result)

        async with asyncio.timeout(seconds):
            await self._free.acquire()
            done.add_done_callback(release)
            threading.Thread(target=call, name="source", daemon=True).start()
            return await asyncio.wrap_future(done)
