"""An arena of random adapters and a plan of rows, laid out as ``gpu.lora`` says."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lorax_serve.gpu.lora import ALIGNMENT, HEADER, MAX_SLICES, LoRAPlan, SiteShape

__all__ = ["CHUNK", "plan_of", "power_of_two", "random_arena"]

CHUNK = 16
_DEVIATION = 0.02


def random_arena(
    sites: Sequence[SiteShape], rank: int, count: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, list[int]]:
    """Plain LoRA of one rank on all sites, ``count`` times.

    Returns:
        The arena, and where each adapter begins in it, in elements.
    """
    size = dtype.itemsize
    unit = ALIGNMENT // size
    header = torch.zeros(len(sites), HEADER, dtype=torch.int32)
    end = _aligned(header.nbytes // size, unit)
    for number, site in enumerate(sites):
        for part, width in enumerate(site.widths):
            header[number, part] = rank
            header[number, MAX_SLICES + part] = end
            end = _aligned(end + rank * site.in_features, unit)
            header[number, 2 * MAX_SLICES + part] = end
            end = _aligned(end + rank * width, unit)
    arena = torch.empty(count * end, dtype=dtype, device=device).normal_(std=_DEVIATION)
    starts = [number * end for number in range(count)]
    numbers = header.flatten().to(device)
    for start in starts:
        arena[start : start + header.nbytes // size].view(torch.int32).copy_(numbers)
    return arena, starts


def plan_of(rows: int, starts: Sequence[int], rank: int, device: torch.device) -> LoRAPlan:
    """Rows that take turns with the adapters that begin at ``starts``."""
    blobs, chunks = [], []
    for number, start in enumerate(starts):
        own = range(number, rows, len(starts))
        for first in range(0, len(own), CHUNK):
            some = own[first : first + CHUNK]
            blobs.append(start)
            chunks.append([*some, *[-1] * (CHUNK - len(some))])
    return LoRAPlan(
        torch.tensor(blobs, dtype=torch.int64, device=device),
        torch.tensor(chunks, dtype=torch.int32, device=device),
        CHUNK,
        max(16, power_of_two(rank)),
    )


def power_of_two(least: int) -> int:
    """The smallest power of two that is no less."""
    return 1 << (least - 1).bit_length()


def _aligned(place: int, unit: int) -> int:
    return -(-place // unit) * unit
