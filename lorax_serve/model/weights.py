"""A decoder's weights as they come from a checkpoint, q/k/v and gate/up already fused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from lorax_serve.model.spec import DecoderSpec

__all__ = ["DecoderWeights", "LayerWeights", "LinearWeights"]


@dataclass(frozen=True, slots=True)
class LinearWeights:
    """``y = x @ weight.T + bias``; weight ``[out, in]``, bias ``[out]`` or None."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer; the norms are vectors."""

    input_norm: torch.Tensor
    qkv: LinearWeights
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    o: LinearWeights
    post_norm: torch.Tensor
    gate_up: LinearWeights
    down: LinearWeights


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """All but the layers, which ``layers`` reads one by one: each may be released before the next.

    ``head`` is ``embedding`` itself where the two are tied.
    """

    spec: DecoderSpec
    embedding: torch.Tensor
    norm: torch.Tensor
    head: torch.Tensor
    layers: Iterator[LayerWeights]
