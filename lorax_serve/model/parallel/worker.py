"""The process of a rank that is not the first: it does what rank 0 says, on a device of its own.

``python -m lorax_serve.model.parallel.worker ORDERS ADAPTERS`` with the file descriptors of two
pipes from rank 0. It ends when they are closed, whatever it is doing.
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import sys
import threading
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NoReturn

import torch

from lorax_serve.checkpoint.loader import load_weights
from lorax_serve.errors import LoraxError
from lorax_serve.model.adapters.arena import ArenaAdapter
from lorax_serve.model.build import build
from lorax_serve.model.group import join, leave
from lorax_serve.model.paged_steps import PagedSteps
from lorax_serve.model.parallel.messages import (
    Begin,
    Clear,
    Copy,
    Failed,
    Follow,
    Forget,
    LogitsAfter,
    Order,
    Put,
    Record,
    Stop,
    receive,
    receive_adapter,
    send,
)

__all__ = ["main"]

log = logging.getLogger(__name__)


class _Adapters:
    """The adapters that rank 0 has in host memory: this rank's parts of them. A thread of its own
    receives them, so that large ones hold up no step."""

    def __init__(self, pipe: Connection, device: torch.device) -> None:
        self._pipe = pipe
        self._device = device
        self._arrived = threading.Condition()
        self._adapters: dict[int, ArenaAdapter] = {}
        threading.Thread(target=self._receive, name="adapters", daemon=True).start()

    def get(self, key: int) -> ArenaAdapter:
        """An adapter; waits for one that is on its way."""
        with self._arrived:
            self._arrived.wait_for(lambda: key in self._adapters)
            return self._adapters[key]

    def forget(self, key: int) -> None:
        """Free an adapter; waits for one that is on its way."""
        self.get(key)
        del self._adapters[key]

    def _receive(self) -> None:
        try:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)  # pinned memory is one device's
            while True:
                key, adapter = receive_adapter(self._pipe, pinned=self._device.type == "cuda")
                with self._arrived:
                    self._adapters[key] = adapter
                    self._arrived.notify()
        except (EOFError, OSError):  # rank 0 has gone, or ends
            return
        except BaseException:  # out of memory, say
            log.exception("an adapter cannot be received")
            _end(1)


def main(arguments: list[str]) -> None:
    """Run a rank; does not return."""
    # As in the engine's process: the server decides when all end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    orders, adapters = (Connection(int(number)) for number in arguments)
    begin = receive(orders)
    assert isinstance(begin, Begin)
    logging.basicConfig(
        level=logging.INFO, format=f"%(levelname)s rank {begin.part.rank} %(name)s: %(message)s"
    )
    inbox: queue.SimpleQueue[Order] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(orders, inbox), daemon=True).start()
    try:
        _work(begin, adapters, inbox)
    except BaseException as error:
        log.exception("a rank has failed")
        try:
            send(orders, Failed(f"{type(error).__name__}: {error}"))
        finally:
            _end(1)
    _end(0)


def _work(begin: Begin, pipe: Connection, inbox: queue.SimpleQueue[Order]) -> None:
    torch.set_num_threads(begin.threads)
    device = torch.device(begin.config.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    group = join(begin.part, Path(begin.meeting), device)
    with load_weights(Path(begin.directory), begin.dtype, device, begin.part) as weights:
        steps = build(begin.config, weights, group).steps
    assert isinstance(steps, PagedSteps)
    adapters = _Adapters(pipe, device)
    with torch.inference_mode():
        while not isinstance(order := inbox.get(), Stop):
            _do(order, steps, adapters)
    leave()


def _do(order: Order, steps: PagedSteps, adapters: _Adapters) -> None:
    match order:
        case Follow(layout):
            steps.follow(layout)
        case Copy(copies):
            steps.copy(list(copies))
        case Put(slot, key):
            try:
                steps.put(slot, adapters.get(key))
            except LoraxError as error:  # then rank 0 has no room either, and goes on
                log.warning("%s", error)
        case Clear(slot):
            steps.clear(slot)
        case Forget(keys):
            for key in keys:
                adapters.forget(key)
        case LogitsAfter(layout):
            steps.logits_after(layout)
        case Record():
            steps.record()


def _read(orders: Connection, inbox: queue.SimpleQueue[Order]) -> None:
    try:
        while True:
            order = receive(orders)
            inbox.put(order)  # type: ignore[arg-type]
            if isinstance(order, Stop):
                return
    except BaseException:
        # Rank 0 has gone. The main thread may wait for it in the middle of a sum.
        _end(1)


def _end(status: int) -> NoReturn:
    # At once: NCCL would wait for what the others will never send.
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main(sys.argv[1:])
