"""Keys and values of running sequences: one contiguous row of positions per sequence.

On a CPU, gathering pages costs more than the attention itself, so a sequence's keys lie in one
piece. The memory is reserved for the longest sequence and touched only as far as it is used; what
a row no longer needs goes back to the operating system, whose virtual memory does the paging.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import torch

from lorax_serve.core import RowCopy

__all__ = ["KVCache", "affordable_tokens"]

# What cached keys and values may take of the memory that is free at the start; the rest is for
# adapters, activations and other processes.
_MEMORY_SHARE = 3
# Most of what is mapped is never touched; the system need not have it all. Python 3.11 has no name
# for Linux's flag.
_MAP_NORESERVE = 0x4000


class KVCache:
    """``keys`` and ``values``: one tensor a layer, ``[slots, kv_heads, max_length, head_dim]``.

    Unwritten positions hold finite numbers at all times: masked attention multiplies them by
    zero, and zero times NaN would reach the result.
    """

    def __init__(
        self,
        num_layers: int,
        slots: int,
        kv_heads: int,
        max_length: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.max_length = max_length
        self._kv_heads = kv_heads
        shape = (slots, kv_heads, max_length, head_dim)
        self._pages: list[mmap.mmap] = []
        self.keys = [self._zeros(shape, dtype, device) for _ in range(num_layers)]
        self.values = [self._zeros(shape, dtype, device) for _ in range(num_layers)]
        self.key_addresses = [layer.data_ptr() for layer in self.keys]
        self.value_addresses = [layer.data_ptr() for layer in self.values]
        self._position_bytes = head_dim * dtype.itemsize
        self.bytes_per_token = 2 * num_layers * kv_heads * self._position_bytes
        self._head_offsets = torch.arange(kv_heads, device=device) * max_length

    @property
    def nbytes(self) -> int:
        """Bytes reserved."""
        return sum(layer.nbytes for layer in (*self.keys, *self.values))

    def index(self, slots: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Where to write: ``[tokens * kv_heads]``, for ``slots`` and ``positions`` ``[tokens]``."""
        first = slots * (self._kv_heads * self.max_length) + positions
        return (first[:, None] + self._head_offsets).flatten()

    def write(
        self, layer: int, index: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """Store ``keys`` and ``values`` ``[tokens, kv_heads, head_dim]`` at ``index``."""
        head_dim = keys.shape[-1]
        for cache, new in ((self.keys, keys), (self.values, values)):
            cache[layer].view(-1, head_dim).index_copy_(0, index, new.reshape(-1, head_dim))

    def scrub(self, slot: int, length: int) -> None:
        """Zero a row's first ``length`` positions, after a sequence that may have left NaN."""
        for layer in (*self.keys, *self.values):
            layer[slot, :, :length].zero_()

    def copy(self, copies: Iterable[RowCopy]) -> None:
        """Copy and free as ``RowCopy`` says, one after the other."""
        for source, destination, length in copies:
            if source == destination:
                self.free(source, length)
                continue
            for layer in (*self.keys, *self.values):
                layer[destination, :, :length].copy_(layer[source, :, :length])

    def free(self, slot: int, length: int) -> None:
        """Give back the memory of a row's positions from ``length`` on.

        A row that is freed from 0 on reads as zeros, whatever a failed sequence left there. Of
        others, what fills no page keeps its numbers, which are finite.
        """
        if not self._pages:
            if not length:
                for layer in (*self.keys, *self.values):
                    layer[slot].zero_()
            return
        head = self.max_length * self._position_bytes
        first = slot * self._kv_heads * head
        spans = [(first, first + self._kv_heads * head)]
        if length:
            begin = length * self._position_bytes
            heads = range(first, first + self._kv_heads * head, head)
            spans = [(start + begin, start + head) for start in heads]
        page = mmap.PAGESIZE
        for pages in self._pages:
            for begin, end in spans:
                low, high = -(-begin // page) * page, end // page * page
                if low < high:
                    pages.madvise(mmap.MADV_DONTNEED, low, high - low)
                if not length:
                    low, high = min(low, end), max(high, begin)
                    pages[begin:low] = bytes(low - begin)
                    pages[high:end] = bytes(end - high)

    def _zeros(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        if device.type != "cpu":
            return torch.zeros(shape, dtype=dtype, device=device)
        # The kernel gives zeroed pages as they are touched; torch.zeros would touch them all. Small
        # pages, or the first token of each row and head would take 2 MiB.
        # Private: shared pages could not be given back.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        pages = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=flags)
        with suppress(OSError):  # a system without huge pages
            pages.madvise(mmap.MADV_NOHUGEPAGE)
        self._pages.append(pages)
        return torch.frombuffer(pages, dtype=dtype).view(shape)


def affordable_tokens(bytes_per_token: int) -> int:
    """How many tokens a third of the memory holds that is free for this process now."""
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        kib = next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))
        free = min(free, int(kib) * 1024)
        # What a container's limit leaves ("max" where there is none); file pages can be dropped.
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        free = min(free, max(0, limit - used + int(stat["inactive_file"])))
    except (OSError, ValueError, KeyError, StopIteration):
        pass
    return free // _MEMORY_SHARE // bytes_per_token
