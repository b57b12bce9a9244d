"""Adapter slots whose weights are in an arena, applied by ``gpu.ops``'s LoRA calls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from lorax_serve.checkpoint.spec import Site
from lorax_serve.core import BASE
from lorax_serve.gpu.lora import LoRAPlan, SiteShape
from lorax_serve.gpu.ops import LoRAExpand, LoRAShrink
from lorax_serve.model.adapters.arena import Arena, ArenaAdapter
from lorax_serve.model.adapters.folded import FoldedAdapter
from lorax_serve.model.adapters.multi_lora import BeyondLoRA, rows_by_slot
from lorax_serve.model.copies import Copied, to_device

__all__ = ["DECODE_CHUNK", "PROMPT_CHUNK", "ArenaBatch", "ArenaLoRA", "LoRAOps", "rank_room"]

DECODE_CHUNK = 16
PROMPT_CHUNK = 64
"""Rows of a plan's chunks. Always the same ones: a row's bits depend on the chunk's size."""


class LoRAOps(Protocol):
    """The calls that are used of ``gpu.ops.Ops``."""

    @property
    def lora_shrink(self) -> LoRAShrink:
        """See there."""

    @property
    def lora_expand(self) -> LoRAExpand:
        """See there."""


@dataclass(frozen=True, slots=True)
class _Planned:
    """Rows ``[first, end)`` of a step.

    Attributes:
        plan: counts rows from ``first``.
        sites: the numbers of those where any of its adapters does something.
    """

    first: int
    end: int
    plan: LoRAPlan
    sites: Collection[int]


@dataclass(frozen=True, slots=True)
class ArenaBatch(BeyondLoRA):
    """How adapters apply to one step's rows; calls as ``multi_lora.LoRABatch``'s.

    Attributes:
        ops: of one kind.
        arena: all adapters' weights.
        shapes: of the layers' sites.
        planned: the decoding rows, and the prompts'.
        others: rows, int64 ``[n]``, of each adapter with norms or an embedding of its own, and
            these.
    """

    ops: LoRAOps
    arena: torch.Tensor
    shapes: Sequence[SiteShape]
    planned: Sequence[_Planned]
    others: Sequence[tuple[torch.Tensor, FoldedAdapter]] = ()

    @property
    def plain(self) -> bool:
        """Whether ``add`` is all there is to do in the layers; the output may still change."""
        return not self.others

    def add(self, site: int, x: torch.Tensor, y: torch.Tensor, bias: torch.Tensor | None) -> None:
        """See ``LoRABatch.add``."""
        for part in self.planned:
            if site in part.sites:
                shape, rows = self.shapes[site], slice(part.first, part.end)
                h = self.ops.lora_shrink(x[rows], self.arena, part.plan, shape)
                self.ops.lora_expand(h, y[rows], self.arena, part.plan, shape, bias)


@dataclass(frozen=True, slots=True)
class _Held:
    """An adapter in a slot; its blob, if it has one, is in the arena.

    Attributes:
        sites, max_rank: see ``ArenaAdapter``.
        rest: of ``ArenaAdapter``, on the device.
    """

    sites: frozenset[int]
    max_rank: int
    rest: FoldedAdapter | None

    @property
    def plain(self) -> bool:
        """Whether the kernels do all that it does in the layers."""
        rest = self.rest
        return rest is None or (rest.embedding is None and not any(rest.sites[:-1]))


class ArenaLoRA:
    """The device's adapter slots.

    Args:
        sites: the model's, the output's last.
        dtype: of the weights.
        device: where the slots are.
        ops: computes LoRA; ``gpu.ops.Ops`` is one.
        capacity: of the arena, in bytes; see ``Arena``.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        dtype: torch.dtype,
        device: torch.device,
        ops: LoRAOps,
        capacity: int,
    ) -> None:
        self._sites = sites
        self._shapes = [
            SiteShape(index, site.in_features, tuple(part.length for part in site.slices))
            for index, site in enumerate(sites[:-1])
        ]
        self._dtype = dtype
        self._device = device
        self._ops = ops
        self._arena = Arena(capacity, dtype, device)
        self._slots: dict[int, _Held] = {}
        self._copied: dict[int, Copied] = {}
        """Of slots that no step has used yet."""
        self._key: tuple[object, ...] | None = None
        self._batch: ArenaBatch | None = None

    def prepare(self, adapter: FoldedAdapter) -> ArenaAdapter:
        """The form that ``put`` takes and the host keeps; thread-safe.

        Raises:
            Overloaded: it is too large for that form.
        """
        pinned = self._device.type == "cuda"
        return ArenaAdapter.pack(adapter, self._sites, self._dtype, pinned=pinned)

    def put(self, slot: int, adapter: ArenaAdapter) -> None:
        """Bring an adapter into a slot, over what was there.

        Raises:
            Overloaded: there is no room for it in the arena; the slot is empty then.
        """
        self.clear(slot)
        if len(adapter.blob):
            self._copied[slot] = self._arena.load(slot, adapter.blob)
        rest = None if adapter.rest is None else adapter.rest.to(self._device)
        self._slots[slot] = _Held(adapter.sites, adapter.max_rank, rest)

    def clear(self, slot: int) -> None:
        """Empty a slot and forget everything made from it."""
        self._arena.free(slot)
        self._slots.pop(slot, None)
        self._copied.pop(slot, None)
        # Of other slots too: a load may move them.
        self._key, self._batch = None, None

    def plain(self, slots: Sequence[int]) -> bool:
        """Whether the kernels do all that these rows' adapters do in the layers."""
        return all(self._slots[slot].plain for slot in set(slots) if slot != BASE)

    def max_rank(self, slots: Sequence[int]) -> int:
        """The largest rank among these rows' adapters; 0 if there is none."""
        return max((self._slots[slot].max_rank for slot in set(slots) if slot != BASE), default=0)

    def batch(
        self, decode_slots: Sequence[int], prompts: Sequence[tuple[int, int, int]]
    ) -> ArenaBatch | None:
        """Prepare a step; see ``MultiLoRA.batch``."""
        key = (tuple(decode_slots), tuple(prompts))
        if key != self._key:
            self._batch = self._build(decode_slots, prompts)
            self._key = key
        return self._batch

    def static_batch(
        self, rows: int, chunks: int, max_rank: int, chunk: int = DECODE_CHUNK
    ) -> ArenaBatch:
        """A step of decoding rows alone whose plan ``fill`` changes in place, for a CUDA graph.

        Args:
            rows: of the step.
            chunks: of the plan: ``rows`` are always enough.
            max_rank: of the adapters that it can have.
            chunk: rows of each; ``fill`` takes the usual number alone.
        """
        plan = LoRAPlan(
            torch.full((chunks,), -1, dtype=torch.int64, device=self._device),
            torch.full((chunks, chunk), -1, dtype=torch.int32, device=self._device),
            chunk,
            rank_room(max_rank),
        )
        everywhere = range(len(self._shapes))
        planned = [_Planned(0, rows, plan, everywhere)]
        return ArenaBatch(self._ops, self._arena.weights, self._shapes, planned)

    def fill(self, batch: ArenaBatch, decode_slots: Sequence[int]) -> None:
        """Give the rows of a ``static_batch`` their adapters, which must be ``plain``.

        Args:
            batch: it has chunks enough for ``plan_arrays`` and at least ``max_rank``.
            decode_slots: one entry a row; rows beyond them are the base model's.
        """
        part = batch.planned[0]
        blobs, rows = self.plan_arrays(decode_slots)
        assert self.max_rank(decode_slots) <= part.plan.max_rank
        spare = len(part.plan.blobs) - len(blobs)
        assert spare >= 0
        new = self._tensors(blobs + [-1] * spare, rows + [[-1] * DECODE_CHUNK] * spare)
        part.plan.blobs.copy_(new[0])
        part.plan.rows.copy_(new[1])

    def chunks_needed(self, decode_slots: Sequence[int]) -> int:
        """How many chunks ``plan_arrays`` makes."""
        counts = Counter(slot for slot in decode_slots if slot != BASE and self._slots[slot].sites)
        return sum(-(-count // DECODE_CHUNK) for count in counts.values())

    def plan_arrays(self, decode_slots: Sequence[int]) -> tuple[list[int], list[list[int]]]:
        """``LoRAPlan``'s blobs and rows for decoding rows, with as many chunks as they need.

        What is queued on the current stream from here on comes after the copies of their blobs.
        """
        rows_of = rows_by_slot(decode_slots, ())
        return self._chunks(rows_of, 0, DECODE_CHUNK)

    def output_changes(self, slots: Sequence[int]) -> list[tuple[list[int], FoldedAdapter]]:
        """See ``MultiLoRA.output_changes``; the adapters have what is not in the arena alone."""
        return [
            (rows, rest)
            for slot, rows in rows_by_slot(slots, ()).items()
            if (rest := self._slots[slot].rest) is not None and rest.changes_output
        ]

    def _build(
        self, decode_slots: Sequence[int], prompts: Sequence[tuple[int, int, int]]
    ) -> ArenaBatch | None:
        count = len(decode_slots)
        end = max((end for _, end, _ in prompts), default=count)
        parts = [
            (0, count, DECODE_CHUNK, rows_by_slot(decode_slots, ())),
            (count, end, PROMPT_CHUNK, rows_by_slot((), prompts)),
        ]
        if not any(rows_of for *_, rows_of in parts):
            return None
        planned, others = [], []
        for first, end, chunk, rows_of in parts:
            blobs, rows = self._chunks(rows_of, first, chunk)
            if blobs:
                max_rank = rank_room(self.max_rank(list(rows_of)))
                plan = LoRAPlan(*self._tensors(blobs, rows), chunk, max_rank)
                sites = frozenset().union(*(self._slots[slot].sites for slot in rows_of))
                planned.append(_Planned(first, end, plan, sites))
            for slot, own in rows_of.items():
                held = self._slots[slot]
                if held.rest is not None and not held.plain:
                    others.append((to_device(torch.tensor(own), self._device), held.rest))
        return ArenaBatch(self._ops, self._arena.weights, self._shapes, planned, others)

    def _chunks(
        self, rows_of: Mapping[int, Sequence[int]], first: int, chunk: int
    ) -> tuple[list[int], list[list[int]]]:
        """Blobs and rows of a plan that counts rows from ``first``; its copies come before."""
        blobs, rows = [], []
        for slot, own in rows_of.items():
            if not self._slots[slot].sites:
                continue
            self._arena.copies.wait(self._copied.pop(slot, None))
            for at in range(0, len(own), chunk):
                part = [row - first for row in own[at : at + chunk]]
                blobs.append(self._arena.begin(slot))
                rows.append(part + [-1] * (chunk - len(part)))
        return blobs, rows

    def _tensors(
        self, blobs: list[int], rows: list[list[int]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return (
            to_device(torch.tensor(blobs, dtype=torch.int64), self._device),
            to_device(torch.tensor(rows, dtype=torch.int32), self._device),
        )


def rank_room(rank: int) -> int:
    """``LoRAPlan.max_rank`` for adapters of this rank: the next power of two, at least 16."""
    return max(16, 1 << (rank - 1).bit_length())
