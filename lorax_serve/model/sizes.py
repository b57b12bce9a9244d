"""What a model, its cache and its adapters take in memory, from the config alone.

Nothing is loaded: the same formulas by which the decoders lay out their memory, in numbers.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

import torch

from lorax_serve.adapter import LoRAConfig, ModuleKind, select_targets
from lorax_serve.checkpoint.spec import DecoderSpec
from lorax_serve.errors import InvalidRequest
from lorax_serve.gpu.lora import ALIGNMENT, HEADER
from lorax_serve.kernels.build import KernelsUnavailable
from lorax_serve.kernels.packing import pad_panels, step_of
from lorax_serve.model.decoders.compiled_decoder import check_sizes
from lorax_serve.model.decoders.paged_cache import bytes_per_token

__all__ = [
    "Form",
    "adapter_bytes",
    "form_of",
    "kv_bytes_per_token",
    "multiplied_parameters",
    "target_modules",
    "weight_bytes",
]

Form = Literal["compiled", "torch", "arena"]
"""How a decoder keeps adapters: in panels (compiled kernels), as they are, or in blobs (a GPU)."""


def form_of(spec: DecoderSpec, dtype: torch.dtype, *, on_gpu: bool) -> Form:
    """The form that the server takes by default, on a machine that can run its kernels."""
    if on_gpu:
        return "arena"
    try:
        check_sizes(spec, dtype, torch.device("cpu"))
    except KernelsUnavailable:
        return "torch"
    return "compiled"


def weight_bytes(spec: DecoderSpec, dtype: torch.dtype, form: Form) -> int:
    """Bytes of the linears and the embeddings; biases and norms come on top, less than 1 %.

    The compiled kernels keep an output that is tied to the embedding a second time, in panels.
    """
    copies = form == "compiled" and spec.tied_embeddings
    again = pad_panels(spec.vocab_size) * spec.hidden_size if copies else 0
    return dtype.itemsize * (spec.num_parameters + again)


def multiplied_parameters(spec: DecoderSpec) -> tuple[int, int]:
    """Weights that each token is multiplied by in the layers, and that a sampled one is in the
    output."""
    linears = sum(site.in_features * site.out_features for site in spec.sites())
    return linears, spec.vocab_size * spec.hidden_size


def kv_bytes_per_token(spec: DecoderSpec, dtype: torch.dtype) -> int:
    """Bytes of one token's keys and values in all layers."""
    return bytes_per_token(spec.num_layers, spec.num_kv_heads, spec.head_dim, dtype)


def target_modules(spec: DecoderSpec, targets: str | tuple[str, ...]) -> list[str]:
    """The paths of the linears that ``target_modules`` selects, by PEFT's rules.

    Raises:
        AdapterRejected: it selects none.
        InvalidRequest: it selects what is no linear of a layer, whose size is another.
    """
    modules = spec.modules()
    paths = select_targets(LoRAConfig(r=1, lora_alpha=1, target_modules=targets), modules)
    others = [path for path in paths if modules[path].kind is not ModuleKind.LINEAR]
    if others:
        raise InvalidRequest(
            f"targets: only linears of the layers are counted, not {', '.join(others)}"
        )
    return paths


def adapter_bytes(
    spec: DecoderSpec, rank: int, paths: Collection[str], dtype: torch.dtype, form: Form
) -> int:
    """What a plain LoRA adapter takes in memory: the server's ``host_bytes`` of it.

    Args:
        spec: the base model's.
        rank: of every module.
        paths: the modules that it changes, see ``target_modules``.
        dtype: the compute type.
        form: that of the decoder.
    """
    parts = [
        (site.in_features, part.length)
        for site in spec.sites()
        for part in site.slices
        if part.path in paths
    ]
    size = dtype.itemsize
    if form == "torch":
        return size * rank * sum(wide + out for wide, out in parts)
    if form == "compiled":
        filled = -(-rank // step_of(dtype)) * step_of(dtype)
        return size * sum(rank * wide + filled * pad_panels(out) for wide, out in parts)
    header = _aligned(len(spec.sites()) * HEADER * torch.int32.itemsize)
    sizes = (_aligned(size * rank * wide) + _aligned(size * rank * out) for wide, out in parts)
    return header + sum(sizes)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
