"""The calls between torch's matrix products in a step of the GPU's decoder.

Each exists twice: as a Triton kernel in ``gpu.kernels`` and in plain torch in ``gpu.reference``,
under the same name with the same arguments. ``load`` gives all of one kind; tests compare the two.

Everywhere, T is the number of rows (tokens) of a step, and a row whose KV slot is -1 is padding: it
reads nothing, and what is written for it is zeros or nothing.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from dataclasses import dataclass
from typing import Protocol

import torch

from lorax_serve.errors import LoraxError
from lorax_serve.gpu.lora import LoRAPlan, SiteShape
from lorax_serve.gpu.pages import LayerPages, Rope

__all__ = ["Ops", "TritonUnavailable", "load"]


class TritonUnavailable(LoraxError):
    """Triton's kernels cannot run here; says why."""


class RmsNorm(Protocol):
    """``h[t] = x[t] / sqrt(mean(x[t]^2) + eps) * weight``, in float32, rounded once."""

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """x ``[T, size]``, rows contiguous; weight ``[size]``; the result is like x."""


class AddRmsNorm(Protocol):
    """``x += y``, rounded to x's dtype, then ``rms_norm`` of the rounded sum, in one pass."""

    def __call__(
        self, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """x and y ``[T, size]``, x changed in place; the result is like x."""


class SiluMul(Protocol):
    """``silu(gate) * up`` in float32, rounded once; gate is the first half of each row."""

    def __call__(self, gate_up: torch.Tensor) -> torch.Tensor:
        """gate_up ``[T, 2 * size]``; returns ``[T, size]``."""


class RotateAndStore(Protocol):
    """What lies between the product of q, k and v and attention.

    Each head of q and k is normed, if the model does that, then rotated by halves: with c and s the
    cosine and sine of the row's position, ``(first * c - second * s, second * c + first * s)``, in
    float32 and rounded once. q and k go back in place, where ``prompt_attention`` finds them; k and
    v go to the row's page.
    """

    def __call__(
        self,
        qkv: torch.Tensor,
        positions: torch.Tensor,
        kv_slots: torch.Tensor,
        pages: LayerPages,
        rope: Rope,
    ) -> None:
        """qkv ``[T, heads + 2 * kv_heads, head_dim]``, q and k changed in place; positions and
        kv_slots int32 ``[T]``. No two rows have the same slot and position."""


class DecodeAttention(Protocol):
    """Attention of one query a sequence over its pages, positions 0 to its own, itself included:
    ``softmax(q @ K.T * scale) @ V``, summed in float32. A kernel may round the softmax to the
    values' dtype before that product, as flash attention does.

    Positions beyond a sequence's own are never read: whatever is there, NaN included, changes
    nothing. The work of a long sequence is split over positions, always at the same ones, so that
    a row's bits depend on nothing but its own sequence.
    """

    def __call__(
        self,
        q: torch.Tensor,
        positions: torch.Tensor,
        kv_slots: torch.Tensor,
        pages: LayerPages,
        scale: float,
    ) -> torch.Tensor:
        """q ``[B, heads, head_dim]``, of the cache's dtype, any stride between rows and heads;
        positions and kv_slots int32 ``[B]``. Returns ``[B, heads, head_dim]``,
        contiguous; padding rows are zeros."""


class LoRAShrink(Protocol):
    """``h = x @ A.T`` for the rows of each chunk of a plan, all slices of a site in one launch.

    The sum over ``in_features`` is cut in parts, at the same places whatever else is in the batch.
    Each part is written apart, in float32, and summed by ``lora_expand`` in order: no zeroing
    before, no atomics, the same bits every time.
    """

    def __call__(
        self,
        x: torch.Tensor,
        arena: torch.Tensor,
        plan: LoRAPlan,
        site: SiteShape,
    ) -> torch.Tensor:
        """x ``[T, in]``, each row contiguous. arena: all adapters' weights, one dimension, x's
        dtype. Returns float32 ``[parts, slices, T, plan.max_rank]``; only what belongs to a row of
        the plan and to a true rank is written."""


class LoRAExpand(Protocol):
    """``y[t] += h[t] @ B``, then, where the adapter has a gain or a shift at this site,
    ``(y[t] - bias) * gain + bias + shift``: h summed in float32 and rounded to B's dtype, all else
    in float32 and rounded once.

    Rows that the plan does not name are left bit for bit alone.
    """

    def __call__(
        self,
        h: torch.Tensor,
        y: torch.Tensor,
        arena: torch.Tensor,
        plan: LoRAPlan,
        site: SiteShape,
        bias: torch.Tensor | None,
    ) -> None:
        """h: what ``lora_shrink`` returned, read only where that writes. y ``[T, out]``, each row
        contiguous, changed in place; bias ``[out]``, of the base, in y already."""


class Draw(Protocol):
    """Choose a token of each row as ``model.sampler`` does: the most probable one at temperature 0,
    else one drawn from the softmax of ``logits / temperature``, cut by top-k (all that are no less
    probable than the k-th), then by top-p of what is left, with ``sampler.uniform``'s numbers.

    Of equal logits temperature 0 takes the first. A logit of -infinity is a token that is banned.
    Draws are by rejection in the order of the vocabulary, with and without top-k; ``model.sampler``
    draws from the k tokens in the order of their probability.
    """

    def __call__(
        self,
        logits: torch.Tensor,
        temperature: torch.Tensor,
        top_k: torch.Tensor,
        top_p: torch.Tensor,
        seeds: torch.Tensor,
        draws: torch.Tensor,
    ) -> torch.Tensor:
        """logits float32 ``[rows, vocab]``, not changed. temperature and top_p float32, top_k
        int32 (0 keeps all), seeds int64 (bits of the unsigned seed) and draws int32 (the position
        that ``uniform`` takes), all ``[rows]``. Returns int32 ``[rows]``; -1 where a logit is NaN
        or +infinity, or none is finite."""


@dataclass(frozen=True, slots=True)
class Ops:
    """All calls, of one kind."""

    rms_norm: RmsNorm
    add_rms_norm: AddRmsNorm
    silu_mul: SiluMul
    rotate_and_store: RotateAndStore
    decode_attention: DecodeAttention
    lora_shrink: LoRAShrink
    lora_expand: LoRAExpand
    draw: Draw


_MODULE_OF = {
    "rms_norm": "norm",
    "add_rms_norm": "norm",
    "silu_mul": "activation",
    "rotate_and_store": "rope",
    "decode_attention": "attention",
    "lora_shrink": "lora",
    "lora_expand": "lora",
    "draw": "sampling",
}


def load(device: torch.device, *, triton: bool) -> Ops:
    """All calls, for tensors on ``device``.

    Args:
        device: where they run.
        triton: as Triton kernels; else in plain torch.

    Raises:
        TritonUnavailable: no triton, or no device for it. On a CPU its interpreter runs them, for
            tests: it is chosen by TRITON_INTERPRET=1 when the process starts.
    """
    if triton:
        if importlib.util.find_spec("triton") is None:
            raise TritonUnavailable("triton is not installed: pip install triton")
        if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            raise TritonUnavailable("Triton's kernels need a GPU (tests set TRITON_INTERPRET=1)")
    room = f"lorax_serve.gpu.{'kernels' if triton else 'reference'}"
    found = {
        name: getattr(importlib.import_module(f"{room}.{module}"), name)
        for name, module in _MODULE_OF.items()
    }
    return Ops(**found)
