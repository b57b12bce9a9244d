"""Adapters as the GPU's kernels take them: each one blob, all blobs in one tensor, the arena.

``gpu.lora`` says how a blob is laid out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lorax_serve.checkpoint.spec import Site
from lorax_serve.errors import Overloaded
from lorax_serve.gpu.lora import (
    A_OFFSETS,
    ALIGNMENT,
    B_OFFSETS,
    GAIN,
    HEADER,
    RANKS,
    SHIFT,
)
from lorax_serve.model.adapters.extents import Extents, Move
from lorax_serve.model.adapters.folded import FoldedAdapter, SiteLoRA
from lorax_serve.model.copies import Copied, HostCopies

__all__ = ["Arena", "ArenaAdapter"]

_MOVE_BYTES = 1 << 25
"""Device memory that a move onto itself may take for a moment."""


@dataclass(frozen=True, slots=True)
class ArenaAdapter:
    """An adapter in host memory.

    Attributes:
        blob: LoRA, gains and shifts of the layers' sites, of the compute dtype, one dimension;
            pinned for CUDA. Empty if there are none.
        sites: the numbers of the sites that the blob does something at.
        max_rank: the largest rank of a slice.
        rest: what the kernels do not do: norms, embedding and output. None if there is nothing.
    """

    blob: torch.Tensor
    sites: frozenset[int]
    max_rank: int
    rest: FoldedAdapter | None

    @property
    def nbytes(self) -> int:
        """Bytes of all, those included that align the blob's parts: what it takes in memory."""
        return self.blob.nbytes + (0 if self.rest is None else self.rest.nbytes)

    @classmethod
    def pack(
        cls, adapter: FoldedAdapter, sites: Sequence[Site], dtype: torch.dtype, *, pinned: bool
    ) -> ArenaAdapter:
        """Copy an adapter into this form.

        Args:
            adapter: it, on any device.
            sites: the model's, the output's last.
            dtype: of the weights.
            pinned: make the blob one that CUDA copies from beside what it computes.

        Raises:
            Overloaded: it is too large for the blob's numbers.
        """
        header = torch.zeros(len(sites) - 1, HEADER, dtype=torch.int32)
        parts: list[tuple[int, torch.Tensor]] = []
        end = _aligned(header.nbytes)
        touched: set[int] = set()

        def place(tensor: torch.Tensor) -> int:
            nonlocal end
            begin = end
            parts.append((begin, tensor))
            end += _aligned(tensor.nbytes)
            return min(begin // dtype.itemsize, (1 << 31) - 1)  # if too large, refused below

        for index, (lora, site) in enumerate(zip(adapter.sites[:-1], sites[:-1], strict=True)):
            if lora is None:
                continue
            slices = {part.start: number for number, part in enumerate(site.slices)}
            for rows, columns, b in lora.parts:
                which = slices[columns.start]
                header[index, RANKS + which] = len(b)
                header[index, A_OFFSETS + which] = place(lora.a[rows])
                header[index, B_OFFSETS + which] = place(b)
            for number, vector in ((GAIN, lora.gain), (SHIFT, lora.shift)):
                if vector is not None:
                    header[index, number] = place(vector)
            if header[index].any():
                touched.add(index)
        if end >= dtype.itemsize << 31:
            raise Overloaded(f"the adapter takes {end} bytes: train it with a smaller rank")
        size = end // dtype.itemsize if touched else 0
        blob = torch.empty(size, dtype=dtype, pin_memory=pinned)
        if touched:
            blob.view(torch.int32)[: header.numel()] = header.flatten()
        raw = blob.view(torch.uint8)
        for begin, tensor in parts:
            raw[begin : begin + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)
        max_rank = int(header[:, RANKS:A_OFFSETS].max())
        return cls(blob, frozenset(touched), max_rank, _rest(adapter))


class Arena:
    """The blobs of all adapters on the device, by slot, in one tensor.

    A blob has its true size, aligned, and may be moved when another is loaded: where it begins is
    to be asked for each step anew.

    Args:
        capacity: bytes. For an engine that holds adapters of ``max_device_adapter_bytes`` by their
            ``nbytes``, that, and the ``nbytes`` of the largest that it brings into a slot beside
            them, to probe it. Then ``load`` never fails.
        dtype: the compute type.
        device: where it is.

    Attributes:
        weights: the tensor; the same as long as the arena lives.
        copies: how blobs come into it.
    """

    def __init__(self, capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        aligned = capacity // ALIGNMENT * ALIGNMENT  # as are all blobs
        self.weights = torch.empty(aligned // dtype.itemsize, dtype=dtype, device=device)
        self.copies = HostCopies(device)
        self.copies.freed()
        self._extents = Extents(len(self.weights))

    def begin(self, slot: int) -> int:
        """Where a slot's blob begins, in elements, until the next ``load``."""
        return self._extents[slot].begin

    def load(self, slot: int, blob: torch.Tensor) -> Copied:
        """Copy a blob, which is not empty, into a slot that has none.

        Returns:
            What ``copies.wait`` must be called with before a step uses the slot.

        Raises:
            Overloaded: there is no room for it.
        """
        extents = self._extents
        extent = extents.take(slot, len(blob))
        if extent is None:
            free = extents.capacity - extents.used
            if free < len(blob):
                raise Overloaded(
                    f"the adapter takes {blob.nbytes} bytes of device memory, and "
                    f"{free * blob.itemsize} of the {self.weights.nbytes} for adapters are free "
                    "(--max-device-adapter-bytes): raise that limit"
                )
            self.copies.wait_for_all()
            for move in extents.compact(len(blob)):
                _move(self.weights, move)
            self.copies.freed()
            extent = extents.take(slot, len(blob))
            assert extent is not None
        target = self.weights[extent.begin : extent.begin + extent.size]
        return self.copies.start(target, blob)

    def free(self, slot: int) -> None:
        """Give back the memory of a slot, if it has any; steps that are queued may still use it."""
        if slot in self._extents:
            self._extents.release(slot)
            self.copies.freed()


def _move(weights: torch.Tensor, move: Move) -> None:
    """Move a piece down, onto itself perhaps: each part is read whole before it is written."""
    apart = move.begin - move.to >= move.size
    step = move.size if apart else max(move.begin - move.to, _MOVE_BYTES // weights.itemsize)
    for done in range(0, move.size, step):
        size = min(step, move.size - done)
        source = weights[move.begin + done : move.begin + done + size]
        target = weights[move.to + done : move.to + done + size]
        target.copy_(source.clone() if size > move.begin - move.to else source)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _rest(adapter: FoldedAdapter) -> FoldedAdapter | None:
    """What is not in the blob."""
    norms = [
        None if site is None or site.norm is None else SiteLoRA(site.a[:0], norm=site.norm)
        for site in adapter.sites[:-1]
    ]
    rest = FoldedAdapter((*norms, adapter.sites[-1]), adapter.embedding, adapter.output)
    empty = not any(rest.sites) and rest.embedding is None and rest.output is None
    return None if empty else rest
