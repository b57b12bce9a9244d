"""Keys and values of running sequences: one contiguous row of positions per sequence.

On a CPU, gathering pages costs more than the attention itself, so a sequence's keys lie in one
piece. The memory is reserved for the longest sequence and touched only as far as it is used.
"""

from __future__ import annotations

import math
import mmap

import torch

__all__ = ["KVCache"]


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
        self.keys = [_zeros(shape, dtype, device) for _ in range(num_layers)]
        self.values = [_zeros(shape, dtype, device) for _ in range(num_layers)]
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


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # The kernel gives zeroed pages as they are touched; torch.zeros would touch them all. Small
    # pages, or the first token of each row and head would take 2 MiB.
    pages = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
    pages.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype).view(shape)
