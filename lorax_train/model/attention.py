"""Attention over rows that lie one after another: each row sees itself only, and nothing is padded.

Hugging Face's models call the attention that is registered under a name, and hand it whatever
keywords the model was called with. The rows' bounds come that way.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from lorax_train.model.cpu_attention import LONGEST, causal_attention

__all__ = ["BOUNDS", "attend_to_rows", "use_row_attention"]

NAME = "lorax_rows"
BOUNDS = "row_bounds"
"""The keyword: where each row begins, and the number of tokens at the end."""

_LAYERS = {"full_attention", "sliding_attention"}
# Keywords with which a model asks for other scores: soft-capped, with sinks, with biases.
_REFUSED = ("softcap", "s_aux", "position_bias", "attention_bias")


def attend_to_rows(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    row_bounds: Sequence[int] | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each row.

    Rows of one length that follow each other are computed in one call; on a CPU in bfloat16, those
    of like length.

    Args:
        module: of the model; not used.
        query: ``[B, heads, T, d]``.
        key, value: ``[B, kv_heads, T, d]``.
        attention_mask: must be None.
        row_bounds: where the rows begin in the T tokens, and T; None: all are one row.
        scaling: of the scores; None is ``1 / sqrt(d)``.
        sliding_window: how many tokens each one sees, itself included.
        others: what else models pass on.

    Returns:
        ``[B, T, heads, d]``, and None for the weights.

    Raises:
        ValueError: when the model asks for something that is not computed here.
    """
    _check(attention_mask, others)
    bounds = row_bounds or (0, query.shape[2])
    lengths = [stop - start for start, stop in pairwise(bounds)]
    if _suits_cpu(query, value, max(lengths), sliding_window):
        return causal_attention(query[0], key[0], value[0], bounds, scaling)[None], None
    grouped = query.shape[1] != key.shape[1]
    parts = []
    start = 0
    for length, group in groupby(lengths):
        count = len(list(group))
        stop = start + count * length

        def rows(each: torch.Tensor) -> torch.Tensor:
            batch, heads, _, width = each.shape
            part = each[:, :, start:stop].reshape(batch, heads, count, length, width)  # noqa: B023
            return part.transpose(1, 2).reshape(batch * count, heads, length, width)  # noqa: B023

        mask = _window(length, sliding_window, query.device)
        found = F.scaled_dot_product_attention(
            rows(query),
            rows(key),
            rows(value),
            attn_mask=mask,
            is_causal=mask is None,
            scale=scaling,
            enable_gqa=grouped,
        )
        parts.append(found.transpose(1, 2).reshape(len(query), count * length, *found.shape[1::2]))
        start = stop
    return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0], None


def use_row_attention(model: PreTrainedModel) -> None:
    """Have the model call ``attend_to_rows``.

    Raises:
        ValueError: when it has layers that are told by their mask alone what to see.
    """
    layers = set(getattr(model.config, "layer_types", None) or ())
    if layers - _LAYERS or getattr(model.config, "attention_chunk_size", None):
        raise ValueError(f"layers that are not known to keep rows apart: {sorted(layers)}")
    AttentionInterface.register(NAME, attend_to_rows)
    AttentionMaskInterface.register(NAME, _no_mask)
    model.set_attn_implementation(NAME)


def _check(mask: torch.Tensor | None, others: dict[str, Any]) -> None:
    asked = [name for name in _REFUSED if others.get(name) is not None]
    if asked or others.get("is_causal") is False or others.get("dropout"):
        raise ValueError(f"attention over rows has no {', '.join(asked) or 'such attention'}")
    if mask is not None:
        raise ValueError("attention over rows takes no mask: give row_bounds instead")


def _no_mask(*_: Any, attention_mask: torch.Tensor | None = None, **__: Any) -> None:
    """What transformers makes masks with, which are made by ``attend_to_rows`` here."""
    if attention_mask is not None and not bool(attention_mask.all()):
        raise ValueError("attention over rows takes no padding: give row_bounds instead")


def _suits_cpu(query: torch.Tensor, value: torch.Tensor, longest: int, window: int | None) -> bool:
    """Whether there is something faster than the fused kernel, which is good in float32."""
    suits = query.device.type == "cpu" and query.dtype == torch.bfloat16 and len(query) == 1
    suits = suits and query.shape[-1] == value.shape[-1]
    return suits and longest <= min(LONGEST, window or LONGEST)


def _window(length: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    if window is None or length <= window:
        return None
    place = torch.arange(length, device=device)
    back = place[:, None] - place[None, :]
    return (back >= 0) & (back < window)
