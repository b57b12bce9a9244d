"""Layers of a frozen model with the LoRA pairs of any number of adapters.

A batch says which tokens are whose; each layer adds, for the tokens of the adapters that it has,
what PEFT would add for that adapter alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lorax_train.data.batches import Span
from lorax_train.model.frozen import product_of
from lorax_train.model.lora import lora_linear

__all__ = ["LoRAEmbedding", "LoRALayer", "LoRALinear", "Pair", "Routing"]

_TO_THE_END = 1 << 62


@dataclass
class Routing:
    """Which tokens of the batch belong to which adapter. All layers of a model share one.

    Attributes:
        spans: by position in the batch's tokens, laid out one after another; None: all tokens are
            the first adapter's.
        on: whether adapters act at all: without them, the model is the base.
        draws: a number for each adapter, of which its dropout's masks are made; new for each batch.
        real: bool ``[T]``, which of the batch's tokens are no padding; None: all of them.
    """

    spans: Sequence[Span] | None = None
    on: bool = True
    draws: Mapping[int, int] = field(default_factory=dict)
    real: torch.Tensor | None = None

    @contextmanager
    def to(
        self,
        spans: Sequence[Span] | None,
        real: torch.Tensor | None = None,
        draws: Mapping[int, int] | None = None,
    ) -> Iterator[None]:
        """Route so within the block; without ``draws``, by those that there are."""
        before = self.spans, self.real, self.draws
        self.spans, self.real, self.draws = spans, real, self.draws if draws is None else draws
        try:
            yield
        finally:
            self.spans, self.real, self.draws = before

    def alone(self, adapter: int) -> AbstractContextManager[None]:
        """Have all tokens be this adapter's within the block."""
        return self.to((Span(adapter, 0, _TO_THE_END),))

    @contextmanager
    def switched_off(self) -> Iterator[None]:
        """Have the model be the base within the block, bit for bit."""
        before, self.on = self.on, False
        try:
            yield
        finally:
            self.on = before

    def of(self, tokens: int, members: Mapping[int, int]) -> list[Span]:
        """The spans of a layer's adapters, by their places in that layer."""
        if not self.on:
            return []
        spans = self.spans if self.spans is not None else (Span(0, 0, tokens),)
        return [
            Span(members[span.adapter], span.start, min(span.stop, tokens))
            for span in spans
            if span.adapter in members
        ]


@dataclass
class Pair:
    """One adapter's share of a layer.

    Attributes:
        a: ``[r, in]`` float32; of an embedding ``[r, vocabulary]``.
        b: ``[out, r]`` float32.
        scale: of the product.
        dropout: probability that an element of the branch's input is dropped in training.
        magnitude: DoRA's, ``[out]`` float32; or None.
        start: A and B as they were (PiSSA), whose product is taken away again; or None: B was zero.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    dropout: float = 0.0
    magnitude: torch.Tensor | None = None
    start: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def whole(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B as they are applied and saved.

        With a start, ``B A - B0 A0`` is written as ``(B - B0) A + B0 (A - A0)``, of twice the rank:
        exactly nothing at first, and rounded in proportion to what was learned.
        """
        if self.start is None:
            return self.a, self.b
        a, b = self.start
        return torch.cat([self.a, self.a - a]), torch.cat([self.b - b, b], dim=1)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All that is trained."""
        return [p for p in (self.a, self.b, self.magnitude) if isinstance(p, nn.Parameter)]

    @torch.no_grad()
    def rounded(self, dtype: torch.dtype) -> Pair:
        """A copy that computes what a file in ``dtype`` will; it is not trained."""
        a, b = (each.to(dtype).float() for each in self.whole)
        magnitude = None if self.magnitude is None else self.magnitude.to(dtype).float()
        return replace(self, a=a, b=b, magnitude=magnitude, start=None)


class LoRALayer(nn.Module):
    """A frozen layer with the LoRA pairs of the adapters that target it.

    Attributes:
        base: the frozen layer.
        routing: the model's.
        number: its place among the model's layers, on which dropout's masks depend.
        members: adapter to its place in this layer.
        pairs: the adapters' shares, by place.
    """

    def __init__(self, base: nn.Module, routing: Routing, number: int) -> None:
        super().__init__()
        self.base = base
        self.routing = routing
        self.number = number
        self.members: dict[int, int] = {}
        self.pairs: list[Pair] = []
        self.trained = nn.ParameterList()

    def add(self, adapter: int, pair: Pair) -> None:
        """Take an adapter's share."""
        self.members[adapter] = len(self.pairs)
        self.pairs.append(pair)
        self.trained.extend(pair.parameters)

    @property
    def weight(self) -> torch.Tensor:
        """The base's weight: some models look at its dtype or device."""
        weight: torch.Tensor = self.base.weight  # type: ignore[assignment]
        return weight

    @property
    def device(self) -> torch.device:
        """The base's: asked of its weight, a quantised layer would dequantise it to answer."""
        return next(chain(self.base.parameters(), self.base.buffers())).device

    @property
    def bias(self) -> torch.Tensor | None:
        """The base's bias."""
        return getattr(self.base, "bias", None)


class LoRALinear(LoRALayer):
    """On an ``nn.Linear``, a ``Conv1D``, or a quantized layer."""

    def __init__(self, base: nn.Module, routing: Routing, number: int) -> None:
        super().__init__(base, routing, number)
        self.product = product_of(base)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``[..., in]`` to ``[..., out]``; dropout acts on the LoRA branch only, as in PEFT."""
        spans = self.routing.of(x.shape[:-1].numel(), self.members)
        if not spans:
            y: torch.Tensor = self.base(x)
            return y
        present = sorted({span.adapter for span in spans})
        pairs = [self.pairs[place] for place in present]
        own = [Span(present.index(each.adapter), each.start, each.stop) for each in spans]
        dropping = self.training and any(pair.dropout for pair in pairs)
        kept = self._kept(x.flatten(0, -2), spans) if dropping else None
        scales = [p.scale / (1 - p.dropout) if dropping else p.scale for p in pairs]
        a, b = _stacked([pair.whole for pair in pairs], x.dtype)
        y = lora_linear(x, self.product, a, b, scales, own, kept)
        if all(pair.magnitude is None for pair in pairs):
            return y
        return self._with_magnitudes(y, spans)

    def _kept(self, x: torch.Tensor, spans: Sequence[Span]) -> torch.Tensor:
        """What dropout keeps, bool in x's shape.

        It depends on the adapter's number of the batch and on this layer alone: so it is the same
        beside other adapters, however much padding these make necessary, when activations are
        computed again, and after a resumed run.
        """
        kept = torch.ones_like(x, dtype=torch.bool)
        generator = torch.Generator(device=x.device)
        for adapter, place in self.members.items():
            dropout = self.pairs[place].dropout
            generator.manual_seed(hash((self.routing.draws.get(adapter, 0), self.number)))
            for span in spans:
                if span.adapter == place and dropout:
                    part = kept[span.start : span.stop]
                    real = self.routing.real
                    at: Any = slice(None) if real is None else real[span.start : span.stop]
                    size = part[at].shape
                    part[at] = torch.rand(size, generator=generator, device=x.device) >= dropout
        return kept

    def _with_magnitudes(self, y: torch.Tensor, spans: Sequence[Span]) -> torch.Tensor:
        """DoRA (arXiv:2402.09353): ``m / |W + s B A|`` times what is not the bias.

        The lengths of the rows are constants for the gradient, as in PEFT.
        """
        flat, bias = y.flatten(0, -2), self.bias
        parts, end = [], 0
        for span in spans:
            pair = self.pairs[span.adapter]
            part = flat[span.start : span.stop]
            if pair.magnitude is not None:
                own = part if bias is None else part - bias
                gain = (pair.magnitude / self.row_lengths(pair)).to(y.dtype)
                part = own * gain if bias is None else own * gain + bias
            parts += [flat[end : span.start], part]
            end = span.stop
        return torch.cat([*parts, flat[end:]]).view(y.shape)

    @torch.no_grad()
    def row_lengths(self, pair: Pair) -> torch.Tensor:
        """The length of each row of ``W + s B A``, ``[out]`` float32, without building that."""
        w = self.product.dense().float()
        (a, b), scale = pair.whole, pair.scale
        cross = ((w @ a.T) * b).sum(1)
        own = ((b @ (a @ a.T)) * b).sum(1)
        return (w.pow(2).sum(1) + 2 * scale * cross + scale**2 * own).clamp_min(0).sqrt()


class LoRAEmbedding(LoRALayer):
    """On an ``nn.Embedding``: ``E[t] + s A[:, t].T @ B.T``, where A is ``[r, vocabulary]``."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Map ``[...]`` ids to ``[..., hidden]``. There is no dropout on ids, as in PEFT."""
        y: torch.Tensor = self.base(ids)
        spans = self.routing.of(ids.numel(), self.members)
        if not spans:
            return y
        flat, tokens = y.flatten(0, -2), ids.flatten()
        parts, end = [], 0
        for span in spans:
            pair, at = self.pairs[span.adapter], slice(span.start, span.stop)
            change = F.linear(F.embedding(tokens[at], pair.a.T), pair.b) * pair.scale
            parts += [flat[end : span.start], flat[at] + change.to(y.dtype)]
            end = span.stop
        return torch.cat([*parts, flat[end:]]).view(y.shape)


def _stacked(
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """All A ``[N, r, in]`` and B ``[N, out, r]``, padded to the largest rank, in ``dtype``."""
    if len(pairs) == 1:
        ((a, b),) = pairs
        return a.to(dtype)[None], b.to(dtype)[None]
    rank = max(len(a) for a, _ in pairs)
    all_a = [F.pad(a, (0, 0, 0, rank - len(a))) for a, _ in pairs]
    all_b = [F.pad(b, (0, rank - len(a))) for a, b in pairs]
    return torch.stack(all_a).to(dtype), torch.stack(all_b).to(dtype)
