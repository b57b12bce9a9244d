"""The processes of one training: one, or those that ``torchrun`` has started on any machines.

All of them do the same things in the same order, each with its own part of the rows. What they
tell each other in a step is a few numbers and, in one piece, the gradients of A and B: so the base
model, which is frozen, never travels. The methods here are the whole of it, and in a process that
trains alone they do nothing.

The first process to fail tells the others through the store that brought them together, says what
happened, and ends. Whoever waits for it then finds the connection closed, and ends without a word.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import nn

from lorax_serve.errors import LoraxError, TrainingError

__all__ = ["OtherProcessFailed", "Processes", "join_processes"]

_Result = TypeVar("_Result")

_ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# A process that ends is noticed at once; this is for one that hangs. It is long because one may
# read files from a slow disk, or pull its image, while the others wait.
_TIMEOUT = timedelta(hours=1)
# torchrun ends all processes when it sees one end: let that be the one that has something to say.
# And what it leaves for the others must be there while they look.
_GRACE = 1.0
_FAILED = "failed"


class OtherProcessFailed(LoraxError):
    """This process cannot go on, because of another one that has said why."""


class Processes:
    """A process that trains alone.

    Attributes:
        rank: its number among all processes; the first one, 0, speaks and writes.
        world: how many processes there are.
        local_rank: its number among those of its machine; None if it was not started by another
            program.
    """

    rank: int = 0
    world: int = 1
    local_rank: int | None = None

    @property
    def is_first(self) -> bool:
        """Whether this is the process that speaks and writes."""
        return self.rank == 0

    def agree(self, values: Sequence[float] | None, size: int) -> list[float] | None:
        """Add up numbers over all processes; the sums are the same bits in each of them.

        Args:
            values: of this process; None if it failed to compute them.
            size: how many they are.

        Returns:
            The sums; None if any process failed.
        """
        return None if values is None else list(values)

    def total(self, values: Sequence[float]) -> list[float]:
        """``agree`` where no process can fail."""
        found = self.agree(values, len(values))
        assert found is not None
        return found

    def add_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Make each parameter's gradient its sum over all processes; those that have none in any
        process keep none. The parameters are float32 and on one device."""

    def gather(self, value: Any) -> list[Any]:
        """The value of each process, in the order of their ranks. It must be picklable."""
        return [value]

    def first(self, what: Callable[[], _Result]) -> _Result:
        """Have the first process do something, and all others wait for it.

        Returns:
            What it returned, in all processes. It must be picklable.

        Raises:
            OtherProcessFailed: in the others, when it raised an error.
        """
        return what()

    @contextmanager
    def machine_first(self) -> Iterator[None]:
        """Run the block in the first process of each machine, and in the others when it has: so
        that these find the files that it leaves."""
        yield

    @contextmanager
    def signals_held(self) -> Iterator[None]:
        """Within the block, ``stop_if_asked`` is where Ctrl-C and SIGTERM act: in all processes, if
        any of them was sent one. In a process alone, Ctrl-C acts at once, as ever."""
        yield

    def stop_if_asked(self) -> None:
        """Raise KeyboardInterrupt in all processes, if any was sent a signal before the latest
        ``agree``."""


class _Group(Processes):
    def __init__(self, rank: int, world: int, local_rank: int) -> None:
        self.rank, self.world, self.local_rank = rank, world, local_rank
        self._asked = self._stopping = False

    def agree(self, values: Sequence[float] | None, size: int) -> list[float] | None:
        message = torch.zeros(2 + size, dtype=torch.float64)
        message[0], message[1] = values is None, self._asked
        if values is not None:
            message[2:] = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(message)
        self._stopping = bool(message[1])
        return None if message[0] else message[2:].tolist()

    def add_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        # torch's DistributedDataParallel would wrap the model, take the mean over processes, which
        # is wrong where they have unequally many targets, and send buckets while it computes, which
        # pays for gigabytes: these are a few megabytes.
        there = parameters[0].new_tensor([parameter.grad is not None for parameter in parameters])
        parts = [_gradient(parameter).flatten() for parameter in parameters]
        flat = torch.cat([there, *parts])
        dist.all_reduce(flat)
        there, *parts = torch.split(flat, [len(there), *map(len, parts)])
        for parameter, count, part in zip(parameters, there.tolist(), parts, strict=True):
            if count:
                parameter.grad = _gradient(parameter).copy_(part.view(parameter.shape))

    def gather(self, value: Any) -> list[Any]:
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value)
        return found

    def first(self, what: Callable[[], _Result]) -> _Result:
        outcome: list[Any] = [False, None]
        try:
            if self.is_first:
                outcome = [True, what()]
        finally:
            dist.broadcast_object_list(outcome, src=0)
        if not outcome[0]:
            raise OtherProcessFailed("the first process has failed")
        return cast("_Result", outcome[1])

    @contextmanager
    def machine_first(self) -> Iterator[None]:
        if self.local_rank:
            self.total([])
        yield
        if not self.local_rank:
            self.total([])

    @contextmanager
    def signals_held(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(*_: object) -> None:
            self._asked = True

        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def stop_if_asked(self) -> None:
        if self._stopping:
            raise KeyboardInterrupt


def _gradient(parameter: nn.Parameter) -> torch.Tensor:
    """In the parameter's layout, which fused optimizers take for granted."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


@contextmanager
def join_processes() -> Iterator[Processes]:
    """This process with the others that ``torchrun`` has started, if it has: they meet here.

    Without ``torchrun``, whatever sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT does (and
    LOCAL_RANK, where a machine has several). Tensors on a CPU travel by gloo, on CUDA by NCCL.

    Raises:
        OtherProcessFailed: instead of any error, when another process failed first.
        TrainingError: when another process has vanished.
    """
    if not all(name in os.environ for name in _ENVIRONMENT):
        yield Processes()
        return
    from torch.distributed.rendezvous import rendezvous  # which not every build of torch has

    meet: Any = rendezvous  # whose types are not declared
    cuda = torch.cuda.is_available() and dist.is_nccl_available()
    try:
        store, rank, world = next(iter(meet("env://", timeout=_TIMEOUT)))
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            store=store,
            rank=rank,
            world_size=world,
            timeout=_TIMEOUT,
        )
    except (RuntimeError, ValueError) as error:
        given = ", ".join(f"{name}={os.environ[name]}" for name in _ENVIRONMENT)
        raise TrainingError(
            f"the processes do not find each other ({given}): {str(error).splitlines()[0]}; "
            "MASTER_ADDR and MASTER_PORT must be a free port of the first process's machine that "
            "the others reach, each RANK below WORLD_SIZE must be there once, and a process that "
            "is to train alone must have none of the four"
        ) from error
    group = _Group(rank, world, int(os.environ.get("LOCAL_RANK", "0")))
    well = False
    try:
        yield group
        group.total([])  # so that nobody takes an early end for a loss
        well = True
    except BaseException as error:
        _ignore_signals()  # torchrun sends one to the others as soon as one has ended
        if isinstance(error, OtherProcessFailed) or not _fails_first(store, rank):
            time.sleep(_GRACE)
            raise OtherProcessFailed("another process has failed") from error
        if _is_of_connection(error):
            raise TrainingError(
                f"process {rank} of {world} has lost another one ({str(error).splitlines()[0]}): "
                "it was killed (on a CPU, the system kills what takes too much memory), its "
                "machine is gone, or the network fails; start again, with --resume if there are "
                "checkpoints"
            ) from error
        if rank and isinstance(error, LoraxError):
            raise TrainingError(f"process {rank} of {world}: {error}") from error
        raise
    finally:
        # NCCL would wait for what the others will never send; the end of the process frees it.
        if well or not cuda:
            dist.destroy_process_group()
        if not well and not rank:
            time.sleep(_GRACE)  # the first process may hold the store that the others are to read


def _fails_first(store: Any, rank: int) -> bool:
    """Whether no other process has said that it fails; this one has then."""
    try:
        return bool(store.compare_set(_FAILED, "", str(rank)) == str(rank).encode())
    except RuntimeError:  # who holds the store was killed, and has said nothing
        return True


def _ignore_signals() -> None:
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)


def _is_of_connection(error: BaseException) -> bool:
    # gloo raises bare RuntimeErrors.
    known = ("closed by peer", "reset by peer", "gloo", "NCCL", "Broken pipe")
    return isinstance(error, RuntimeError) and any(each in str(error) for each in known)
