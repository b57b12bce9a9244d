"""Steps that only decode, recorded once and replayed: a CUDA graph launches a whole step at once.

A graph computes a fixed number of rows from fixed addresses. A step takes the graph of the next
larger number, and its other rows are padding, for which nothing is computed or written. Launched
one by one, the kernels of a small step would take longer to launch than to run.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

import torch

from lorax_serve.model.adapters.arena_lora import ArenaBatch, rank_room
from lorax_serve.model.copies import to_device
from lorax_serve.model.decoders.paged_cache import PagedKVCache
from lorax_serve.model.decoders.paged_decoder import PagedDecoder, Rows
from lorax_serve.model.layout import Layout

__all__ = ["Capture", "CudaCapture", "DecodeGraphs", "run_directly"]

Replay = Callable[[], None]
Capture = Callable[[Callable[[], None]], Replay]
"""Makes of a step what does it again."""

_USUAL_RANK = 64
"""Graphs are recorded at the start for adapters of this rank at most, and for larger ones when the
first of them decodes."""


def run_directly(step: Callable[[], None]) -> Replay:
    """A ``Capture`` where there are no graphs: the step itself."""
    return step


class CudaCapture:
    """A ``Capture`` of CUDA graphs, whose intermediate results share one pool of memory: graphs are
    replayed one after the other, and no result but what they write to fixed addresses is kept.

    NCCL's sums are recorded with the rest. For that, all ranks must record and replay the same
    graphs in the same order, from the one thread that computes; and NCCL must have connected
    before, which the step that is not recorded sees to.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __call__(self, step: Callable[[], None]) -> Replay:
        """See ``Capture``."""
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        # This block ends on the stream that it began on, whatever fails in it; the next need not.
        with torch.cuda.stream(self._stream):
            # Once without recording: kernels are compiled, and libraries take their workspaces,
            # which they do for each stream.
            step()
            # The thread that loads adapters allocates pinned memory meanwhile, and may.
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                step()
        current.wait_stream(self._stream)
        replay: Replay = graph.replay
        return replay


@dataclass(frozen=True, slots=True)
class _Key:
    """Of a graph: its rows, the chunks of its LoRA plan (0: base rows only) and their rank."""

    rows: int
    chunks: int
    max_rank: int


@dataclass(frozen=True, slots=True)
class _Graph:
    """What it reads, int32 ``[3, rows]``: token ids, positions, KV slots; and how to replay it."""

    inputs: torch.Tensor
    lora: ArenaBatch | None
    replay: Replay


class DecodeGraphs:
    """Graphs of a decoder's steps over one cache.

    Args:
        decoder: computes.
        cache: its keys and values; with pages for all rows before ``logits`` is called.
        last_tokens: int32 ``[KV slots]`` on the device: what is decoded where the host does not
            know the token yet.
        most_rows: of a step.
        capture: how graphs are made.
    """

    def __init__(
        self,
        decoder: PagedDecoder,
        cache: PagedKVCache,
        last_tokens: torch.Tensor,
        most_rows: int,
        capture: Capture,
    ) -> None:
        self._decoder = decoder
        self._cache = cache
        self._last_tokens = last_tokens
        self._capture = capture
        self._sizes = _sizes(most_rows)
        self._graphs: dict[_Key, _Graph] = {}
        vocab = decoder.spec.vocab_size
        self._logits = torch.zeros(self._sizes[-1], vocab, device=decoder.device)
        self._hidden = decoder.base.embedding.new_zeros(self._sizes[-1], decoder.spec.hidden_size)

    def record(self) -> None:
        """Record the usual graphs, the largest first: smaller ones find room in its memory."""
        for rows in reversed(self._sizes):
            for chunks in reversed(_chunk_counts(rows)):
                self._graph(_Key(rows, chunks, _USUAL_RANK if chunks else 0))

    def logits(self, layout: Layout) -> torch.Tensor | None:
        """Launch a step.

        Args:
            layout: it has decoding rows only; token ids of -1 are taken from ``last_tokens``.

        Returns:
            float32 ``[rows, vocab]``, valid until the next call; None where no graph can do what
            one of the adapters does in the layers.
        """
        rows, adapters = len(layout.token_ids), layout.decode_adapters
        decoder, lora = self._decoder, self._decoder.lora
        if rows > self._sizes[-1] or not lora.plain(adapters):
            return None
        size = self._sizes[bisect_left(self._sizes, rows)]
        key = _Key(size, 0, 0)
        if needed := lora.chunks_needed(adapters):
            counts = _chunk_counts(size)
            chunks = counts[bisect_left(counts, needed)]
            key = _Key(size, chunks, max(_USUAL_RANK, rank_room(lora.max_rank(adapters))))
        graph = self._graph(key)
        padding = [-1] * (size - rows)
        zeros = [0] * (size - rows)
        new = torch.tensor(
            [
                layout.token_ids + zeros,
                layout.positions + zeros,
                layout.kv_slots + padding,
            ],
            dtype=torch.int32,
        )
        graph.inputs.copy_(to_device(new, decoder.device))
        if graph.lora is not None:
            lora.fill(graph.lora, adapters)
        graph.replay()
        logits = self._logits[:rows]
        decoder.base.change_logits(logits, self._hidden[:rows], adapters, lora)
        return logits

    def _graph(self, key: _Key) -> _Graph:
        found = self._graphs.get(key)
        if found is None:
            found = self._graphs[key] = self._record(key)
        return found

    def _record(self, key: _Key) -> _Graph:
        decoder = self._decoder
        inputs = torch.zeros(3, key.rows, dtype=torch.int32, device=decoder.device)
        inputs[2] = -1
        lora = None
        if key.chunks:
            lora = decoder.lora.static_batch(key.rows, key.chunks, key.max_rank)
        logits, hidden = self._logits[: key.rows], self._hidden[: key.rows]

        def step() -> None:
            token_ids, positions, kv_slots = inputs.unbind()
            last = self._last_tokens[kv_slots.clamp(min=0)]
            token_ids = torch.where(token_ids < 0, last, token_ids)
            rows = Rows(token_ids, positions, kv_slots, key.rows, (), lora)
            hidden.copy_(decoder.forward(rows, self._cache))
            logits.copy_(decoder.base.base_logits(hidden))

        return _Graph(inputs, lora, self._capture(step))


def _sizes(most: int) -> list[int]:
    """Numbers of rows that graphs are recorded for: a step is padded by an eighth or so."""
    steps = [1, 2, 4, 8, *range(16, 65, 8), *range(80, 257, 16), *range(288, most + 32, 32)]
    return [size for size in steps if size < most] + [most]


def _chunk_counts(rows: int) -> list[int]:
    """Numbers of chunks that graphs of so many rows are recorded for. Programs that find no chunk
    end at once, but even that takes time: a few thousand of them some microseconds."""
    counts = [0, 1]
    while counts[-1] < rows:
        counts.append(min(counts[-1] * 4, rows))
    return counts
