"""Steps that a GPU computes by itself, one after the other, while the host prepares the next."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch

from lorax_serve.core import RowCopy, Sequence
from lorax_serve.gpu.ops import Ops
from lorax_serve.gpu.pages import pages_of
from lorax_serve.model.adapters.arena import ArenaAdapter
from lorax_serve.model.adapters.arena_lora import PROMPT_CHUNK
from lorax_serve.model.adapters.folded import FoldedAdapter
from lorax_serve.model.copies import to_device
from lorax_serve.model.decoders.decode_graphs import Capture, DecodeGraphs, run_directly
from lorax_serve.model.decoders.paged_cache import PagedKVCache
from lorax_serve.model.decoders.paged_decoder import PagedDecoder, Rows
from lorax_serve.model.layout import Layout
from lorax_serve.model.sampling.gpu_sampler import DeviceSamples, sample_on_device
from lorax_serve.model.sampling.sampler import Sample

__all__ = ["PagedSteps"]


@dataclass(frozen=True, slots=True)
class _Flying:
    """See ``Launched``."""

    sequences: Seq[Sequence]
    drawn: DeviceSamples | None

    def samples(self) -> list[Sample]:
        """See ``Launched``."""
        return [] if self.drawn is None else self.drawn.samples()


class PagedSteps:
    """A decoder with a cache of pages; calls as ``DirectSteps``'s.

    Args:
        decoder: computes.
        ops: as the decoder's.
        rows: of the cache.
        max_length: positions of a row.
        tokens: that the cache has pages for.
        most_decodes: rows of a step that decode.
        capture: how steps that only decode are recorded.
    """

    runs_ahead = True

    def __init__(
        self,
        decoder: PagedDecoder,
        ops: Ops,
        *,
        rows: int,
        max_length: int,
        tokens: int,
        most_decodes: int,
        capture: Capture,
    ) -> None:
        self.decoder = decoder
        self._draw = ops.draw
        self.cache = self._cache(rows, max_length, tokens)
        self._last_tokens = torch.zeros(rows, dtype=torch.int32, device=decoder.device)
        self._graphs = DecodeGraphs(decoder, self.cache, self._last_tokens, most_decodes, capture)
        self._records = capture is not run_directly

    @property
    def bytes_per_token(self) -> int:
        """Of keys and values."""
        return self.cache.bytes_per_token

    @property
    def slots_copy(self) -> bool:
        """Whether adapters in slots are copies, which stay when the host's own go."""
        return True

    def prepare(self, folded: FoldedAdapter) -> ArenaAdapter:
        """The form of an adapter that ``put`` takes; thread-safe.

        Raises:
            Overloaded: it is too large for that form.
        """
        return self.decoder.lora.prepare(folded)

    def put(self, slot: int, adapter: ArenaAdapter) -> None:
        """Bring an adapter into a slot, over what was there.

        Raises:
            Overloaded: there is no room for it; the slot is empty then.
        """
        self.decoder.lora.put(slot, adapter)

    def clear(self, slot: int) -> None:
        """Free a slot's memory."""
        self.decoder.lora.clear(slot)

    def record(self) -> None:
        """Record the steps that are usual, where that is of use."""
        if self._records:
            with torch.inference_mode():
                self._graphs.record()
                self._compile_for_prompts()

    def copy(self, copies: list[RowCopy]) -> None:
        """Move and free rows of the cache."""
        self.cache.copy(copies)

    def scrub(self, sequence: Sequence) -> None:
        """After a failure; see ``PagedKVCache.scrub``."""
        self.cache.scrub(sequence.kv_slot, len(sequence.tokens))

    def launch(self, layout: Layout) -> _Flying:
        """Queue a step on the device."""
        logits = self._logits(layout)
        if logits is None:
            return _Flying([], None)
        drawn = sample_on_device(logits, layout.sampled, self._draw)
        self._keep(layout, drawn.tokens)
        return _Flying(layout.sampled, drawn)

    def follow(self, layout: Layout) -> None:
        """Queue a step that another rank has launched, which draws the tokens.

        Args:
            layout: ``sampled`` is not looked at.
        """
        if self._logits(layout) is not None:
            count = len(layout.sampled_rows)
            self._keep(layout, torch.empty(count, dtype=torch.int32, device=self.decoder.device))

    def logits_after(self, layout: Layout) -> torch.Tensor:
        """Logits ``[vocab]`` after one sequence's tokens, computed in row 0 of a cache of its own.

        Args:
            layout: of ``lay_out_prompt``.
        """
        count = len(layout.token_ids)
        cache = self._cache(1, count, count)
        cache.reserve(0, 0, count)
        cache.flush()
        hidden = self.decoder.forward(self._inputs(layout), cache)
        return self.decoder.logits(hidden[-1:], layout.sampled_adapters)[0]

    def _compile_for_prompts(self) -> None:
        """A row of padding with a prompt's plan, or the first prompt with an adapter would wait for
        its LoRA kernels; graphs have the decoding rows', and a prompt of the base the rest."""
        lora = self.decoder.lora.static_batch(1, 1, 1, chunk=PROMPT_CHUNK)
        token_ids, positions, kv_slots = self._on_device([0, 0, -1], torch.int32).view(3, 1)
        self.decoder.forward(Rows(token_ids, positions, kv_slots, 1, (), lora), self.cache)

    def _logits(self, layout: Layout) -> torch.Tensor | None:
        """Of the rows that are sampled; None if there are none."""
        if not layout.token_ids:
            return None
        self._reserve(layout)
        logits = None if layout.prompts else self._graphs.logits(layout)
        if logits is not None:
            return logits
        hidden = self.decoder.forward(self._inputs(layout), self.cache)
        if not layout.sampled_rows:
            return None
        if len(layout.sampled_rows) < len(hidden):
            hidden = hidden[self._on_device(layout.sampled_rows, torch.int64)]
        return self.decoder.logits(hidden, layout.sampled_adapters)

    def _keep(self, layout: Layout, drawn: torch.Tensor) -> None:
        """Keep tokens for the next step; with several ranks, those that the first one has drawn."""
        # One that is not finite is an error, but the next step may be under way before it is seen.
        tokens = self.decoder.group.from_first(drawn.clamp(min=0))
        slots = self._on_device([layout.kv_slots[row] for row in layout.sampled_rows], torch.int64)
        self._last_tokens.index_copy_(0, slots, tokens)

    def _reserve(self, layout: Layout) -> None:
        for slot, position in zip(
            layout.kv_slots[: layout.num_decodes], layout.positions, strict=False
        ):
            self.cache.reserve(slot, position, position + 1)
        for chunk in layout.prompts:
            begin = chunk.end_position - (chunk.end - chunk.start)
            self.cache.reserve(chunk.slot, begin, chunk.end_position)
        self.cache.flush()

    def _inputs(self, layout: Layout) -> Rows:
        together = torch.tensor(
            [layout.token_ids, layout.positions, layout.kv_slots], dtype=torch.int32
        )
        token_ids, positions, kv_slots = to_device(together, self.decoder.device).unbind()
        if any(token < 0 for token in layout.token_ids[: layout.num_decodes]):
            last = self._last_tokens[kv_slots.clamp(min=0)]
            token_ids = torch.where(token_ids < 0, last, token_ids)
        return Rows(
            token_ids,
            positions,
            kv_slots,
            layout.num_decodes,
            layout.prompts,
            self.decoder.lora.batch(layout.decode_adapters, layout.prompt_adapters),
        )

    def _on_device(self, numbers: list[int], dtype: torch.dtype) -> torch.Tensor:
        return to_device(torch.tensor(numbers, dtype=dtype), self.decoder.device)

    def _cache(self, rows: int, length: int, tokens: int) -> PagedKVCache:
        spec, decoder = self.decoder.spec, self.decoder
        return PagedKVCache(
            spec.num_layers,
            rows,
            spec.num_kv_heads,
            length,
            spec.head_dim,
            decoder.dtype,
            decoder.device,
            pages_of(tokens),
        )
