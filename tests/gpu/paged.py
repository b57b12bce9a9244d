"""Caches with NaN wherever nothing was written, for tests of what reads and writes pages."""

from __future__ import annotations

import math

import torch

from lorax_serve.gpu.pages import PAGE, LayerPages, pages_of


def poisoned_pages(
    lengths: list[int],
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    width: int = 0,
) -> LayerPages:
    """NaN everywhere, and a slot of each length, whose pages lie anywhere among twice as many.

    Args:
        width: of the table, at least; what a slot does not have is -1.
    """
    counts = [pages_of(length) for length in lengths]
    order = torch.randperm(2 * sum(counts) + 1).tolist()
    table = torch.full((len(lengths), max(width, *counts)), -1, dtype=torch.int32)
    for slot, count in enumerate(counts):
        table[slot, :count] = torch.tensor([order.pop() for _ in range(count)], dtype=torch.int32)
    shape = (2 * sum(counts) + 1, kv_heads, PAGE, head_dim)
    keys, values = (torch.full(shape, math.nan, dtype=dtype, device=device) for _ in range(2))
    return LayerPages(keys, values, table.to(device))


def fill(pages: LayerPages, slot: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random keys and values in a slot's first positions; both ``[kv_heads, length, head_dim]``."""
    _, kv_heads, _, head_dim = pages.keys.shape
    device, dtype = pages.keys.device, pages.keys.dtype
    written = []
    for cache in (pages.keys, pages.values):
        rows = torch.randn(kv_heads, length, head_dim).to(device, dtype)
        for position in range(length):
            page = int(pages.table[slot, position // PAGE])
            cache[page, :, position % PAGE] = rows[:, position]
        written.append(rows)
    return written[0], written[1]


def naive_attention(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, begin: int, scale: float
) -> torch.Tensor:
    """Queries ``[n, heads, head_dim]`` of positions from ``begin`` on, over ``[kv_heads, length,
    head_dim]``, as transformers' eager attention does it, in float64."""
    group = q.shape[1] // keys.shape[0]
    keys, values = (x.double().repeat_interleave(group, dim=0) for x in (keys, values))
    scores = q.double().transpose(0, 1) @ keys.transpose(1, 2) * scale
    rows = torch.arange(begin, begin + len(q), device=q.device)[:, None]
    masked = torch.arange(keys.shape[1], device=q.device) > rows
    weights = scores.masked_fill(masked, -math.inf).softmax(dim=-1)
    return (weights @ values).transpose(0, 1)
