"""Work that goes on whatever becomes of the call that began it."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

__all__ = ["Background"]

_CLOSE_SECONDS = 5.0

_T = TypeVar("_T")


class Background:
    """Tasks that run to their end, also if nobody waits for them any more."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def __len__(self) -> int:
        """How many have not ended."""
        return len(self._tasks)

    def run(self, work: Coroutine[Any, Any, _T]) -> asyncio.Task[_T]:
        """Begin ``work``. To wait for it, ``shield`` the task."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        # A caller that went away leaves nobody to retrieve the error: it was logged or counted.
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        return task

    async def close(self) -> None:
        """Cancel what is left, and wait a little for its end."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_CLOSE_SECONDS)
