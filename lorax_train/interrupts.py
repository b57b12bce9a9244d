"""Ctrl-C and SIGTERM at a moment that leaves everything as it should be."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["interrupts_held", "terminations_interrupt"]


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Have Ctrl-C, and SIGTERM where it is handled, act at the end of the block, so that what is in
    it happens as a whole.

    Only the main thread gets signals: in others this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    found = ((number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM))
    handlers = {number: handler for number, handler in found if callable(handler)}
    pending: list[int] = []
    for number in handlers:
        signal.signal(number, lambda number, frame: pending.append(number))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    for each in pending[:1]:
        handlers[signal.Signals(each)](each, None)


@contextmanager
def terminations_interrupt() -> Iterator[None]:
    """Have SIGTERM, with which Kubernetes ends a pod, act as Ctrl-C within the block."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
