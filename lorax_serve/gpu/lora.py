"""How adapters lie in the arena, and which rows of a step each is for, as the kernels see it.

The arena is one tensor of the compute dtype that holds all adapters of the device, each in one
piece, its *blob*, so that a load is one copy. A blob begins with a header of int32, which a view of
the arena reads: for each site ``HEADER`` numbers, all offsets in elements of the compute dtype from
the blob's start:

    ranks of slices 0, 1, 2     0 where the adapter does not target the slice
    A of slices 0, 1, 2         each ``[rank, in]``
    B of slices 0, 1, 2         each ``[rank, columns of the slice]``, scaled
    gain, shift                 float32 ``[out]``; 0 where there is none
    (one unused)

Every part begins at a multiple of ``ALIGNMENT`` bytes. What lies between parts, or beyond the last
blob, is never read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["ALIGNMENT", "HEADER", "MAX_SLICES", "LoRAPlan", "SiteShape"]

MAX_SLICES = 3
HEADER = 3 * MAX_SLICES + 3
RANKS, A_OFFSETS, B_OFFSETS = 0, MAX_SLICES, 2 * MAX_SLICES
GAIN, SHIFT = 3 * MAX_SLICES, 3 * MAX_SLICES + 1
ALIGNMENT = 128
"""Bytes to which blobs, and all parts of a blob, are aligned."""


@dataclass(frozen=True, slots=True)
class SiteShape:
    """One fused linear.

    Attributes:
        index: its number, which is its header's.
        in_features: of x.
        widths: the columns of each slice of y, at most ``MAX_SLICES``.
    """

    index: int
    in_features: int
    widths: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LoRAPlan:
    """Which adapter each row has: rows sorted by adapter, in chunks that have one each.

    Attributes:
        blobs: int64 ``[chunks]``, where the adapter of each chunk begins in the arena, in elements;
            -1 for chunks that are there to fill a fixed number.
        rows: int32 ``[chunks, chunk]``, each chunk's rows of x and y; -1 past its end. No row is in
            two chunks; rows of the base model are in none.
        chunk: rows of a chunk: a power of two, at least 16.
        max_rank: no slice of an adapter in the plan has more: a power of two, at least 16.
    """

    blobs: torch.Tensor
    rows: torch.Tensor
    chunk: int
    max_rank: int
