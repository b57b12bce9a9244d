"""Adapters in the form of the compiled kernels, and their rows in a batch.

Nothing is stacked or copied when the adapters of a batch change: the kernels are given each one's
address, its true ranks, and the rows that it is for.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lorax_serve.core import BASE
from lorax_serve.kernels.cpu import (
    PANEL,
    Arena,
    LoRAArgs,
    LoRASiteArgs,
    SegmentArgs,
    pack_panels,
    step_of,
)
from lorax_serve.model.lora_ops import SiteLoRA
from lorax_serve.model.multi_lora import AdapterSites
from lorax_serve.model.spec import Site

__all__ = ["PackedAdapter", "PackedLoRA"]


@dataclass(frozen=True, slots=True)
class PackedAdapter:
    """All of an adapter's weights in one piece of memory, in the order in which a step reads them.

    Attributes:
        weights: per site A ``[ranks, in]``, then each slice's B in panels.
        args: the array of ``LoRASiteArgs`` that points into it, one entry a site.
        h_width: columns that ``x @ A.T`` takes at the widest site.
    """

    weights: torch.Tensor
    args: Any
    h_width: int

    @property
    def nbytes(self) -> int:
        """Bytes of all A and B."""
        return self.weights.nbytes

    @classmethod
    def pack(cls, adapter: AdapterSites, sites: Sequence[Site]) -> PackedAdapter:
        """Copy an adapter into the kernels' form."""
        present = [site for site in adapter.sites if site is not None]
        dtype = present[0].a.dtype
        weights = Arena(0).empty(sum(_numel(site) for site in present), dtype)
        args = (LoRASiteArgs * len(sites))()
        used, h_width = 0, 0
        for index, (lora, site) in enumerate(zip(adapter.sites, sites, strict=True)):
            if lora is not None:
                piece = weights[used : used + _numel(lora)]
                h_width = max(h_width, _pack_site(lora, site, piece, args[index]))
                used += len(piece)
        return cls(weights, args, h_width)


def _filled(rank: int, dtype: torch.dtype) -> int:
    """A rank rounded up to whole steps."""
    step = step_of(dtype)
    return -(-rank // step) * step


def _numel(lora: SiteLoRA) -> int:
    dtype = lora.a.dtype
    return lora.a.numel() + sum(_filled(len(b), dtype) * b.shape[1] for _, _, b in lora.parts)


def _pack_site(lora: SiteLoRA, site: Site, piece: torch.Tensor, args: LoRASiteArgs) -> int:
    """Fill ``piece`` and ``args``; returns the columns of h."""
    size = lora.a.numel()
    piece[:size] = lora.a.flatten()
    args.a, args.num_parts = piece.data_ptr(), len(lora.parts)
    h_column = 0
    for part, (rows, columns, b) in zip(args.parts, lora.parts, strict=False):
        rank, width = b.shape
        filled = _filled(rank, b.dtype)
        transposed = b.new_zeros(width, filled)
        transposed[:, :rank] = b.T
        panels = pack_panels(transposed)
        packed = piece[size : size + panels.numel()]
        packed.view(panels.shape).copy_(panels)
        size += panels.numel()
        part.b, part.ranks, part.first_rank = packed.data_ptr(), rank, rows.start
        part.h_column, part.panels = h_column, width // PANEL
        if site.gated:  # see linear.h: the panels of gate and up alternate
            part.first_panel, part.panel_step = int(columns.start > 0), 2
        else:
            part.first_panel, part.panel_step = columns.start // PANEL, 1
        h_column += filled
    return h_column


class PackedLoRA:
    """The adapter slots of a compiled decoder."""

    def __init__(self, sites: Sequence[Site], dtype: torch.dtype) -> None:
        self._sites = sites
        self._dtype = dtype
        self._slots: dict[int, PackedAdapter] = {}
        self._key: tuple[object, ...] = ()
        self._batch: LoRAArgs | None = None
        self._owned: tuple[object, ...] = ()

    def prepare(self, adapter: AdapterSites) -> PackedAdapter:
        """The form that ``put`` takes and the host keeps."""
        return PackedAdapter.pack(adapter, self._sites)

    def put(self, slot: int, adapter: PackedAdapter) -> None:
        """Bring an adapter into a slot, over what was there; nothing is copied."""
        self._slots[slot] = adapter
        self._key = ()

    def clear(self, slot: int) -> None:
        """Empty a slot and forget everything made from it."""
        self._slots.pop(slot, None)
        self._key, self._batch, self._owned = (), None, ()

    def batch(
        self, decode_slots: Sequence[int], prompts: Sequence[tuple[int, int, int]]
    ) -> LoRAArgs | None:
        """Prepare a step; see ``MultiLoRA.batch``. Valid until the next call."""
        key = (tuple(decode_slots), tuple(prompts))
        if key != self._key:
            self._batch = self._build(decode_slots, prompts)
            self._key = key
        return self._batch

    def _build(
        self, decode_slots: Sequence[int], prompts: Sequence[tuple[int, int, int]]
    ) -> LoRAArgs | None:
        rows_of: dict[int, list[int]] = {}
        for row, slot in enumerate(decode_slots):
            rows_of.setdefault(slot, []).append(row)
        for start, end, slot in prompts:
            rows_of.setdefault(slot, []).extend(range(start, end))
        rows_of.pop(BASE, None)
        if not rows_of:
            self._owned = ()
            return None
        adapters = [self._slots[slot] for slot in rows_of]
        rows = torch.tensor([row for rows in rows_of.values() for row in rows], dtype=torch.int32)
        segments = (SegmentArgs * len(adapters))()
        at = rows.data_ptr()
        for segment, adapter, own in zip(segments, adapters, rows_of.values(), strict=True):
            segment.sites = ctypes.addressof(adapter.args)
            segment.rows, segment.num_rows = at, len(own)
            at += len(own) * rows.itemsize
        width = max(adapter.h_width for adapter in adapters)
        end = max(prompt[1] for prompt in prompts) if prompts else len(decode_slots)
        h = torch.empty(end, width, dtype=self._dtype)
        self._owned = (segments, rows, h, adapters)
        return LoRAArgs(segments, len(adapters), width, h.data_ptr())
