"""Runs one step: a batch of sequences becomes tensors, logits, and a token each."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from pathlib import Path

import torch

from lorax_serve.adapter import LoRAWeights
from lorax_serve.config import EngineConfig
from lorax_serve.core import Batch, ModelInfo, SamplingParams, Sequence
from lorax_serve.errors import ModelUnsupported
from lorax_serve.model.decoder import ForwardBatch, PromptChunk
from lorax_serve.model.kv_cache import KVCache
from lorax_serve.model.loader import load_decoder
from lorax_serve.model.multi_lora import AdapterSites, MultiLoRA, fold
from lorax_serve.model.sampler import Sample, sample
from lorax_serve.model.source import resolve_model

__all__ = ["ModelRunner"]

_DEFAULT_MAX_LENGTH = 4096


class ModelRunner:
    """The base model, its KV cache and its adapter slots on one device.

    Owned by one thread; only ``fold`` may be called from another.

    Raises:
        ModelUnsupported: the model cannot be found or run, or the device is not there.
    """

    def __init__(self, config: EngineConfig) -> None:
        directory = resolve_model(config.model)
        device = _device(config.device)
        dtype = torch.bfloat16 if config.dtype == "auto" else getattr(torch, config.dtype)
        self._decoder = load_decoder(directory, dtype, device)
        spec = self._decoder.spec
        self.max_length = config.max_sequence_length or min(spec.max_positions, _DEFAULT_MAX_LENGTH)
        if self.max_length > spec.max_positions:
            raise ModelUnsupported(
                f"max_sequence_length {self.max_length}: this model's limit is {spec.max_positions}"
            )
        self._cache = KVCache(
            spec.num_layers,
            config.max_batch_size,
            spec.num_kv_heads,
            self.max_length,
            spec.head_dim,
            dtype,
            device,
        )
        self._lora = MultiLoRA(self._decoder.sites, device)
        self.linear_modules = spec.linear_modules()
        self.info = ModelInfo(
            model=config.model,
            directory=str(Path(directory).resolve()),
            dtype=str(dtype).removeprefix("torch."),
            device=str(device),
            vocab_size=spec.vocab_size,
            max_sequence_length=self.max_length,
            eos_token_ids=spec.eos_token_ids,
            num_parameters=self._decoder.num_parameters,
            kv_cache_bytes=self._cache.nbytes,
        )

    def fold(self, weights: LoRAWeights) -> AdapterSites:
        """See ``multi_lora.fold``; thread-safe."""
        return fold(weights, self._decoder.sites, self._decoder.dtype)

    def put_adapter(self, slot: int, adapter: AdapterSites) -> None:
        """Bring an adapter into a device slot, over what was there."""
        self._lora.put(slot, adapter)

    def clear_adapter(self, slot: int) -> None:
        """Free a device slot's memory."""
        self._lora.clear(slot)

    def scrub(self, sequence: Sequence) -> None:
        """Zero a sequence's keys and values, after a failure that may have left NaN in them."""
        self._cache.scrub(sequence.kv_slot, len(sequence.tokens))

    def warm_up(self) -> None:
        """Run a prompt and a decoding step, so that the first request finds everything built."""
        probe = Sequence(0, [0] * 8, 8, None, SamplingParams(), 1, 0, frozenset(), kv_slot=0)
        self.run(Batch(prefills=[(probe, 8)]))
        probe.computed = 7
        self.run(Batch(decodes=[probe]))

    @torch.inference_mode()
    def run(self, batch: Batch) -> list[tuple[Sequence, Sample]]:
        """Compute a step and sample a token for every sequence whose tokens are all computed.

        The sequences are not changed; their rows of the cache are.
        """
        # Decoding rows in the order of their KV slots, so that attention reads the cache in place.
        decodes = sorted(batch.decodes, key=lambda s: s.kv_slot)
        chunks = [(s, s.computed, s.computed + n) for s, n in batch.prefills]
        hidden = self._decoder.forward(self._prepare(decodes, chunks), self._cache)
        sampled, rows, row = list(decodes), list(range(len(decodes))), len(decodes)
        for sequence, begin, end in chunks:
            row += end - begin
            if end == len(sequence.tokens):
                sampled.append(sequence)
                rows.append(row - 1)
        if not sampled:
            return []
        if len(rows) < len(hidden):
            hidden = hidden[rows]
        return list(zip(sampled, sample(self._decoder.logits(hidden), sampled), strict=True))

    def _prepare(
        self, decodes: Seq[Sequence], chunks: Seq[tuple[Sequence, int, int]]
    ) -> ForwardBatch:
        device = self._decoder.device
        tokens = [s.tokens[-1] for s in decodes]
        positions = [s.computed for s in decodes]
        slots = [s.kv_slot for s in decodes]
        prompts, adapters = [], []
        for sequence, begin, end in chunks:
            start = len(tokens)
            tokens += sequence.tokens[begin:end]
            positions += range(begin, end)
            slots += [sequence.kv_slot] * (end - begin)
            mask = None if begin == 0 else _chunk_mask(begin, end, device)
            prompts.append(PromptChunk(start, len(tokens), sequence.kv_slot, end, mask))
            adapters.append((start, len(tokens), sequence.adapter_slot))
        position_ids = torch.tensor(positions, device=device)
        kv_slots = torch.tensor(slots, device=device)
        decode_rows, decode_mask = _decode_layout(decodes, device)
        return ForwardBatch(
            token_ids=torch.tensor(tokens, device=device),
            positions=position_ids,
            kv_index=self._cache.index(kv_slots, position_ids),
            num_decodes=len(decodes),
            decode_rows=decode_rows,
            decode_mask=decode_mask,
            prompts=prompts,
            lora=self._lora.batch([s.adapter_slot for s in decodes], adapters),
        )


def _chunk_mask(begin: int, end: int, device: torch.device) -> torch.Tensor:
    """Causal for rows ``begin..end-1`` over positions ``0..end-1``: bool ``[end-begin, end]``."""
    rows = torch.arange(begin, end, device=device)[:, None]
    return rows >= torch.arange(end, device=device)


def _decode_layout(
    decodes: Seq[Sequence], device: torch.device
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """``ForwardBatch.decode_rows`` and ``decode_mask`` for sequences sorted by KV slot."""
    if not decodes:
        return None, None
    slots = [s.kv_slot for s in decodes]
    used = slots[-1] + 1
    lengths = [0] * used
    for sequence in decodes:
        lengths[sequence.kv_slot] = sequence.computed + 1
    limit = torch.tensor(lengths, device=device)[:, None]
    mask = torch.arange(max(lengths), device=device) < limit
    rows = None if used == len(slots) else torch.tensor(slots, device=device)
    return rows, mask[:, None, None]


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ModelUnsupported(f"device {name!r} is not available: {error}") from error
    return device
