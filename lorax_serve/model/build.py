"""From settings and weights to what computes steps: which decoder, and how much memory for what."""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import dataclass

import torch

from lorax_serve.checkpoint.part import Part
from lorax_serve.checkpoint.spec import DecoderSpec
from lorax_serve.checkpoint.weights import DecoderWeights
from lorax_serve.config import BatchLimits, EngineConfig
from lorax_serve.errors import InvalidRequest, ModelUnsupported
from lorax_serve.gpu import ops
from lorax_serve.kernels.build import KernelsUnavailable
from lorax_serve.kernels.cpu import load as load_kernels
from lorax_serve.model.decoders.compiled_decoder import CompiledDecoder, check_sizes
from lorax_serve.model.decoders.decode_graphs import CudaCapture, run_directly
from lorax_serve.model.decoders.decoder import Decoder
from lorax_serve.model.decoders.kv_cache import affordable_tokens
from lorax_serve.model.decoders.paged_cache import bytes_per_token
from lorax_serve.model.decoders.paged_decoder import PagedDecoder
from lorax_serve.model.direct import DirectSteps
from lorax_serve.model.group import ALONE, Group
from lorax_serve.model.paged_steps import PagedSteps

__all__ = [
    "ACTIVATIONS_SHARE",
    "DEFAULT_MAX_LENGTH",
    "DEVICE_ADAPTERS_SHARE",
    "Built",
    "build",
    "check_parallel",
    "choose_device",
    "choose_dtype",
]

log = logging.getLogger(__name__)

DEFAULT_MAX_LENGTH = 4096

DEVICE_ADAPTERS_SHARE = 8
"""By default, adapters may take an eighth of a GPU's memory."""

_HOST_ADAPTERS_BYTES = 256 << 20
"""What they may take of the host's memory in the GPU's decoder on a CPU, which is for tests."""

ACTIVATIONS_SHARE = 16
"""Of a GPU's memory, for what a step computes and for what fragments."""


@dataclass(frozen=True, slots=True)
class Built:
    """What computes, and its limits.

    Attributes:
        steps: the decoder with its cache and its adapter slots.
        batch: of a step.
        max_length: most tokens of a sequence.
        kv_rows: sequences and cached prefixes that can have a row of the cache.
        kv_tokens: tokens that the cache may hold.
        device_adapter_bytes: of adapters in slots; None: only the slots are counted.
    """

    steps: DirectSteps | PagedSteps
    batch: BatchLimits
    max_length: int
    kv_rows: int
    kv_tokens: int
    device_adapter_bytes: int | None


def build(config: EngineConfig, weights: DecoderWeights, group: Group = ALONE) -> Built:
    """The fastest decoder that can be had, unless the settings name another.

    Args:
        config: the settings.
        weights: of the model, or of this rank's part, on the device and in the dtype that it is to
            have.
        group: the ranks that compute the model together.

    Raises:
        ModelUnsupported: the settings ask for what the model or the machine cannot do.
        InvalidRequest: the KV cache would not hold one sequence, or memory of a device is limited
            that is none.
    """
    length = _max_length(config, weights.spec)
    batch = config.batch_limits(weights.embedding.device.type == "cuda")
    calls = _gpu_calls(config, weights.embedding.device)
    if calls is not None:
        return _build_paged(config, batch, weights, length, calls, group)
    if group.part.size > 1:
        raise ModelUnsupported(_not_parallel(config))
    decoder = _decoder(config, weights, length)
    on_cpu = decoder.device.type == "cpu"
    if on_cpu and config.max_device_adapter_bytes is not None:
        raise InvalidRequest(
            "max_device_adapter_bytes: on a CPU, adapters are in host memory only: set "
            "max_adapter_bytes"
        )
    # Rows beyond the running sequences' keep prefixes. On a CPU they cost no memory, and with
    # compiled kernels no time: plain torch attends over all rows up to the last that decodes.
    spare = config.prefix_caching and decoder.kernels is not None
    rows = batch.size * (2 if spare else 1)
    steps = DirectSteps(decoder, length, rows)
    most = batch.size * length
    if on_cpu:
        most = max(length, min(most, affordable_tokens(steps.bytes_per_token)))
    tokens = _kv_tokens(config, length, most)
    return Built(steps, batch, length, rows, tokens, config.max_device_adapter_bytes)


def choose_device(name: str) -> torch.device:
    """The device of that name; ``auto`` is a GPU if there is one.

    Raises:
        ModelUnsupported: there is none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ModelUnsupported(f"device {name!r} is not available: {error}") from error
    return device


def choose_dtype(config: EngineConfig, spec: DecoderSpec, device: torch.device) -> torch.dtype:
    """The compute type; ``auto`` is bfloat16 unless it would be computed an element at a time."""
    if config.dtype != "auto":
        named: torch.dtype = getattr(torch, config.dtype)
        return named
    if device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.bfloat16
    if config.kernels in ("auto", "compiled"):
        with suppress(KernelsUnavailable):
            check_sizes(spec, torch.bfloat16, device)
            load_kernels(torch.bfloat16)
            return torch.bfloat16
    log.info("torch multiplies no bfloat16 on this CPU: float32, which takes twice the memory")
    return torch.float32


def check_parallel(config: EngineConfig, spec: DecoderSpec, device: torch.device) -> None:
    """Refuse several ranks where they cannot be had, before any is started.

    Raises:
        ModelUnsupported: with the reason.
    """
    size = config.tensor_parallel
    if size == 1:
        return
    Part(0, size).check(spec)
    if _gpu_calls(config, device) is None:
        raise ModelUnsupported(_not_parallel(config))
    if device.type != "cuda":
        return
    if device.index is not None:
        raise ModelUnsupported(
            f"--tensor-parallel {size} takes the first {size} GPUs, not --device {config.device}: "
            "say --device cuda, and choose them with CUDA_VISIBLE_DEVICES"
        )
    found = torch.cuda.device_count()
    if found < size:
        raise ModelUnsupported(f"--tensor-parallel {size}: this machine has {found} GPUs")


def _max_length(config: EngineConfig, spec: DecoderSpec) -> int:
    limit = spec.max_positions
    length = config.max_sequence_length or min(limit, DEFAULT_MAX_LENGTH)
    if length > limit:
        raise ModelUnsupported(f"max_sequence_length {length}: this model's limit is {limit}")
    return length


def _gpu_calls(config: EngineConfig, device: torch.device) -> ops.Ops | None:
    """What the GPU's decoder computes with; None: another decoder is to be used."""
    if config.batch_invariant or config.kernels not in ("auto", "triton", "paged"):
        return None
    if config.kernels == "auto" and device.type != "cuda":
        return None
    try:
        return ops.load(device, triton=config.kernels != "paged")
    except ops.TritonUnavailable as error:
        if config.kernels == "triton":
            raise ModelUnsupported(f"--kernels triton: {error}") from error
        log.warning("no Triton kernels (%s): plain torch, which is slower", error)
        return None


def _decoder(
    config: EngineConfig, weights: DecoderWeights, max_length: int
) -> Decoder | CompiledDecoder:
    """The compiled decoder where this machine can run it, else the one in plain torch."""
    if config.batch_invariant and config.kernels not in ("auto", "compiled"):
        raise ModelUnsupported(
            f"--batch-invariant needs compiled kernels, not --kernels {config.kernels}"
        )
    if config.kernels == "torch":
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


def _build_paged(
    config: EngineConfig,
    batch: BatchLimits,
    weights: DecoderWeights,
    length: int,
    calls: ops.Ops,
    group: Group,
) -> Built:
    device = weights.embedding.device
    # Every rank has as much of each adapter.
    ranks = group.part.size
    adapters = (config.max_device_adapter_bytes or 0) // ranks
    if config.max_device_adapter_bytes is None:
        adapters = _HOST_ADAPTERS_BYTES
        if device.type == "cuda":
            adapters = torch.cuda.mem_get_info(device)[1] // DEVICE_ADAPTERS_SHARE
    # What is probed has a slot beside those that requests can have.
    decoder = PagedDecoder(weights, calls, adapters + adapters // 4, group)
    spec = decoder.spec
    per_token = bytes_per_token(spec.num_layers, spec.num_kv_heads, spec.head_dim, decoder.dtype)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(device)
        most = max(length, (free - total // ACTIVATIONS_SHARE) // per_token)
    else:
        # Pages are counted once more for rows that keep prefixes; memory is touched as it is used.
        most = max(length, min(batch.size * length, affordable_tokens(per_token)))
    tokens = _kv_tokens(config, length, group.least(most))
    if device.type == "cuda":
        # torch prefers cuDNN's attention on an H100, which is prepared anew, at length, for each
        # length of a prompt.
        torch.backends.cuda.enable_cudnn_sdp(False)
    # A row is but a line of the table; those beyond the running sequences' keep prefixes.
    rows = batch.size * (8 if config.prefix_caching else 1)
    recorded = device.type == "cuda" and config.kernels != "paged"
    steps = PagedSteps(
        decoder,
        calls,
        rows=rows,
        max_length=length,
        tokens=tokens,
        most_decodes=batch.size,
        # The calls in plain torch ask the device for numbers, which a graph cannot.
        capture=CudaCapture(device) if recorded else run_directly,
    )
    return Built(steps, batch, length, rows, tokens, adapters * ranks)


def _not_parallel(config: EngineConfig) -> str:
    asked = "--batch-invariant" if config.batch_invariant else f"--kernels {config.kernels}"
    return (
        f"--tensor-parallel {config.tensor_parallel} is for the GPU's decoder (--kernels triton or "
        f"paged), and with {asked} another one would compute here"
    )


def _kv_tokens(config: EngineConfig, length: int, most: int) -> int:
    """Tokens that the KV cache may hold: at least one sequence must be able to run to its end."""
    tokens = config.kv_cache_tokens or most
    if tokens < length:
        raise InvalidRequest(
            f"kv_cache_tokens {tokens} is less than one sequence may have: max_sequence_length is "
            f"{length}"
        )
    return tokens
