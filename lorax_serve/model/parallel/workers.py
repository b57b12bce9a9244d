"""The other ranks' processes, as rank 0 has them."""

from __future__ import annotations

import itertools
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from lorax_serve.checkpoint.part import Part
from lorax_serve.config import EngineConfig
from lorax_serve.errors import EngineFailed, LoraxError
from lorax_serve.model.adapters.arena import ArenaAdapter
from lorax_serve.model.group import Group, join, leave
from lorax_serve.model.parallel.messages import (
    Begin,
    Failed,
    Forget,
    Order,
    Stop,
    receive,
    send,
    send_adapter,
)

__all__ = ["SharedAdapter", "Workers"]

log = logging.getLogger(__name__)

_STOP_SECONDS = 5.0
_LAST_WORD_SECONDS = 2.0
"""How long one waits for a rank to say why it ends."""
_GRACE_SECONDS = 3.0
"""How long rank 0 may take to answer its requests after another rank has ended."""


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class SharedAdapter:
    """An adapter in host memory, a part of it with each rank.

    Attributes:
        own: rank 0's part.
        key: by which the other ranks know theirs.
        nbytes: of all parts, which are of one size.
    """

    own: ArenaAdapter
    key: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class _Worker:
    rank: int
    process: subprocess.Popen[bytes]
    orders: Connection
    adapters: Connection


class Workers:
    """The processes of all ranks but the first, which is this one.

    As soon as one of them has ended, nothing can be computed any more: ``tell`` and ``together``
    raise then, and so does whatever waits for it on a CPU. What waits on a GPU waits for ever, so
    this process ends, with status 1, if it is still there a few seconds later.

    Args:
        config: of the engine.
        directory: of the model.
        dtype: of weights and activations.
        device: of rank 0; the others have those of the next numbers.
        threads: of the CPU, for each rank.

    Attributes:
        part: rank 0.
        lost: why nothing can be computed any more; empty while all is well.
    """

    def __init__(
        self,
        config: EngineConfig,
        directory: Path,
        dtype: torch.dtype,
        device: torch.device,
        threads: int,
    ) -> None:
        self.part = Part(0, config.tensor_parallel)
        self.lost = ""
        self._device = device
        self._closing = False
        self._said = threading.Condition()
        self._sending = threading.Lock()
        self._keys = itertools.count()
        self._dropped: deque[int] = deque()
        self._place = Path(tempfile.mkdtemp(prefix="lorax-ranks-"))
        self._workers = [
            _start(
                Begin(
                    replace(config, device=str(device_of(rank, device))),
                    str(directory),
                    dtype,
                    Part(rank, self.part.size),
                    str(self._place / "meeting"),
                    threads,
                )
            )
            for rank in range(1, self.part.size)
        ]
        for worker in self._workers:
            threading.Thread(target=self._watch, args=(worker,), daemon=True).start()

    def join(self) -> Group:
        """Meet them.

        Raises:
            EngineFailed: one has ended.
        """
        with self.together():
            return join(self.part, self._place / "meeting", self._device)

    def tell(self, order: Order) -> None:
        """Have all of them do something, after all that they were told before.

        Raises:
            EngineFailed: one has ended.
        """
        if self.lost:
            raise EngineFailed(self.lost)
        orders = [order]
        if self._dropped:
            keys = [self._dropped.popleft() for _ in range(len(self._dropped))]
            orders.insert(0, Forget(keys))
        with self.together():
            for each, worker in itertools.product(orders, self._workers):
                send(worker.orders, each)

    @contextmanager
    def together(self) -> Iterator[None]:
        """For what all ranks do: if it fails here, the ranks are no longer at one place.

        A ``LoraxError`` may come out of it, and must come in all ranks alike.

        Raises:
            EngineFailed: another rank has ended.
        """
        try:
            yield
        except LoraxError:
            raise
        except Exception as error:
            with self._said:
                # If another one failed first, its reason is the one to be told.
                self._said.wait_for(lambda: self.lost, _LAST_WORD_SECONDS)
            if self.lost:
                raise EngineFailed(self.lost) from error
            self._lose(f"rank 0 of {self.part.size}: {type(error).__name__}: {error}")
            raise

    def share(self, parts: list[ArenaAdapter]) -> SharedAdapter:
        """Send each of the others its part of an adapter, which they keep as long as this process
        keeps the result; thread-safe.

        Args:
            parts: in the order of the ranks.

        Raises:
            EngineFailed: one has ended.
        """
        key = next(self._keys)
        try:
            with self._sending:
                for worker, part in zip(self._workers, parts[1:], strict=True):
                    send_adapter(worker.adapters, key, part)
        except OSError as error:
            raise EngineFailed(self.lost or f"a rank has ended: {error}") from error
        shared = SharedAdapter(parts[0], key, sum(part.nbytes for part in parts))
        # Told with the next order: this may run in any thread, in the middle of another message.
        weakref.finalize(shared, self._dropped.append, key).atexit = False
        return shared

    def close(self) -> None:
        """End them, and the group."""
        self._closing = True
        for worker in self._workers:
            with suppress(OSError):
                send(worker.orders, Stop())
        if not (self.lost and self._device.type == "cuda"):  # NCCL would wait for who has gone
            leave()
        for worker in self._workers:
            try:
                worker.process.wait(0 if self.lost else _STOP_SECONDS)
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()
            worker.adapters.close()
        shutil.rmtree(self._place, ignore_errors=True)

    def _watch(self, worker: _Worker) -> None:
        """Until a rank ends: say why, and see that rank 0 ends too."""
        word = ""
        with suppress(EOFError, OSError):
            found = receive(worker.orders)
            assert isinstance(found, Failed)
            word = found.error
        status = worker.process.wait()
        worker.orders.close()
        if self._closing:
            return
        how = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
        self._lose(f"rank {worker.rank} of {self.part.size}: {word or f'its process {how}'}")
        threading.Event().wait(_GRACE_SECONDS)
        if not self._closing:
            log.critical("the engine ends")
            os._exit(1)

    def _lose(self, why: str) -> None:
        with self._said:
            if not self.lost:
                log.critical("%s; nothing can be computed any more", why)
                self.lost = f"a process of the model has failed: {why}"
            self._said.notify_all()


def device_of(rank: int, first: torch.device) -> torch.device:
    """The device of a rank: the CPU, or the GPU of its number."""
    return first if first.type == "cpu" else torch.device(first.type, rank)


def _start(begin: Begin) -> _Worker:
    (orders, orders_there), (adapters, adapters_there) = Pipe(), Pipe()
    with orders_there, adapters_there:
        there = orders_there.fileno(), adapters_there.fileno()
        # Not multiprocessing: the engine is a daemon of the server, which may have no children.
        process = subprocess.Popen(
            [sys.executable, "-m", "lorax_serve.model.parallel.worker", *map(str, there)],
            pass_fds=there,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
    send(orders, begin)
    return _Worker(begin.part.rank, process, orders, adapters)
