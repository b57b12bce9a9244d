"""Causal attention of short rows on a CPU, whose gradient keeps no scores.

PyTorch's fused kernel takes one call for each length of row, and computes it in small tiles, whose
bfloat16 products are far below what a core can do. Here rows of like length are padded to the
longest of them (nothing before the padding sees it) and computed together, and heads that share a
key are one product (GQA). Scores and softmax are in float32, and computed again for the gradient,
as FlashAttention does (arXiv:2205.14135).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch

__all__ = ["LONGEST", "causal_attention"]

LONGEST = 1024
"""Tokens in a row; beyond it the fused kernel is as fast."""
_LIKE = 64
"""Rows are computed together if they have as many of these, the last one counted in full."""
_QUERIES = 64
"""A block in a row of more than ``_WHOLE``: its queries see the keys up to its end, so that what
they do not see is not computed."""
_WHOLE = 128
_SCORES = 1 << 19
"""So many exist at a time, or one key head's of a block: 2 MiB in float32, near the core."""


def causal_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: Sequence[int],
    scale: float | None = None,
) -> torch.Tensor:
    """Within each row, what ``scaled_dot_product_attention`` with ``is_causal`` and ``enable_gqa``
    computes.

    Args:
        query: ``[heads, T, d]``: rows one after another.
        key, value: ``[kv_heads, T, d]``, in query's dtype.
        bounds: where each row begins, and T.
        scale: of the scores; None is ``1 / sqrt(d)``.

    Returns:
        ``[T, heads, d]``.
    """
    function: Any = _CausalAttention
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    out: torch.Tensor = function.apply(query, key, value, tuple(bounds), scale)
    return out


class _Rows(NamedTuple):
    """Rows that are computed together: where each begins and ends, and the longest's length."""

    spans: list[tuple[int, int]]
    length: int

    def padded(self, flat: torch.Tensor, heads: int) -> torch.Tensor:
        """Of ``[h, T, d]`` these rows, ``[rows * heads, h / heads * length, d]``, zeros after
        each."""
        h, _, width = flat.shape
        shape = (len(self.spans), h, self.length, width)
        found = flat.new_zeros(shape)
        for row, (start, stop) in zip(found, self.spans, strict=True):
            row[:, : stop - start] = flat[:, start:stop]
        return found.view(len(self.spans) * heads, h // heads, self.length, width)

    def put(self, flat: torch.Tensor, padded: torch.Tensor) -> None:
        """The reverse: write them into ``[h, T, d]``."""
        rows = padded.view(len(self.spans), len(flat), self.length, -1)
        for row, (start, stop) in zip(rows, self.spans, strict=True):
            flat[:, start:stop] = row[:, : stop - start]


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bounds: tuple[int, ...],
        scale: float,
    ) -> torch.Tensor:
        heads, tokens, width = query.shape
        out = query.new_empty(tokens, heads, width)
        for rows in _groups(bounds):
            q, k, v = (rows.padded(each, len(key)) for each in (query, key, value))
            found = torch.empty_like(q)
            wide = k.squeeze(1).float()
            for some, block in _pieces(q):
                p = _probabilities(_block(q, some, block), wide, scale, some, block)
                part = torch.bmm(p.to(v.dtype), v[some, 0, : block.stop])
                found[some, :, block] = part.view(len(part), q.shape[1], -1, width)
            rows.put(out.transpose(0, 1), found)
        ctx.save_for_backward(query, key, value)
        ctx.bounds, ctx.scale = bounds, scale
        return out

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[Any, ...]:
        query, key, value = ctx.saved_tensors
        dtype, width = query.dtype, query.shape[-1]
        gradients = [torch.empty_like(each) for each in (query, key, value)]
        for rows in _groups(ctx.bounds):
            q, k, v = (rows.padded(each, len(key)) for each in (query, key, value))
            d = rows.padded(dout.transpose(0, 1), len(key))
            wide = k.squeeze(1).float()
            dq = torch.empty_like(q)
            # Sums over blocks: not rounded in between.
            dk, dv = (torch.zeros_like(wide) for _ in range(2))
            for some, block in _pieces(q):
                seen = slice(0, block.stop)
                q_block, d_block = _block(q, some, block), _block(d, some, block)
                p = _probabilities(q_block, wide, ctx.scale, some, block)
                dv[some, seen] += torch.bmm(p.to(dtype).transpose(1, 2), d_block)
                dp = torch.bmm(d_block, v[some, 0, seen].transpose(1, 2)).float().mul_(p)
                ds = dp.sub_(p.mul_(dp.sum(-1, keepdim=True))).mul_(ctx.scale).to(dtype)
                part = torch.bmm(ds, k[some, 0, seen])
                dq[some, :, block] = part.view(len(part), q.shape[1], -1, width)
                dk[some, seen] += torch.bmm(ds.transpose(1, 2), q_block)
            for flat, padded in zip(gradients, (dq, dk, dv), strict=True):
                rows.put(flat, padded)
        return *gradients, None, None


def _groups(bounds: Sequence[int]) -> Iterator[_Rows]:
    """The rows that are computed together."""
    groups: dict[int, list[tuple[int, int]]] = {}
    for start, stop in pairwise(bounds):
        groups.setdefault((stop - start + _LIKE - 1) // _LIKE, []).append((start, stop))
    for spans in groups.values():
        yield _Rows(spans, max(stop - start for start, stop in spans))


def _pieces(query: torch.Tensor) -> Iterator[tuple[slice, slice]]:
    """Which key heads and which queries of ``[n, shared, L, d]`` are computed at a time."""
    n, shared, length, _ = query.shape
    size = length if length <= _WHOLE else _QUERIES
    for start in range(0, length, size):
        block = slice(start, min(start + size, length))
        scores = shared * (block.stop - block.start) * block.stop
        step = max(1, _SCORES // scores)
        for first in range(0, n, step):
            yield slice(first, min(first + step, n)), block


def _block(padded: torch.Tensor, some: slice, block: slice) -> torch.Tensor:
    """Of ``[n, shared, L, d]`` a block's part, ``[n, shared * block, d]``."""
    return padded[some, :, block].flatten(1, 2)


def _probabilities(
    q: torch.Tensor, wide: torch.Tensor, scale: float, some: slice, block: slice
) -> torch.Tensor:
    """What a block's queries ``[n, shared * block, d]`` give to each key that they may see, float32
    ``[n, shared * block, keys]``."""
    size = block.stop - block.start
    scores = torch.bmm(q.float() * scale, wide[some, : block.stop].transpose(1, 2))
    hidden = torch.full((size, size), -math.inf).triu_(1)
    scores.view(len(q), -1, size, block.stop)[..., block].add_(hidden)
    return scores.softmax(-1)
