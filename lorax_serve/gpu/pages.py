"""Where the paged KV cache keeps one layer's keys and values, as the kernels see it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["PAGE", "LayerPages", "Rope"]

PAGE = 32
"""Positions of a page: ``engine.kv_rows`` counts memory in blocks of as many."""


@dataclass(frozen=True, slots=True)
class LayerPages:
    """One layer of the cache. Position p of KV slot s is at offset ``p % PAGE`` of page
    ``table[s, p // PAGE]``.

    Attributes:
        keys, values: ``[pages, kv_heads, PAGE, head_dim]``.
        table: int32 ``[slots, max_pages]``, shared by all layers; what a slot does not have is -1.
    """

    keys: torch.Tensor
    values: torch.Tensor
    table: torch.Tensor


@dataclass(frozen=True, slots=True)
class Rope:
    """How queries and keys are changed before attention; see ``ops.RotateAndStore``.

    Attributes:
        cos, sin: float32 ``[max_positions, head_dim / 2]``; None: nothing is rotated.
        q_norm, k_norm: ``[head_dim]``, RMSNorm of each head before it is rotated; None: no norm.
        eps: of these norms.
    """

    cos: torch.Tensor | None
    sin: torch.Tensor | None
    q_norm: torch.Tensor | None = None
    k_norm: torch.Tensor | None = None
    eps: float = 0.0
