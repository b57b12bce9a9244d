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

from lorax_serve.checkpoint.spec import Site
from lorax_serve.checkpoint.weights import Norm
from lorax_serve.kernels.packing import (
    PANEL,
    Arena,
    PackedLinear,
    pack_panels,
    pad_panels,
    panel_order,
    step_of,
)
from lorax_serve.kernels.structs import LoRAArgs, LoRASiteArgs, SegmentArgs
from lorax_serve.model.adapters.folded import EmbeddingChange, FoldedAdapter, SiteLoRA, TokenTable
from lorax_serve.model.adapters.lora_ops import change_embeddings
from lorax_serve.model.adapters.multi_lora import rows_by_slot

__all__ = ["PackedAdapter", "PackedBatch", "PackedLoRA"]


@dataclass(frozen=True, slots=True)
class PackedAdapter:
    """All of an adapter's LoRA in one piece of memory, in the order in which a step reads it.

    Attributes:
        weights: per site A ``[ranks, in]``, then each slice's B in panels.
        args: the array of ``LoRASiteArgs`` that points into it, one entry a site.
        h_width: columns that ``x @ A.T`` takes at the widest site.
        vectors: gains, shifts and norms, which ``args`` points to.
        embedding: what it does to embeddings, or None.
        head: the output's weight in place of the base's, or None.
        tokens: single rows of it in place of the base's, or None.
        output_norm: in place of the norm before the output, or None.
        changes_output: whether one of these, or LoRA, changes the output.
    """

    weights: torch.Tensor
    args: Any
    h_width: int
    vectors: tuple[torch.Tensor, ...]
    embedding: EmbeddingChange | None
    head: PackedLinear | None
    tokens: TokenTable | None
    output_norm: Norm | None
    changes_output: bool

    @property
    def nbytes(self) -> int:
        """Bytes of everything."""
        tensors = list(self.vectors)
        if self.embedding is not None:
            tensors += self.embedding.tensors
        if self.tokens is not None:
            tensors.append(self.tokens.rows)
        head = 0 if self.head is None else self.head.nbytes
        return self.weights.nbytes + head + sum(tensor.nbytes for tensor in tensors)

    @classmethod
    def pack(
        cls,
        adapter: FoldedAdapter,
        sites: Sequence[Site],
        dtype: torch.dtype,
        base_head: PackedLinear,
    ) -> PackedAdapter:
        """Copy an adapter into the kernels' form.

        Args:
            adapter: it.
            sites: the model's, the output's last.
            dtype: of the weights.
            base_head: the base's output, whose norm an adapter's own output has too.
        """
        present = [site for site in adapter.sites if site is not None]
        weights = Arena(0).empty(sum(_numel(site) for site in present), dtype)
        args = (LoRASiteArgs * len(sites))()
        vectors: list[torch.Tensor] = []
        used, h_width = 0, 0
        for index, (lora, site) in enumerate(zip(adapter.sites, sites, strict=True)):
            if lora is not None:
                piece = weights[used : used + _numel(lora)]
                h_width = max(h_width, _pack_site(lora, site, piece, args[index]))
                vectors += _point_to_vectors(lora, site, args[index])
                used += len(piece)
        output = adapter.output
        head = None
        if output is not None and output.weight is not None:
            head = base_head.with_weight(output.weight)
        return cls(
            weights,
            args,
            h_width,
            tuple(vectors),
            adapter.embedding,
            head,
            None if output is None else output.tokens,
            None if adapter.sites[-1] is None else adapter.sites[-1].norm,
            adapter.changes_output,
        )


def _filled(rank: int, dtype: torch.dtype) -> int:
    """A rank rounded up to whole steps."""
    step = step_of(dtype)
    return -(-rank // step) * step


def _numel(lora: SiteLoRA) -> int:
    dtype = lora.a.dtype
    return lora.a.numel() + sum(
        _filled(len(b), dtype) * pad_panels(b.shape[1]) for _, _, b in lora.parts
    )


def _pack_site(lora: SiteLoRA, site: Site, piece: torch.Tensor, args: LoRASiteArgs) -> int:
    """Fill ``piece`` and ``args``; returns the columns of h."""
    size = lora.a.numel()
    piece[:size] = lora.a.flatten()
    args.a, args.num_parts = piece.data_ptr(), len(lora.parts)
    h_column = 0
    for part, (rows, columns, b) in zip(args.parts, lora.parts, strict=False):
        rank, width = b.shape
        filled = _filled(rank, b.dtype)
        transposed = b.new_zeros(pad_panels(width), filled)
        transposed[:width, :rank] = b.T
        panels = pack_panels(transposed)
        packed = piece[size : size + panels.numel()]
        packed.view(panels.shape).copy_(panels)
        size += panels.numel()
        part.b, part.ranks, part.first_rank = packed.data_ptr(), rank, rows.start
        part.h_column, part.panels = h_column, len(panels)
        if site.gated:  # see linear.h: the panels of gate and up alternate
            part.first_panel, part.panel_step = int(columns.start > 0), 2
        else:
            part.first_panel, part.panel_step = columns.start // PANEL, 1
        h_column += filled
    return h_column


def _point_to_vectors(lora: SiteLoRA, site: Site, args: LoRASiteArgs) -> list[torch.Tensor]:
    """Set gain, shift and norm in ``args``; returns what must stay alive for it."""
    owned = []
    if lora.gain is not None:
        owned.append(panel_order(lora.gain, gated=site.gated, fill=1.0))
        args.gain = owned[-1].data_ptr()
    if lora.shift is not None:
        owned.append(panel_order(lora.shift, gated=site.gated))
        args.shift = owned[-1].data_ptr()
    if lora.norm is not None:
        owned.append(lora.norm.weight.contiguous())
        args.norm = owned[-1].data_ptr()
    return owned


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """How adapters apply to some rows.

    Attributes:
        args: for the kernels.
        embeddings: rows, int64 ``[n]``, and what their adapter does to embeddings.
        owned: what ``args`` points to.
    """

    args: LoRAArgs
    embeddings: Sequence[tuple[torch.Tensor, EmbeddingChange]]
    owned: tuple[object, ...]

    def embed(self, token_ids: torch.Tensor, x: torch.Tensor) -> None:
        """See ``LoRABatch.embed``."""
        for rows, change in self.embeddings:
            x[rows] = change_embeddings(x[rows], token_ids[rows], change)

    @classmethod
    def build(cls, parts: Sequence[tuple[Sequence[int], PackedAdapter]], total: int) -> PackedBatch:
        """Of the ascending rows of each adapter, among ``total`` rows."""
        adapters = [adapter for _, adapter in parts]
        rows = torch.tensor([row for own, _ in parts for row in own], dtype=torch.int32)
        segments = (SegmentArgs * len(adapters))()
        at = rows.data_ptr()
        for segment, (own, adapter) in zip(segments, parts, strict=True):
            segment.sites = ctypes.addressof(adapter.args)
            segment.rows, segment.num_rows = at, len(own)
            at += len(own) * rows.itemsize
        width = max(adapter.h_width for adapter in adapters)
        h = torch.empty(total, width, dtype=adapters[0].weights.dtype)
        embeddings = [
            (torch.tensor(own), adapter.embedding)
            for own, adapter in parts
            if adapter.embedding is not None
        ]
        args = LoRAArgs(segments, len(adapters), width, h.data_ptr())
        return cls(args, embeddings, (segments, rows, h, adapters))


class PackedLoRA:
    """The adapter slots of a compiled decoder.

    Args:
        sites: the model's, the output's last.
        dtype: of the weights.
        head: the base's output.
    """

    def __init__(self, sites: Sequence[Site], dtype: torch.dtype, head: PackedLinear) -> None:
        self._sites = sites
        self._dtype = dtype
        self._head = head
        self._slots: dict[int, PackedAdapter] = {}
        self._key: tuple[object, ...] = ()
        self._batch: PackedBatch | None = None

    def prepare(self, adapter: FoldedAdapter) -> PackedAdapter:
        """The form that ``put`` takes and the host keeps."""
        return PackedAdapter.pack(adapter, self._sites, self._dtype, self._head)

    def put(self, slot: int, adapter: PackedAdapter) -> None:
        """Bring an adapter into a slot, over what was there; nothing is copied."""
        self._slots[slot] = adapter
        self._key = ()

    def clear(self, slot: int) -> None:
        """Empty a slot and forget everything made from it."""
        self._slots.pop(slot, None)
        self._key, self._batch = (), None

    def batch(
        self, decode_slots: Sequence[int], prompts: Sequence[tuple[int, int, int]]
    ) -> PackedBatch | None:
        """Prepare a step; see ``MultiLoRA.batch``."""
        key = (tuple(decode_slots), tuple(prompts))
        if key != self._key:
            rows_of = rows_by_slot(decode_slots, prompts)
            total = max(prompt[1] for prompt in prompts) if prompts else len(decode_slots)
            parts = [(rows, self._slots[slot]) for slot, rows in rows_of.items()]
            self._batch = PackedBatch.build(parts, total) if parts else None
            self._key = key
        return self._batch

    def output_changes(self, slots: Sequence[int]) -> list[tuple[list[int], PackedAdapter]]:
        """See ``MultiLoRA.output_changes``."""
        return [
            (rows, self._slots[slot])
            for slot, rows in rows_by_slot(slots, ()).items()
            if self._slots[slot].changes_output
        ]
