"""Causal attention of short rows on a CPU, whose gradient keeps no scores.

PyTorch's fused kernel computes a row in small tiles, whose bfloat16 products are far below what a
core can do: it takes 1.5 to 2 times as long for rows of up to 512 tokens. Heads that share a key
are one product (GQA). Scores and softmax are in float32, and computed again for the
gradient, as FlashAttention does (arXiv:2205.14135).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

__all__ = ["LONGEST", "causal_attention"]

_QUERIES = 64
"""A block: its queries see the keys up to its end, so that long rows skip what they do not see."""
_SCORES = 1 << 19
"""So many exist at a time, or one key head's of a block: 2 MiB in float32, near the core."""
LONGEST = 1024
"""Beyond it the fused kernel is as fast."""


def causal_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None = None
) -> torch.Tensor:
    """What ``scaled_dot_product_attention`` with ``is_causal`` and ``enable_gqa`` computes.

    Args:
        query: ``[B, heads, L, d]``.
        key, value: ``[B, kv_heads, L, d]``, in query's dtype.
        scale: of the scores; None is ``1 / sqrt(d)``.

    Returns:
        ``[B, heads, L, d]``.
    """
    batch, heads, length, width = query.shape
    kv_heads = key.shape[1]
    shared = heads // kv_heads
    function: Any = _CausalAttention
    out: torch.Tensor = function.apply(
        query.reshape(batch * kv_heads, shared, length, width),
        key.reshape(batch * kv_heads, length, width),
        value.reshape(batch * kv_heads, length, width),
        1 / math.sqrt(width) if scale is None else scale,
    )
    return out.view(batch, heads, length, width)


class _CausalAttention(torch.autograd.Function):
    """query ``[n, shared, L, d]``, key and value ``[n, L, d]``."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        out = torch.empty_like(query)
        for some, block in _pieces(query):
            q, p = _probabilities(query, key, scale, some, block)
            found = torch.bmm(p.to(value.dtype), value[some, : block.stop])
            out[some, :, block] = found.view(*_shape(q, block), -1)
        ctx.save_for_backward(query, key, value)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[Any, ...]:
        query, key, value = ctx.saved_tensors
        dtype = query.dtype
        dquery = torch.empty_like(query)
        # Sums over blocks: not rounded in between.
        dkey = torch.zeros_like(key, dtype=torch.float32)
        dvalue = torch.zeros_like(value, dtype=torch.float32)
        for some, block in _pieces(query):
            q, p = _probabilities(query, key, ctx.scale, some, block)
            seen = slice(0, block.stop)
            d = dout[some, :, block].reshape(len(q), -1, query.shape[-1])
            dvalue[some, seen] += torch.bmm(p.to(dtype).transpose(1, 2), d)
            dp = torch.bmm(d, value[some, seen].transpose(1, 2)).float()
            dp.mul_(p)
            ds = dp.sub_(p.mul_(dp.sum(-1, keepdim=True))).mul_(ctx.scale).to(dtype)
            dquery[some, :, block] = torch.bmm(ds, key[some, seen]).view(*_shape(q, block), -1)
            dkey[some, seen] += torch.bmm(ds.transpose(1, 2), q)
        return dquery, dkey.to(dtype), dvalue.to(dtype), None


def _pieces(query: torch.Tensor) -> Iterator[tuple[slice, slice]]:
    """Which key heads and which queries are computed at a time."""
    n, shared, length, _ = query.shape
    for start in range(0, length, _QUERIES):
        block = slice(start, min(start + _QUERIES, length))
        scores = shared * (block.stop - block.start) * block.stop
        step = max(1, _SCORES // scores)
        for first in range(0, n, step):
            yield slice(first, min(first + step, n)), block


def _probabilities(
    query: torch.Tensor, key: torch.Tensor, scale: float, some: slice, block: slice
) -> tuple[torch.Tensor, torch.Tensor]:
    """A block's queries ``[n, shared * block, d]``, and what they give to each key that they may
    see, float32 ``[n, shared * block, keys]``."""
    size = block.stop - block.start
    q = query[some, :, block]
    n, shared = q.shape[:2]
    q = q.reshape(n, shared * size, -1)
    scores = torch.bmm(q.float() * scale, key[some, : block.stop].float().transpose(1, 2))
    hidden = torch.full((size, size), -math.inf).triu_(1)
    scores.view(n, shared, size, block.stop)[..., block].add_(hidden)
    return q, scores.softmax(-1)


def _shape(q: torch.Tensor, block: slice) -> tuple[int, int, int]:
    size = block.stop - block.start
    return len(q), q.shape[1] // size, size
