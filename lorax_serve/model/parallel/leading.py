"""Steps that several ranks compute together, as the first of them launches them."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

import torch

from lorax_serve.checkpoint.part import Part
from lorax_serve.checkpoint.spec import DecoderSpec
from lorax_serve.core import RowCopy, Sequence
from lorax_serve.model.adapters.folded import FoldedAdapter
from lorax_serve.model.decoders.paged_decoder import PagedDecoder
from lorax_serve.model.launched import Launched
from lorax_serve.model.layout import Layout
from lorax_serve.model.paged_steps import PagedSteps
from lorax_serve.model.parallel.cut import cut
from lorax_serve.model.parallel.messages import Clear, Copy, Follow, LogitsAfter, Put, Record
from lorax_serve.model.parallel.workers import SharedAdapter, Workers
from lorax_serve.model.sampling.sampler import Sample

__all__ = ["LeadingSteps"]


@dataclass(frozen=True, slots=True)
class _Together:
    """A step of all ranks; see ``Launched``."""

    launched: Launched
    workers: Workers

    @property
    def sequences(self) -> Seq[Sequence]:
        """See ``Launched``."""
        return self.launched.sequences

    def samples(self) -> list[Sample]:
        """See ``Launched``."""
        with self.workers.together():
            return self.launched.samples()


class LeadingSteps:
    """Calls as ``PagedSteps``'s, each of which the other ranks make too, in the same order.

    What is decided on the host (pages, plans, which graph) follows from these calls alone, so that
    every rank decides alike; the tokens are drawn here, and go from device to device.

    Args:
        steps: this rank's.
        workers: the other ranks.
        spec: of the whole model.
    """

    runs_ahead = PagedSteps.runs_ahead
    slots_copy = True

    def __init__(self, steps: PagedSteps, workers: Workers, spec: DecoderSpec) -> None:
        self._steps = steps
        self._workers = workers
        self._spec = spec
        self._parts = [Part(rank, workers.part.size) for rank in range(workers.part.size)]

    @property
    def decoder(self) -> PagedDecoder:
        """This rank's."""
        return self._steps.decoder

    @property
    def bytes_per_token(self) -> int:
        """Of keys and values, with all ranks."""
        return self._steps.bytes_per_token * len(self._parts)

    def prepare(self, folded: FoldedAdapter) -> SharedAdapter:
        """Give every rank its part; thread-safe.

        Raises:
            Overloaded: it is too large for the form that slots take.
            EngineFailed: a rank has ended.
        """
        parts = [self._steps.prepare(cut(folded, part, self._spec)) for part in self._parts]
        return self._workers.share(parts)

    def put(self, slot: int, adapter: SharedAdapter) -> None:
        """See ``PagedSteps.put``."""
        self._workers.tell(Put(slot, adapter.key))
        with self._workers.together():
            self._steps.put(slot, adapter.own)

    def clear(self, slot: int) -> None:
        """See ``PagedSteps.clear``."""
        self._workers.tell(Clear(slot))
        self._steps.clear(slot)

    def record(self) -> None:
        """See ``PagedSteps.record``."""
        self._workers.tell(Record())
        with self._workers.together():
            self._steps.record()

    def copy(self, copies: list[RowCopy]) -> None:
        """See ``PagedSteps.copy``."""
        if copies:
            self._workers.tell(Copy(copies))
            with self._workers.together():
                self._steps.copy(copies)

    def scrub(self, sequence: Sequence) -> None:
        """See ``PagedKVCache.scrub``: it does nothing in any rank."""
        self._steps.scrub(sequence)

    def launch(self, layout: Layout) -> Launched:
        """See ``PagedSteps.launch``."""
        self._workers.tell(Follow(replace(layout, sampled=[])))
        with self._workers.together():
            return _Together(self._steps.launch(layout), self._workers)

    def logits_after(self, layout: Layout) -> torch.Tensor:
        """See ``PagedSteps.logits_after``."""
        self._workers.tell(LogitsAfter(layout))
        with self._workers.together():
            return self._steps.logits_after(layout).cpu()
