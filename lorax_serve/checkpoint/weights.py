"""A decoder's weights as they come from a checkpoint, q/k/v and gate/up already fused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from lorax_serve.checkpoint.spec import DecoderSpec

__all__ = ["DecoderWeights", "LayerWeights", "LinearWeights", "Norm"]


@dataclass(frozen=True, slots=True)
class LinearWeights:
    """``y = x @ weight.T + bias``; weight ``[out, in]``, bias ``[out]`` or None."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Norm:
    """Of the kind that the spec names; weight and bias ``[size]``, RMSNorm's bias is None."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer; without a gate, ``gate_up`` is the up projection alone."""

    input_norm: Norm
    qkv: LinearWeights
    q_norm: Norm | None
    k_norm: Norm | None
    o: LinearWeights
    post_norm: Norm
    gate_up: LinearWeights
    down: LinearWeights


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """All but the layers, which ``layers`` reads one by one: each may be released before the next.

    ``head`` is ``embedding`` itself where the two are tied; ``positions`` is the table of learned
    ones, ``[max_positions, hidden]``.
    """

    spec: DecoderSpec
    embedding: torch.Tensor
    positions: torch.Tensor | None
    norm: Norm
    head: torch.Tensor
    layers: Iterator[LayerWeights]
