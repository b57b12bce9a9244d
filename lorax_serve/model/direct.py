"""Steps that are done when they return: the decoders in plain torch and on compiled CPU kernels."""

from __future__ import annotations

import torch

from lorax_serve.core import RowCopy, Sequence
from lorax_serve.model.adapters.folded import FoldedAdapter
from lorax_serve.model.adapters.packed_lora import PackedAdapter
from lorax_serve.model.decoders.compiled_decoder import CompiledDecoder
from lorax_serve.model.decoders.decoder import Decoder, ForwardBatch
from lorax_serve.model.decoders.kv_cache import KVCache
from lorax_serve.model.launched import Done
from lorax_serve.model.layout import Layout
from lorax_serve.model.sampling.sampler import sample

__all__ = ["DirectSteps"]


class DirectSteps:
    """A decoder with its cache of rows.

    Args:
        decoder: computes.
        max_length: positions of a row.
        rows: of the cache.
    """

    runs_ahead = False

    def __init__(self, decoder: Decoder | CompiledDecoder, max_length: int, rows: int) -> None:
        self.decoder = decoder
        self.max_length = max_length
        self.cache = self._cache(rows, max_length)

    @property
    def bytes_per_token(self) -> int:
        """Of keys and values."""
        return self.cache.bytes_per_token

    @property
    def slots_copy(self) -> bool:
        """Whether adapters in slots are copies, which stay when the host's own go."""
        return self.decoder.device.type != "cpu"

    def prepare(self, folded: FoldedAdapter) -> FoldedAdapter | PackedAdapter:
        """The form of an adapter that ``put`` takes; thread-safe."""
        return self.decoder.lora.prepare(folded)

    def put(self, slot: int, adapter: FoldedAdapter | PackedAdapter) -> None:
        """Bring an adapter into a slot, over what was there."""
        self.decoder.lora.put(slot, adapter)  # type: ignore[arg-type]  # what its prepare made

    def clear(self, slot: int) -> None:
        """Free a slot's memory."""
        self.decoder.lora.clear(slot)

    def record(self) -> None:
        """Nothing is recorded."""

    def copy(self, copies: list[RowCopy]) -> None:
        """Move and free rows of the cache."""
        self.cache.copy(copies)

    def scrub(self, sequence: Sequence) -> None:
        """Zero a sequence's keys and values."""
        self.cache.scrub(sequence.kv_slot, len(sequence.tokens))

    def launch(self, layout: Layout) -> Done:
        """Compute a step."""
        if not layout.token_ids:
            return Done([], [])
        hidden = self.decoder.forward(self._inputs(layout), self.cache)
        if not layout.sampled:
            return Done([], [])
        if len(layout.sampled) < len(hidden):
            hidden = hidden[layout.sampled_rows]
        logits = self.decoder.logits(hidden, layout.sampled_adapters)
        return Done(layout.sampled, sample(logits, layout.sampled, self.decoder.kernels))

    def logits_after(self, layout: Layout) -> torch.Tensor:
        """Logits ``[vocab]`` after one sequence's tokens, computed in row 0 of a cache of its own.

        Args:
            layout: of ``lay_out_prompt``.
        """
        # Compiled kernels know one length of rows; untouched positions take no memory on a CPU.
        length = len(layout.token_ids) if self.decoder.kernels is None else self.max_length
        hidden = self.decoder.forward(self._inputs(layout), self._cache(1, length))
        return self.decoder.logits(hidden[-1:], layout.sampled_adapters)[0]

    def _inputs(self, layout: Layout) -> ForwardBatch:
        return ForwardBatch(
            token_ids=torch.tensor(layout.token_ids, dtype=torch.int32),
            positions=torch.tensor(layout.positions, dtype=torch.int32),
            kv_slots=torch.tensor(layout.kv_slots, dtype=torch.int32),
            num_decodes=layout.num_decodes,
            prompts=layout.prompts,
            lora=self.decoder.lora.batch(layout.decode_adapters, layout.prompt_adapters),
        )

    def _cache(self, rows: int, length: int) -> KVCache:
        spec, decoder = self.decoder.spec, self.decoder
        return KVCache(
            spec.num_layers,
            rows,
            spec.num_kv_heads,
            length,
            spec.head_dim,
            decoder.dtype,
            decoder.device,
        )
