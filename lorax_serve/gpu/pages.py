"""Where the paged KV cache keeps one layer's keys and values, as the kernels see it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["PAGE", "LayerPages", "Rope", "pages_of"]

PAGE = 32
"""Positions of a page: ``engine.kv_rows`` counts memory in blocks of as many."""


def pages_of(positions: int) -> int:
    """Pages that hold so many positions."""
    return -(-positions // PAGE)


@dataclass(frozen=True, slots=True)
class LayerPages:
    """One layer of the cache. Position p of KV slot s is at offset ``p % PAGE`` of page
    ``table[s, p // PAGE]``.

    Attributes:
        keys, values: ``[pages, kv_heads, PAGE, head_dim]``; each page is in one piece.
        table: int32 ``[slots, max_pages]``, rows contiguous, shared by all layers; what a slot does
            not have is -1. Its width bounds what a kernel is launched for: a view of the first
            pages will do, if no row of the step has more.
    """

    keys: torch.Tensor
    values: torch.Tensor
    table: torch.Tensor

    def gather(self, slot: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of a slot's first ``length`` keys and values, each
        ``[kv_heads, length, head_dim]``; what lies after them in the last page is not in it."""
        pages = self.table[slot, : pages_of(length)]
        keys, values = (
            # Selected before the heads come first: on a CPU, torch would transpose all pages.
            cache.index_select(0, pages).transpose(0, 1).flatten(1, 2)[:, :length]
            for cache in (self.keys, self.values)
        )
        return keys, values


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
