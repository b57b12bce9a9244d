"""How long to leave alone what failed: twice as long each time. Plain numbers."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

from lorax_serve.errors import LoraxError

__all__ = ["Backoff"]

_FIRST_SECONDS = 1.0
_MOST_SECONDS = 300.0
# Names come from requests: they must not fill the memory.
_MOST_NAMES = 4096


class _Failure(NamedTuple):
    error: LoraxError
    until: float
    seconds: float


class Backoff:
    """Failures by name, the oldest forgotten first when there are too many.

    Args:
        clock: seconds that never go back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failures: OrderedDict[str, _Failure] = OrderedDict()

    def check(self, name: str) -> None:
        """Raise again what a name failed with, until its time is over."""
        failure = self._failures.get(name)
        if failure is not None and self._clock() < failure.until:
            # Each raise adds its frames, and what they hold, to those of the last one.
            raise failure.error.with_traceback(None)

    def failed(self, name: str, error: LoraxError) -> float:
        """Note a failure; returns the seconds for which ``check`` raises it.

        What led to the error is forgotten: its frames hold whatever the call had in hand, half a
        megabyte of a client of S3.
        """
        error.__cause__ = error.__context__ = None
        error.with_traceback(None)
        before = self._failures.pop(name, None)
        seconds = min(_FIRST_SECONDS if before is None else 2 * before.seconds, _MOST_SECONDS)
        self._failures[name] = _Failure(error, self._clock() + seconds, seconds)
        if len(self._failures) > _MOST_NAMES:
            self._failures.popitem(last=False)
        return seconds

    def succeeded(self, name: str) -> None:
        """Forget a name's failures."""
        self._failures.pop(name, None)
