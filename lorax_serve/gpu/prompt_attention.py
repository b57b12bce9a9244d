"""Attention of prompt chunks, in plain torch: both kinds of ``gpu.ops`` go with it.

A chunk has many queries of one sequence, and torch's own kernels are made for that; they only want
the sequence's keys in one piece.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from lorax_serve.gpu.pages import LayerPages

__all__ = ["prompt_attention"]


def prompt_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slot: int,
    end: int,
    pages: LayerPages,
    scale: float,
) -> torch.Tensor:
    """Attention of positions ``[end - n, end)`` of a sequence over its own up to each, itself
    included.

    A chunk that begins at 0 is all that there is, and its pages are not read. The pages of another
    are gathered; positions from ``end`` on are not looked at, NaN or not.

    Args:
        q: ``[n, heads, head_dim]``, any stride between rows.
        k, v: the chunk's own, ``[n, kv_heads, head_dim]``, any stride between rows, as
            ``rotate_and_store`` left them, which has brought them to the pages as well.
        slot: the sequence's row of ``pages.table``.
        end: the chunk's end.
        pages: the layer's cache.
        scale: of the products of q and k.

    Returns:
        ``[n, heads, head_dim]``; heads may lie before rows in memory.
    """
    count = len(q)
    # [heads, n, head_dim] each, keys and values with fewer heads.
    queries, keys, values = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
    mask = None
    if end > count:
        keys, values = pages.gather(slot, end)
        mask = _mask(count, end, q.device)
    out = F.scaled_dot_product_attention(
        queries[None],
        keys[None],
        values[None],
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=True,
    )
    return out[0].transpose(0, 1)


def _mask(count: int, end: int, device: torch.device) -> torch.Tensor:
    """The last ``count`` of ``end`` positions look at none after themselves."""
    if device.type == "cuda":
        # No tensor but a name of one: flash attention computes it, and no mask is read.
        return causal_lower_right(count, end)
    rows = torch.arange(end - count, end, device=device)[:, None]
    return rows >= torch.arange(end, device=device)
