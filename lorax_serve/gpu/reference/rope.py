"""``ops.RotateAndStore`` in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lorax_serve.gpu.pages import PAGE, LayerPages, Rope

__all__ = ["rotate_and_store"]


def rotate_and_store(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    kv_slots: torch.Tensor,
    pages: LayerPages,
    rope: Rope,
) -> None:
    """See ``ops.RotateAndStore``."""
    kv_heads = pages.keys.shape[1]
    heads = qkv.shape[1] - 2 * kv_heads
    rows = (kv_slots >= 0).nonzero().squeeze(1)
    at, slots = positions[rows].long(), kv_slots[rows].long()
    q, k, v = torch.split(qkv[rows], [heads, kv_heads, kv_heads], dim=1)
    q, k = _turned(q, rope.q_norm, at, rope), _turned(k, rope.k_norm, at, rope)
    qkv[rows, : heads + kv_heads] = torch.cat((q, k), dim=1)
    page, offset = pages.table[slots, at // PAGE].long(), at % PAGE
    pages.keys[page, :, offset] = k
    pages.values[page, :, offset] = v


def _turned(
    x: torch.Tensor, norm: torch.Tensor | None, positions: torch.Tensor, rope: Rope
) -> torch.Tensor:
    """x ``[T, heads, head_dim]``, normed and rotated; the result is like x."""
    y = x.float()
    if norm is not None:
        y = F.rms_norm(y, norm.shape, norm.float(), rope.eps)
    if rope.cos is not None and rope.sin is not None:
        cos, sin = rope.cos[positions][:, None], rope.sin[positions][:, None]
        first, second = y.chunk(2, dim=-1)
        y = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return y.to(x.dtype)
