"""Runs one step: a batch of sequences becomes tensors, logits, and a token each."""

from __future__ import annotations

import logging
from collections.abc import Sequence as Seq
from contextlib import suppress
from pathlib import Path

import torch

from lorax_serve.adapter import LoRAWeights
from lorax_serve.config import EngineConfig
from lorax_serve.core import BASE, Batch, ModelInfo, SamplingParams, Sequence
from lorax_serve.errors import InvalidRequest, ModelUnsupported
from lorax_serve.kernels.build import KernelsUnavailable
from lorax_serve.kernels.cpu import load as load_kernels
from lorax_serve.model.compiled_decoder import CompiledDecoder, check_sizes
from lorax_serve.model.decoder import Decoder, ForwardBatch, PromptChunk
from lorax_serve.model.fingerprint import base_fingerprint
from lorax_serve.model.fold import fold, without_copies
from lorax_serve.model.folded import FoldedAdapter
from lorax_serve.model.kv_cache import KVCache, affordable_tokens
from lorax_serve.model.loader import load_weights
from lorax_serve.model.packed_lora import PackedAdapter
from lorax_serve.model.sampler import Sample, sample
from lorax_serve.model.source import resolve_model
from lorax_serve.model.spec import DecoderSpec
from lorax_serve.model.spec_cache import load_spec
from lorax_serve.model.weights import DecoderWeights

__all__ = ["HostAdapter", "ModelRunner"]

HostAdapter = FoldedAdapter | PackedAdapter
"""An adapter in host memory, in the form that the decoder's slots take."""

log = logging.getLogger(__name__)

_DEFAULT_MAX_LENGTH = 4096


class ModelRunner:
    """The base model, its KV cache and its adapter slots on one device.

    Owned by one thread; only ``fold``, ``without_copies`` and ``fingerprint`` may be called from
    another.

    Raises:
        ModelUnsupported: the model cannot be found or run, or the device is not there.
    """

    def __init__(self, config: EngineConfig) -> None:
        directory = resolve_model(config.model)
        device = _device(config.device)
        dtype = _dtype(config, load_spec(directory), device)
        with load_weights(directory, dtype, device) as weights:
            self._set_up(config, weights, directory)

    @classmethod
    def from_weights(cls, config: EngineConfig, weights: DecoderWeights) -> ModelRunner:
        """A runner of weights that come from no files; their device and dtype are the runner's.

        It has no ``fingerprint``, since there are no files to take one of.
        """
        runner = cls.__new__(cls)
        runner._set_up(config, weights, None)
        return runner

    def _set_up(
        self, config: EngineConfig, weights: DecoderWeights, directory: Path | None
    ) -> None:
        device, dtype = weights.embedding.device, weights.embedding.dtype
        self.max_length = _max_length(config, weights.spec)
        self._decoder = _decoder(config, weights, self.max_length)
        spec = self._decoder.spec
        # Rows beyond the running sequences' keep prefixes. On a CPU they cost no memory, and with
        # compiled kernels no time: plain torch attends over all rows up to the last that decodes.
        spare = config.prefix_caching and self._decoder.kernels is not None
        self.kv_rows = config.max_batch_size * (2 if spare else 1)
        self._cache = KVCache(
            spec.num_layers,
            self.kv_rows,
            spec.num_kv_heads,
            self.max_length,
            spec.head_dim,
            dtype,
            device,
        )
        self.kv_tokens = _kv_budget(config, self._cache, device)
        self.modules = spec.modules()
        self._own_slot = config.adapter_slots  # the one after those that requests can have
        self._fingerprint = ""
        self.info = ModelInfo(
            model=config.model,
            directory="" if directory is None else str(directory.resolve()),
            dtype=str(dtype).removeprefix("torch."),
            device=str(device),
            vocab_size=spec.vocab_size,
            max_sequence_length=self.max_length,
            eos_token_ids=spec.eos_token_ids,
            num_parameters=spec.num_parameters,
            kv_cache_bytes=self.kv_tokens * self._cache.bytes_per_token,
        )

    def fold(self, weights: LoRAWeights) -> HostAdapter:
        """``fold.fold``, then the form that the decoder's slots take; thread-safe."""
        return self._decoder.lora.prepare(fold(weights, self._decoder))

    def without_copies(self, weights: LoRAWeights) -> LoRAWeights:
        """``fold.without_copies``; thread-safe."""
        return without_copies(weights, self._decoder)

    def fingerprint(self) -> str:
        """``base_fingerprint`` of the model's files, read once; for one thread at a time.

        Raises:
            ModelUnsupported: the files have gone or changed.
        """
        if not self._fingerprint:
            self._fingerprint = base_fingerprint(Path(self.info.directory))
        return self._fingerprint

    def put_adapter(self, slot: int, adapter: HostAdapter) -> None:
        """Bring an adapter into a device slot, over what was there."""
        self._decoder.lora.put(slot, adapter)  # type: ignore[arg-type]  # what its prepare made

    def clear_adapter(self, slot: int) -> None:
        """Free a device slot's memory."""
        self._decoder.lora.clear(slot)

    def scrub(self, sequence: Sequence) -> None:
        """Zero a sequence's keys and values, after a failure that may have left NaN in them."""
        self._cache.scrub(sequence.kv_slot, len(sequence.tokens))

    def warm_up(self) -> None:
        """Run a prompt and a decoding step, so that the first request finds everything built."""
        probe = Sequence(0, [0] * 8, 7, None, SamplingParams(), 1, 0, frozenset(), kv_slot=0)
        self.run(Batch(prefills=[(probe, 8)]))
        probe.computed = 7
        self.run(Batch(decodes=[probe]))

    @torch.inference_mode()
    def run(self, batch: Batch) -> list[tuple[Sequence, Sample]]:
        """Compute a step and sample a token for every sequence whose tokens are all computed.

        The sequences are not changed; their rows of the cache are, and those of ``batch.copies``.
        """
        self._cache.copy(batch.copies)
        if not batch:
            return []
        # Decoding rows in the order of their KV slots, so that attention reads the cache in place.
        decodes = sorted((s for s in batch.decodes if s.generated), key=lambda s: s.kv_slot)
        # A prompt's last token is computed as the others were, that their bits do not depend on how
        # it was cut.
        last = [(s, 1) for s in batch.decodes if not s.generated]
        chunks = [(s, s.computed, s.computed + n) for s, n in last + batch.prefills]
        hidden = self._decoder.forward(self._prepare(decodes, chunks), self._cache)
        sampled, rows, row = list(decodes), list(range(len(decodes))), len(decodes)
        slots = [s.slot_at(s.computed) for s in decodes]
        for sequence, begin, end in chunks:
            row += end - begin
            if end == len(sequence.tokens):
                sampled.append(sequence)
                rows.append(row - 1)
                slots.append(sequence.slot_at(end - 1))
        if not sampled:
            return []
        if len(rows) < len(hidden):
            hidden = hidden[rows]
        logits = self._decoder.logits(hidden, slots)
        return list(zip(sampled, sample(logits, sampled, self._decoder.kernels), strict=True))

    @torch.inference_mode()
    def logits_after(
        self, prompt: Seq[int], of: Seq[int], adapter: HostAdapter | None, start: int = 0
    ) -> list[float]:
        """Logits of some tokens after a prompt, computed apart from all that runs.

        Keys and values go to a cache that lives as long as the call, and the adapter to a slot that
        no request can have.

        Args:
            prompt: token ids, as many as ``max_length`` at most.
            of: the tokens whose logits are wanted.
            adapter: from ``fold``; None is the base model.
            start: the first position that the adapter acts on.
        """
        spec, decoder = self._decoder.spec, self._decoder
        # Compiled kernels know one length of rows; untouched positions take no memory on a CPU.
        length = len(prompt) if decoder.kernels is None else self.max_length
        cache = KVCache(
            spec.num_layers,
            1,
            spec.num_kv_heads,
            length,
            spec.head_dim,
            decoder.dtype,
            decoder.device,
        )
        alone = Sequence(
            0,
            list(prompt),
            len(prompt),
            None,
            SamplingParams(),
            1,
            0,
            frozenset(),
            kv_slot=0,
            adapter_slot=BASE if adapter is None else self._own_slot,
            adapter_start=start,
        )
        try:
            if adapter is not None:
                self.put_adapter(self._own_slot, adapter)
            hidden = decoder.forward(self._prepare([], [(alone, 0, len(prompt))]), cache)
            logits = decoder.logits(hidden[-1:], [alone.slot_at(len(prompt) - 1)])
            wanted: list[float] = logits[0].float().cpu()[list(of)].tolist()
            return wanted
        finally:
            self.clear_adapter(self._own_slot)

    def _prepare(
        self, decodes: Seq[Sequence], chunks: Seq[tuple[Sequence, int, int]]
    ) -> ForwardBatch:
        tokens = [s.tokens[-1] for s in decodes]
        positions = [s.computed for s in decodes]
        slots = [s.kv_slot for s in decodes]
        prompts, adapters = [], []
        for sequence, begin, end in chunks:
            start = len(tokens)
            tokens += sequence.tokens[begin:end]
            positions += range(begin, end)
            slots += [sequence.kv_slot] * (end - begin)
            prompts.append(PromptChunk(start, len(tokens), sequence.kv_slot, end))
            # An activated LoRA may begin within the chunk.
            active = min(max(sequence.adapter_start, begin), end) - begin + start
            adapters += [(start, active, BASE), (active, len(tokens), sequence.adapter_slot)]
        return ForwardBatch(
            token_ids=torch.tensor(tokens, dtype=torch.int32),
            positions=torch.tensor(positions, dtype=torch.int32),
            kv_slots=torch.tensor(slots, dtype=torch.int32),
            num_decodes=len(decodes),
            prompts=prompts,
            lora=self._decoder.lora.batch([s.slot_at(s.computed) for s in decodes], adapters),
        )


def _max_length(config: EngineConfig, spec: DecoderSpec) -> int:
    limit = spec.max_positions
    length = config.max_sequence_length or min(limit, _DEFAULT_MAX_LENGTH)
    if length > limit:
        raise ModelUnsupported(f"max_sequence_length {length}: this model's limit is {limit}")
    return length


def _decoder(
    config: EngineConfig, weights: DecoderWeights, max_length: int
) -> Decoder | CompiledDecoder:
    """The compiled decoder where this machine can run it, else the one in plain torch."""
    if config.kernels == "torch":
        if config.batch_invariant:
            raise ModelUnsupported("--batch-invariant needs compiled kernels, not --kernels torch")
        return Decoder(weights)
    try:
        return CompiledDecoder(weights, max_length, batch_invariant=config.batch_invariant)
    except KernelsUnavailable as error:
        if config.batch_invariant:
            raise ModelUnsupported(f"--batch-invariant needs compiled kernels: {error}") from error
        if config.kernels == "compiled":
            raise ModelUnsupported(f"--kernels compiled: {error}") from error
        log.info("no compiled kernels (%s): plain torch, which is slower on a CPU", error)
        return Decoder(weights)


def _kv_budget(config: EngineConfig, cache: KVCache, device: torch.device) -> int:
    """Tokens that the KV cache may hold: at least one sequence must be able to run to its end."""
    most, length = config.kv_cache_tokens, cache.max_length
    if most is None:
        most = config.max_batch_size * length
        if device.type == "cpu":
            most = max(length, min(most, affordable_tokens(cache.bytes_per_token)))
    if most < length:
        raise InvalidRequest(
            f"kv_cache_tokens {most} is less than one sequence may have: max_sequence_length is "
            f"{length}"
        )
    return most


def _dtype(config: EngineConfig, spec: DecoderSpec, device: torch.device) -> torch.dtype:
    """The compute type; ``auto`` is bfloat16 unless it would be computed an element at a time."""
    if config.dtype != "auto":
        named: torch.dtype = getattr(torch, config.dtype)
        return named
    if device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.bfloat16
    if config.kernels != "torch":
        with suppress(KernelsUnavailable):
            check_sizes(spec, torch.bfloat16, device)
            load_kernels(torch.bfloat16)
            return torch.bfloat16
    log.info("torch multiplies no bfloat16 on this CPU: float32, which takes twice the memory")
    return torch.float32


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ModelUnsupported(f"device {name!r} is not available: {error}") from error
    return device
