"""Adapters in device slots, and their application to a batch that mixes them with base rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from lorax_serve.checkpoint.spec import Site
from lorax_serve.checkpoint.weights import Norm
from lorax_serve.core import BASE
from lorax_serve.model.adapters.folded import FoldedAdapter
from lorax_serve.model.adapters.lora_ops import (
    StackedLoRA,
    add_lora_masked,
    add_lora_segment,
    change_embeddings,
    scale_and_shift,
)

__all__ = ["BeyondLoRA", "LoRABatch", "MultiLoRA", "rows_by_slot"]


class BeyondLoRA:
    """What a step's adapters do that is not at a linear.

    Attributes:
        others: rows, int64 ``[n]``, of each adapter that does more than LoRA.
    """

    __slots__ = ()
    others: Sequence[tuple[torch.Tensor, FoldedAdapter]]

    def embed(self, token_ids: torch.Tensor, x: torch.Tensor) -> None:
        """Replace the embeddings x ``[T, hidden]`` of the rows whose adapter changes them."""
        for rows, adapter in self.others:
            if adapter.embedding is not None:
                x[rows] = change_embeddings(x[rows], token_ids[rows], adapter.embedding)

    def norm(
        self,
        site: int,
        x: torch.Tensor,
        h: torch.Tensor,
        normed: Callable[[torch.Tensor, Norm], torch.Tensor],
    ) -> None:
        """Replace the rows of h, the norm of x before ``site``, whose adapter has its own."""
        for rows, adapter in self.others:
            lora = adapter.sites[site]
            if lora is not None and lora.norm is not None:
                h[rows] = normed(x[rows], lora.norm)


@dataclass(slots=True)
class LoRABatch(BeyondLoRA):
    """How LoRA applies to one step's rows: the first rows decode, the others are prompts.

    Attributes:
        num_decodes: rows that get the stacked, masked product.
        stacked: one entry a site, None where no decoding row's adapter has LoRA.
        foreign: one entry a site, see ``add_lora_masked``.
        segments: first row, end row and adapter of each prompt that has one.
        others: rows, int64 ``[n]``, of each adapter that does more than LoRA.
    """

    num_decodes: int
    stacked: Sequence[StackedLoRA | None]
    foreign: Sequence[torch.Tensor | None]
    segments: Sequence[tuple[int, int, FoldedAdapter]]
    others: Sequence[tuple[torch.Tensor, FoldedAdapter]]

    def add(self, site: int, x: torch.Tensor, y: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Do what every row's adapter does at ``site``.

        Args:
            site: its number.
            x: ``[T, in]``.
            y: ``[T, out]``, the base's result, changed in place.
            bias: ``[out]``, of the base, in y already.
        """
        if self.stacked and (stacked := self.stacked[site]) is not None:
            n = self.num_decodes
            add_lora_masked(x[:n], y[:n], stacked, self.foreign[site])
        for start, end, adapter in self.segments:
            if (lora := adapter.sites[site]) is not None:
                add_lora_segment(x[start:end], y[start:end], lora)
        for rows, adapter in self.others:
            if (lora := adapter.sites[site]) is not None and not lora.plain:
                y[rows] = scale_and_shift(y[rows], lora, bias)


def rows_by_slot(
    decode_slots: Sequence[int], prompts: Sequence[tuple[int, int, int]]
) -> dict[int, list[int]]:
    """Each adapter slot's rows, ascending; those of the base left out. See ``MultiLoRA.batch``."""
    found: dict[int, list[int]] = {}
    for row, slot in enumerate(decode_slots):
        found.setdefault(slot, []).append(row)
    for start, end, slot in prompts:
        if start < end:
            found.setdefault(slot, []).extend(range(start, end))
    found.pop(BASE, None)
    return found


class MultiLoRA:
    """The device's adapter slots.

    Args:
        sites: the model's, the output's last.
        device: where the slots are.
    """

    def __init__(self, sites: Sequence[Site], device: torch.device) -> None:
        self._layer_sites = sites[:-1]
        self._device = device
        self._slots: dict[int, FoldedAdapter] = {}
        self._stack_of: tuple[int, ...] = ()
        self._stacked: list[StackedLoRA | None] = []
        self._rows_of: tuple[int, ...] = ()
        self._foreign: list[torch.Tensor | None] = []

    def prepare(self, adapter: FoldedAdapter) -> FoldedAdapter:
        """The form that ``put`` takes and the host keeps: here, the adapter itself."""
        return adapter

    def put(self, slot: int, adapter: FoldedAdapter) -> None:
        """Bring an adapter into a slot, over what was there."""
        self.clear(slot)
        self._slots[slot] = adapter.to(self._device)

    def clear(self, slot: int) -> None:
        """Empty a slot and forget everything made from it."""
        self._slots.pop(slot, None)
        if slot in self._stack_of:
            self._stack_of, self._stacked = (), []
            self._rows_of, self._foreign = (), []

    def batch(
        self, decode_slots: Sequence[int], prompts: Sequence[tuple[int, int, int]]
    ) -> LoRABatch | None:
        """Prepare a step; None if it has only base rows.

        Args:
            decode_slots: the adapter slot of each decoding row, ``BASE`` for none.
            prompts: first row, end row and adapter slot of each prompt chunk.
        """
        segments = [
            (start, end, self._slots[slot])
            for start, end, slot in prompts
            if slot != BASE and start < end
        ]
        active = tuple(sorted({slot for slot in decode_slots if slot != BASE}))
        if not active and not segments:
            return None
        others = [
            (torch.tensor(rows, device=self._device), self._slots[slot])
            for slot, rows in rows_by_slot(decode_slots, prompts).items()
            if not self._slots[slot].plain
        ]
        if not active:
            return LoRABatch(0, (), (), segments, others)
        # Stacking copies the active adapters once; steps with the same ones share the copy.
        if active != self._stack_of:
            self._stacked = [
                StackedLoRA.build(
                    [self._slots[slot].sites[index] for slot in active], site.out_features
                )
                for index, site in enumerate(self._layer_sites)
            ]
            self._stack_of, self._rows_of = active, ()
        rows = tuple(decode_slots)
        if rows != self._rows_of:
            self._foreign = self._foreign_entries(rows, active)
            self._rows_of = rows
        return LoRABatch(len(rows), self._stacked, self._foreign, segments, others)

    def output_changes(self, slots: Sequence[int]) -> list[tuple[list[int], FoldedAdapter]]:
        """The rows of each adapter that changes the output, given the adapter slots of all rows."""
        return [
            (rows, self._slots[slot])
            for slot, rows in rows_by_slot(slots, ()).items()
            if self._slots[slot].changes_output
        ]

    def _foreign_entries(
        self, rows: tuple[int, ...], active: tuple[int, ...]
    ) -> list[torch.Tensor | None]:
        if len(active) == 1 and BASE not in rows:
            return [None] * len(self._layer_sites)
        row_slots = torch.tensor(rows)[:, None]
        # Most sites have the same ranks, so they share one mask.
        masks: dict[tuple[int, ...], torch.Tensor] = {}
        for stacked in self._stacked:
            if stacked is not None and stacked.ranks not in masks:
                owner = torch.tensor(active).repeat_interleave(torch.tensor(stacked.ranks))
                masks[stacked.ranks] = (row_slots != owner).to(self._device)
        return [None if stacked is None else masks[stacked.ranks] for stacked in self._stacked]
