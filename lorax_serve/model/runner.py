"""Runs one step: a batch of sequences becomes tensors, logits, and a token each."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from pathlib import Path

import torch

from lorax_serve.adapter import LoRAWeights
from lorax_serve.checkpoint.fingerprint import base_fingerprint
from lorax_serve.checkpoint.loader import load_weights
from lorax_serve.checkpoint.source import resolve_model
from lorax_serve.checkpoint.spec import DecoderSpec
from lorax_serve.checkpoint.spec_cache import load_spec
from lorax_serve.checkpoint.weights import DecoderWeights
from lorax_serve.config import EngineConfig
from lorax_serve.core import BASE, Batch, ModelInfo, RowCopy, SamplingParams, Sequence
from lorax_serve.errors import ModelUnsupported
from lorax_serve.model.adapters.arena import ArenaAdapter
from lorax_serve.model.adapters.fold import BaseWeights, fold, without_copies
from lorax_serve.model.adapters.folded import FoldedAdapter
from lorax_serve.model.adapters.packed_lora import PackedAdapter
from lorax_serve.model.build import Built, build, check_parallel, choose_device, choose_dtype
from lorax_serve.model.launched import Launched
from lorax_serve.model.layout import lay_out, lay_out_prompt
from lorax_serve.model.paged_steps import PagedSteps
from lorax_serve.model.parallel.leading import LeadingSteps
from lorax_serve.model.parallel.stored_base import StoredBase
from lorax_serve.model.parallel.workers import SharedAdapter, Workers, device_of
from lorax_serve.model.sampling.sampler import Sample

__all__ = ["HostAdapter", "Launched", "ModelRunner"]

HostAdapter = FoldedAdapter | PackedAdapter | ArenaAdapter | SharedAdapter
"""An adapter in host memory, in the form that the decoder's slots take."""


class ModelRunner:
    """The base model, its KV cache and its adapter slots, on one device or on several, whose
    processes it starts.

    Owned by one thread; only ``fold``, ``without_copies`` and ``fingerprint`` may be called from
    another.

    Attributes:
        batch_limits: of a step.
        max_length: most tokens of a sequence.
        kv_rows, kv_tokens: of the KV cache.
        device_adapter_bytes: of adapters in slots; None: only the slots are counted.
        modules: the model's, which adapters can change.
        info: what is said of it.

    Raises:
        ModelUnsupported: the model cannot be found or run, or the device is not there.
        EngineFailed: another process, of several that compute the model, has ended.
    """

    _workers: Workers | None = None

    def __init__(self, config: EngineConfig) -> None:
        directory = resolve_model(config.model)
        device = choose_device(config.device)
        spec = load_spec(directory)
        dtype = choose_dtype(config, spec, device)
        check_parallel(config, spec, device)
        if config.tensor_parallel > 1:
            self._start_ranks(config, spec, directory, dtype, device)
            return
        with load_weights(directory, dtype, device) as weights:
            self._set_up(config, spec, build(config, weights), directory)

    def _start_ranks(
        self,
        config: EngineConfig,
        spec: DecoderSpec,
        directory: Path,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        # Others are at work from here on, and must end if this fails.
        self._workers = workers = Workers(config, directory, dtype, device, torch.get_num_threads())
        own = device_of(0, device)
        if own.type == "cuda":
            torch.cuda.set_device(own)
        try:
            group = workers.join()
            with workers.together(), load_weights(directory, dtype, own, group.part) as weights:
                built = build(config, weights, group)
            assert isinstance(built.steps, PagedSteps)
            led = LeadingSteps(built.steps, workers, spec)
            self._set_up(config, spec, built, directory, StoredBase(directory, dtype), led)
        except BaseException:
            workers.close()
            raise

    @classmethod
    def from_weights(cls, config: EngineConfig, weights: DecoderWeights) -> ModelRunner:
        """A runner of weights that come from no files; their device and dtype are the runner's.

        It has no ``fingerprint``, since there are no files to take one of.
        """
        if config.tensor_parallel > 1:
            raise ModelUnsupported(
                f"--tensor-parallel {config.tensor_parallel} needs a model that is in files: each "
                "process reads its part"
            )
        runner = cls.__new__(cls)
        runner._set_up(config, weights.spec, build(config, weights), None)
        return runner

    def _set_up(
        self,
        config: EngineConfig,
        spec: DecoderSpec,
        built: Built,
        directory: Path | None,
        base: BaseWeights | None = None,
        led: LeadingSteps | None = None,
    ) -> None:
        """``spec`` and ``base`` are of the whole model; without ``base``, the decoder has it. With
        other ranks, ``led`` are the steps of all."""
        self._steps = built.steps if led is None else led
        self._decoder = decoder = built.steps.decoder
        self.batch_limits = built.batch
        self._base: BaseWeights = decoder.base if base is None else base
        self.max_length, self.kv_rows = built.max_length, built.kv_rows
        self.kv_tokens = built.kv_tokens
        self.device_adapter_bytes = built.device_adapter_bytes
        self.modules = spec.modules()
        self._own_slot = config.adapter_slots  # the one after those that requests can have
        self._fingerprint = ""
        self.info = ModelInfo(
            model=config.model,
            directory="" if directory is None else str(directory.resolve()),
            dtype=str(decoder.dtype).removeprefix("torch."),
            device=_devices(decoder.device, config.tensor_parallel),
            vocab_size=spec.vocab_size,
            max_sequence_length=self.max_length,
            max_batch_size=built.batch.size,
            eos_token_ids=spec.eos_token_ids,
            num_parameters=spec.num_parameters,
            kv_cache_bytes=self.kv_tokens * self._steps.bytes_per_token,
        )

    def fold(self, weights: LoRAWeights) -> HostAdapter:
        """``fold.fold``, then the form that the decoder's slots take; thread-safe."""
        return self._steps.prepare(fold(weights, self._base))

    def without_copies(self, weights: LoRAWeights) -> LoRAWeights:
        """``fold.without_copies``; thread-safe."""
        return without_copies(weights, self._base)

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
        self._steps.put(slot, adapter)  # type: ignore[arg-type]  # what its prepare made

    def clear_adapter(self, slot: int) -> None:
        """Free a device slot's memory."""
        self._steps.clear(slot)

    def scrub(self, sequence: Sequence) -> None:
        """Zero a sequence's keys and values, after a failure that may have left NaN in them."""
        self._steps.scrub(sequence)

    def warm_up(self) -> None:
        """Run a prompt and a decoding step, so that the first request finds everything built."""
        self._steps.record()
        probe = Sequence(0, [0] * 8, 7, None, SamplingParams(), 1, 0, frozenset(), kv_slot=0)
        self.run(Batch(prefills=[(probe, 8)]))
        probe.computed = 7
        self.run(Batch(decodes=[probe]))
        self._steps.copy([RowCopy(probe.kv_slot, probe.kv_slot, 0)])

    @property
    def lost(self) -> str:
        """Why nothing can be computed any more, if several processes compute the model and one of
        them has failed; empty while all is well."""
        return "" if self._workers is None else self._workers.lost

    def close(self) -> None:
        """End the other processes, if there are any."""
        if self._workers is not None:
            self._workers.close()

    @property
    def slots_copy(self) -> bool:
        """Whether adapters in slots are copies, which stay when the host's own go."""
        return self._steps.slots_copy

    @property
    def runs_ahead(self) -> bool:
        """Whether a step may be launched before the samples of the last one are known: a sequence's
        last token may then be ``PENDING``."""
        return self._steps.runs_ahead

    @torch.inference_mode()
    def launch(self, batch: Batch) -> Launched:
        """Start a step: it samples a token for every sequence whose tokens are all computed.

        The sequences are not changed; their rows of the cache are, and those of ``batch.copies``.
        """
        self._steps.copy(batch.copies)
        return self._steps.launch(lay_out(batch))

    def run(self, batch: Batch) -> list[tuple[Sequence, Sample]]:
        """A step from its launch to its samples."""
        launched = self.launch(batch)
        return list(zip(launched.sequences, launched.samples(), strict=True))

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
            logits = self._steps.logits_after(lay_out_prompt(alone))
            wanted: list[float] = logits.float().cpu()[list(of)].tolist()
            return wanted
        finally:
            self.clear_adapter(self._own_slot)


def _devices(first: torch.device, count: int) -> str:
    return str(first) if count == 1 else f"{count} x {first.type}"
