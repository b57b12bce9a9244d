"""``ops.DecodeAttention`` in plain torch."""

from __future__ import annotations

import torch

from lorax_serve.gpu.pages import LayerPages

__all__ = ["decode_attention"]


def decode_attention(
    q: torch.Tensor,
    positions: torch.Tensor,
    kv_slots: torch.Tensor,
    pages: LayerPages,
    scale: float,
) -> torch.Tensor:
    """See ``ops.DecodeAttention``. One sequence after the other: none pays for the longest, and
    none's bits depend on the others."""
    kv_heads = pages.keys.shape[1]
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    for row, (slot, position) in enumerate(zip(kv_slots.tolist(), positions.tolist(), strict=True)):
        if slot < 0:
            continue
        keys, values = (x.float() for x in pages.gather(slot, position + 1))
        queries = q[row].float().view(kv_heads, -1, q.shape[-1])
        weights = (queries @ keys.transpose(1, 2) * scale).softmax(dim=-1)
        out[row] = (weights @ values).view(q.shape[1:])
    return out
