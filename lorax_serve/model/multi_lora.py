"""Adapters in device slots, and their application to a batch that mixes them with base rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lorax_serve.adapter import LoRAWeights
from lorax_serve.adapter.weights import first_not_finite
from lorax_serve.core import BASE
from lorax_serve.errors import AdapterRejected, RejectReason
from lorax_serve.model.lora_ops import (
    SiteLoRA,
    StackedLoRA,
    add_lora_masked,
    add_lora_segment,
)
from lorax_serve.model.spec import Site

__all__ = ["AdapterSites", "LoRABatch", "MultiLoRA", "fold"]


@dataclass(frozen=True, slots=True)
class AdapterSites:
    """An adapter as the torch ops read it: one entry a site, None where it has no LoRA."""

    sites: tuple[SiteLoRA | None, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all A and B."""
        return sum(site.nbytes for site in self.sites if site is not None)


def fold(weights: LoRAWeights, sites: Sequence[Site], dtype: torch.dtype) -> AdapterSites:
    """Bring an adapter into the decoder's form: fused by site, scale in B, in the compute type.

    The scale is folded in float32, before rounding to ``dtype``.

    Raises:
        AdapterRejected: it has LoRA on a module that is none of the sites (lm_head), or B
            overflows ``dtype`` once scaled.
    """
    known = {part.path for site in sites for part in site.slices}
    for path in weights.pairs:
        if path not in known:
            raise AdapterRejected(
                RejectReason.UNSUPPORTED, f"LoRA on {path} is not applied yet; retrain without it"
            )
    folded = tuple(_fold_site(weights, site, dtype) for site in sites)
    used = [site for site in folded if site is not None]
    bad = first_not_finite([t for site in used for t in (site.a, *(b for _, _, b in site.parts))])
    if bad is not None:
        raise AdapterRejected(
            RejectReason.NOT_FINITE,
            f"the weights overflow {dtype} once B is scaled by "
            f"{max(pair.scale for pair in weights.pairs.values()):g} (lora_alpha, r)",
        )
    return AdapterSites(folded)


def _fold_site(weights: LoRAWeights, site: Site, dtype: torch.dtype) -> SiteLoRA | None:
    blocks, parts, first = [], [], 0
    for part in site.slices:
        pair = weights.pairs.get(part.path)
        if pair is None:
            continue
        b = (pair.b.T.float() * pair.scale).to(dtype, memory_format=torch.contiguous_format)
        blocks.append(pair.a)
        rows = slice(first, first + pair.rank)
        parts.append((rows, slice(part.start, part.start + part.length), b))
        first += pair.rank
    return SiteLoRA(torch.cat(blocks).to(dtype), tuple(parts)) if blocks else None


@dataclass(slots=True)
class LoRABatch:
    """How LoRA applies to one step's rows: the first rows decode, the others are prompts.

    Attributes:
        num_decodes: rows that get the stacked, masked product.
        stacked: one entry a site, None where no decoding row's adapter has LoRA.
        foreign: one entry a site, see ``add_lora_masked``.
        segments: first row, end row and adapter of each prompt that has one.
    """

    num_decodes: int
    stacked: Sequence[StackedLoRA | None]
    foreign: Sequence[torch.Tensor | None]
    segments: Sequence[tuple[int, int, AdapterSites]]

    def add(self, site: int, x: torch.Tensor, y: torch.Tensor) -> None:
        """Add every row's LoRA at ``site``: x ``[T, in]``, y ``[T, out]`` changed in place."""
        if self.stacked and (stacked := self.stacked[site]) is not None:
            n = self.num_decodes
            add_lora_masked(x[:n], y[:n], stacked, self.foreign[site])
        for start, end, adapter in self.segments:
            if (lora := adapter.sites[site]) is not None:
                add_lora_segment(x[start:end], y[start:end], lora)


class MultiLoRA:
    """The device's adapter slots."""

    def __init__(self, sites: Sequence[Site], device: torch.device) -> None:
        self._sites = sites
        self._device = device
        self._slots: dict[int, AdapterSites] = {}
        self._stack_of: tuple[int, ...] = ()
        self._stacked: list[StackedLoRA | None] = []
        self._rows_of: tuple[int, ...] = ()
        self._foreign: list[torch.Tensor | None] = []

    def prepare(self, adapter: AdapterSites) -> AdapterSites:
        """The form that ``put`` takes and the host keeps: here, the adapter itself."""
        return adapter

    def put(self, slot: int, adapter: AdapterSites) -> None:
        """Bring an adapter into a slot, over what was there."""
        self.clear(slot)
        self._slots[slot] = AdapterSites(
            tuple(None if site is None else site.to(self._device) for site in adapter.sites)
        )

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
        segments = [(start, end, self._slots[slot]) for start, end, slot in prompts if slot != BASE]
        active = tuple(sorted({slot for slot in decode_slots if slot != BASE}))
        if not active and not segments:
            return None
        if not active:
            return LoRABatch(0, (), (), segments)
        # Stacking copies the active adapters once; steps with the same ones share the copy.
        if active != self._stack_of:
            self._stacked = [
                StackedLoRA.build(
                    [self._slots[slot].sites[index] for slot in active], site.out_features
                )
                for index, site in enumerate(self._sites)
            ]
            self._stack_of, self._rows_of = active, ()
        rows = tuple(decode_slots)
        if rows != self._rows_of:
            self._foreign = self._foreign_entries(rows, active)
            self._rows_of = rows
        return LoRABatch(len(rows), self._stacked, self._foreign, segments)

    def _foreign_entries(
        self, rows: tuple[int, ...], active: tuple[int, ...]
    ) -> list[torch.Tensor | None]:
        if len(active) == 1 and BASE not in rows:
            return [None] * len(self._sites)
        row_slots = torch.tensor(rows)[:, None]
        # Most sites have the same ranks, so they share one mask.
        masks: dict[tuple[int, ...], torch.Tensor] = {}
        for stacked in self._stacked:
            if stacked is not None and stacked.ranks not in masks:
                owner = torch.tensor(active).repeat_interleave(torch.tensor(stacked.ranks))
                masks[stacked.ranks] = (row_slots != owner).to(self._device)
        return [None if stacked is None else masks[stacked.ranks] for stacked in self._stacked]
