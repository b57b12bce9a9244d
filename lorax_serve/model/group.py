"""The ranks that compute one model together: what they exchange in a step."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from lorax_serve.checkpoint.part import WHOLE, Part

__all__ = ["ALONE", "Group", "join", "leave"]

# A rank that ends is noticed at once; this is for one that hangs. It is long because one may load
# the model from a slow disk while another waits.
_TIMEOUT = timedelta(minutes=10)


class Group:
    """A process that computes all by itself: nothing is exchanged.

    Every rank must make the same calls in the same order, from one thread.

    Attributes:
        part: what this rank has of the model.
    """

    part: Part = WHOLE

    def add_up(self, y: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' y, in place; the shapes and dtypes are equal."""
        return y

    def side_by_side(self, y: torch.Tensor, width: int) -> torch.Tensor:
        """All ranks' columns in the order of the ranks.

        Args:
            y: ``[rows, columns of this rank]``, as ``Part.tokens`` shares them out.
            width: columns in all.

        Returns:
            ``[rows, width]``, contiguous, the same bits on every rank.
        """
        return y

    def from_first(self, tensor: torch.Tensor) -> torch.Tensor:
        """What rank 0 has, in place."""
        return tensor

    def least(self, number: int) -> int:
        """The smallest of all ranks' numbers."""
        return number


ALONE = Group()


class _Many(Group):
    """Several; work on a GPU is queued on its current stream, and the host does not wait for it."""

    def __init__(self, part: Part) -> None:
        self.part = part

    def add_up(self, y: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(y)
        return y

    def side_by_side(self, y: torch.Tensor, width: int) -> torch.Tensor:
        each = -(-width // self.part.size)
        if y.shape[1] < each:  # the last ones have fewer columns, and all must send as many
            y = F.pad(y, (0, each - y.shape[1]))
        parts = [torch.empty_like(y) for _ in range(self.part.size)]
        dist.all_gather(parts, y)
        return torch.cat(parts, dim=1)[:, :width].contiguous()

    def from_first(self, tensor: torch.Tensor) -> torch.Tensor:
        dist.broadcast(tensor, src=0)
        return tensor

    def least(self, number: int) -> int:
        message = torch.tensor([number], dtype=torch.int64)
        dist.all_reduce(message, op=dist.ReduceOp.MIN)
        return int(message)


def join(part: Part, meeting: Path, device: torch.device) -> Group:
    """Meet the other ranks of this machine; returns when all are there.

    Tensors on a CPU travel by gloo, on CUDA by NCCL. A process can be in one group at a time.

    Args:
        part: this rank.
        meeting: a file that all ranks name, in a directory that is theirs alone. A file, because a
            port would be open to everybody.
        device: this rank's.
    """
    # They are all on this machine, and nobody else is to reach them.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    cuda = device.type == "cuda"
    store: Any = dist.FileStore  # type: ignore[attr-defined]  # which not every build of torch has
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        store=store(str(meeting), part.size),
        rank=part.rank,
        world_size=part.size,
        timeout=_TIMEOUT,
        device_id=device if cuda else None,
    )
    return _Many(part)


def leave() -> None:
    """End this process's part in the group, if it is in one; all ranks do so at the same time."""
    if dist.is_initialized():
        dist.destroy_process_group()
