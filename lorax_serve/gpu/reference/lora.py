"""LoRA in plain torch, a chunk and a slice at a time; see ``gpu.ops``."""

from __future__ import annotations

import torch

from lorax_serve.gpu.lora import (
    A_OFFSETS,
    B_OFFSETS,
    GAIN,
    HEADER,
    RANKS,
    SHIFT,
    LoRAPlan,
    SiteShape,
)

__all__ = ["lora_expand", "lora_shrink"]


def lora_shrink(
    x: torch.Tensor, arena: torch.Tensor, plan: LoRAPlan, site: SiteShape
) -> torch.Tensor:
    """See ``ops.LoRAShrink``; in one part."""
    slices = len(site.widths)
    h = x.new_empty(1, slices, len(x), plan.max_rank, dtype=torch.float32)
    for blob, rows in _chunks(plan):
        header, own = _header(arena, blob, site), x[rows].float()
        for index in range(slices):
            if rank := header[RANKS + index]:
                begin = blob + header[A_OFFSETS + index]
                a = arena[begin : begin + rank * site.in_features].view(rank, -1)
                h[0, index, rows, :rank] = own @ a.float().T
    return h


def lora_expand(
    h: torch.Tensor,
    y: torch.Tensor,
    arena: torch.Tensor,
    plan: LoRAPlan,
    site: SiteShape,
    bias: torch.Tensor | None,
) -> None:
    """See ``ops.LoRAExpand``."""
    for blob, rows in _chunks(plan):
        header, own = _header(arena, blob, site), y[rows].float()
        first = 0
        for index, width in enumerate(site.widths):
            if rank := header[RANKS + index]:
                begin = blob + header[B_OFFSETS + index]
                b = arena[begin : begin + rank * width].view(rank, width)
                # A copy: rounding must not change h.
                summed = h[:, index, rows, :rank].sum(0).to(arena.dtype)
                own[:, first : first + width] += summed.float() @ b.float()
            first += width
        base = 0 if bias is None else bias.float()
        if header[GAIN]:
            own = (own - base) * _floats(arena, blob + header[GAIN], first) + base
        if header[SHIFT]:
            own = own + _floats(arena, blob + header[SHIFT], first)
        y[rows] = own.to(y.dtype)


def _chunks(plan: LoRAPlan) -> list[tuple[int, torch.Tensor]]:
    """Blob and rows, int64, of each chunk that has an adapter."""
    counts = (plan.rows >= 0).sum(1).tolist()
    return [
        (blob, rows[:count].long())
        for blob, rows, count in zip(plan.blobs.tolist(), plan.rows, counts, strict=True)
        if blob >= 0
    ]


def _header(arena: torch.Tensor, blob: int, site: SiteShape) -> list[int]:
    """The blob's numbers at a site."""
    begin = blob * arena.itemsize // 4 + site.index * HEADER
    numbers: list[int] = arena.view(torch.int32)[begin : begin + HEADER].tolist()
    return numbers


def _floats(arena: torch.Tensor, offset: int, size: int) -> torch.Tensor:
    """float32 ``[size]`` at an offset in elements of the arena's dtype."""
    begin = offset * arena.itemsize // 4
    return arena.view(torch.float32)[begin : begin + size]
