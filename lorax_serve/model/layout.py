"""How a step's sequences lie in rows: decoding ones first, then chunks of prompts."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from lorax_serve.core import BASE, Batch, Sequence

__all__ = ["Layout", "PromptChunk", "lay_out", "lay_out_prompt"]


@dataclass(frozen=True, slots=True)
class PromptChunk:
    """Rows ``[start, end)`` are positions ``[end_position - (end - start), end_position)``."""

    start: int
    end: int
    slot: int
    end_position: int


@dataclass(slots=True)
class Layout:
    """The rows of a step, as numbers.

    Attributes:
        token_ids, positions, kv_slots: one a row.
        num_decodes: the first rows, one token each of sequences that decode, in ascending order of
            their KV slots, so that attention reads a cache of rows in place.
        prompts: the chunks of the other rows.
        decode_adapters: the adapter slot of each decoding row.
        prompt_adapters: first row, end row and adapter slot of prompts.
        sampled: the sequences all of whose tokens are computed by the step's end; ``sampled_rows``
            and ``sampled_adapters`` are the row and the adapter slot of the last one of each.
    """

    token_ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    kv_slots: list[int] = field(default_factory=list)
    num_decodes: int = 0
    prompts: list[PromptChunk] = field(default_factory=list)
    decode_adapters: list[int] = field(default_factory=list)
    prompt_adapters: list[tuple[int, int, int]] = field(default_factory=list)
    sampled: list[Sequence] = field(default_factory=list)
    sampled_rows: list[int] = field(default_factory=list)
    sampled_adapters: list[int] = field(default_factory=list)


def lay_out(batch: Batch) -> Layout:
    """The rows of a batch."""
    decodes = sorted((s for s in batch.decodes if s.generated), key=lambda s: s.kv_slot)
    # A prompt's last token is computed as the others were, that their bits do not depend on how it
    # was cut.
    last = [(s, 1) for s in batch.decodes if not s.generated]
    chunks = [(s, s.computed, s.computed + n) for s, n in last + batch.prefills]
    layout = Layout(
        token_ids=[s.tokens[-1] for s in decodes],
        positions=[s.computed for s in decodes],
        kv_slots=[s.kv_slot for s in decodes],
        num_decodes=len(decodes),
        decode_adapters=[s.slot_at(s.computed) for s in decodes],
        sampled=list(decodes),
        sampled_rows=list(range(len(decodes))),
    )
    layout.sampled_adapters = list(layout.decode_adapters)
    _append_chunks(layout, chunks)
    return layout


def lay_out_prompt(sequence: Sequence) -> Layout:
    """The rows of one sequence's tokens, all of them."""
    layout = Layout()
    _append_chunks(layout, [(sequence, 0, len(sequence.tokens))])
    return layout


def _append_chunks(layout: Layout, chunks: Seq[tuple[Sequence, int, int]]) -> None:
    for sequence, begin, end in chunks:
        start = len(layout.token_ids)
        layout.token_ids += sequence.tokens[begin:end]
        layout.positions += range(begin, end)
        layout.kv_slots += [sequence.kv_slot] * (end - begin)
        stop = len(layout.token_ids)
        layout.prompts.append(PromptChunk(start, stop, sequence.kv_slot, end))
        # An activated LoRA may begin within the chunk.
        active = min(max(sequence.adapter_start, begin), end) - begin + start
        layout.prompt_adapters += [(start, active, BASE), (active, stop, sequence.adapter_slot)]
        if end == len(sequence.tokens):
            layout.sampled.append(sequence)
            layout.sampled_rows.append(stop - 1)
            layout.sampled_adapters.append(sequence.slot_at(end - 1))
