"""LoRA layers, put into a frozen model in place of the layers that they extend.

One model takes any number of adapters at once: each layer has those that target it, and a batch
says which tokens are whose. Names, shapes and scales are PEFT's, through the adapter leaf that the
server reads with.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lorax_serve.adapter import LoRAConfig, ModuleKind, ModuleShape, Role, tensor_name
from lorax_train.base import output_head
from lorax_train.config import InjectionConfig
from lorax_train.frozen import product_of
from lorax_train.lora import Span, lora_linear
from lorax_train.quantize import QuantizedLinear
from lorax_train.targets import resolve_targets

__all__ = [
    "LoRAEmbedding",
    "LoRALayer",
    "LoRALinear",
    "Routing",
    "TrainableLoRA",
    "init_a",
    "inject",
    "inject_all",
    "module_shapes",
]

# The ancestor's A ~ N(0, 0.01) is Axon's normal initialiser, whose scale is a standard deviation.
# PEFT's gaussian has 1/r, which for the ancestor's r = 1 is a hundred times as much.
_GAUSSIAN_STD = 0.01
_ALL = 1 << 62


@dataclass
class Routing:
    """Which tokens of the batch belong to which adapter. All layers of a model share one.

    Attributes:
        spans: by position in the batch's tokens, laid out one after another; None: all tokens are
            the first adapter's.
        on: whether adapters act at all: without them, the model is the base.
    """

    spans: Sequence[Span] | None = None
    on: bool = True
    draws: Mapping[int, int] = field(default_factory=dict)
    """A number for each adapter, of which its dropout's masks are made; new for each batch."""

    @contextmanager
    def to(self, spans: Sequence[Span] | None) -> Iterator[None]:
        """Route by these spans within the block."""
        before, self.spans = self.spans, spans
        try:
            yield
        finally:
            self.spans = before

    def alone(self, adapter: int) -> AbstractContextManager[None]:
        """Have all tokens be this adapter's within the block."""
        return self.to((Span(adapter, 0, _ALL),))

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
        a: ``[r, in]`` float32.
        b: ``[out, r]`` float32.
        scale: of the product.
        magnitude: DoRA's, ``[out]`` float32; or None.
        fixed: more rows of A and columns of B, ``[k, in]`` and ``[out, k]``, that are not trained
            (PiSSA's start, taken away again); or None.
    """

    a: nn.Parameter
    b: nn.Parameter
    scale: float
    magnitude: nn.Parameter | None = None
    fixed: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def whole(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B with what is fixed: what is applied, and saved."""
        if self.fixed is None:
            return self.a, self.b
        return torch.cat([self.a, self.fixed[0]]), torch.cat([self.b, self.fixed[1]], dim=1)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All that is trained."""
        return [p for p in (self.a, self.b, self.magnitude) if p is not None]


class LoRALayer(nn.Module):
    """A frozen layer with the LoRA pairs of the adapters that target it.

    Attributes:
        base: the frozen layer.
        members: adapter to its place in this layer.
        pairs: the adapters' shares, by place.
    """

    def __init__(self, base: nn.Module, routing: Routing, dropout: float, number: int) -> None:
        super().__init__()
        self.base = base
        self.routing = routing
        self.dropout = dropout
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
    def bias(self) -> torch.Tensor | None:
        """The base's bias."""
        return getattr(self.base, "bias", None)

    def stacked(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """All A ``[N, r, in]`` and B ``[N, out, r]``, padded to the largest rank, in ``dtype``."""
        whole = [pair.whole for pair in self.pairs]
        if len(whole) == 1:
            return whole[0][0].to(dtype)[None], whole[0][1].to(dtype)[None]
        rank = max(len(a) for a, _ in whole)
        padded = [
            (F.pad(a, (0, 0, 0, rank - len(a))), F.pad(b, (0, rank - len(a)))) for a, b in whole
        ]
        return tuple(torch.stack(each).to(dtype) for each in zip(*padded, strict=True))  # type: ignore[return-value]


class LoRALinear(LoRALayer):
    """On an ``nn.Linear``, a ``Conv1D``, or a quantized layer."""

    def __init__(self, base: nn.Module, routing: Routing, dropout: float, number: int) -> None:
        super().__init__(base, routing, dropout, number)
        self.product = product_of(base)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``[..., in]`` to ``[..., out]``; dropout acts on the LoRA branch only, as in PEFT."""
        spans = self.routing.of(x.shape[:-1].numel(), self.members)
        a, b = self.stacked(x.dtype)
        kept = self._kept(x.flatten(0, -2), spans) if self.training and self.dropout else None
        gain = 1.0 if kept is None else 1 / (1 - self.dropout)
        scales = [pair.scale * gain for pair in self.pairs]
        y = lora_linear(x, self.product, a, b, scales, spans, kept)
        if all(pair.magnitude is None for pair in self.pairs):
            return y
        return self._with_magnitudes(y, spans)

    def _kept(self, x: torch.Tensor, spans: Sequence[Span]) -> torch.Tensor:
        """What dropout keeps. It depends on the adapter's number of the batch and on this layer
        alone: so it is the same beside other adapters, when activations are computed again, and
        after a resumed run."""
        kept = torch.ones_like(x, dtype=torch.bool)
        generator = torch.Generator(device=x.device)
        for adapter, place in self.members.items():
            generator.manual_seed(hash((self.routing.draws.get(adapter, 0), self.number)))
            for span in spans:
                if span.adapter == place:
                    part = kept[span.start : span.stop]
                    part.copy_(
                        torch.rand(part.shape, generator=generator, device=x.device) >= self.dropout
                    )
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

    base: nn.Embedding

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Map ``[...]`` ids to ``[..., hidden]``. There is no dropout on ids."""
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


@dataclass(frozen=True)
class TrainableLoRA:
    """One adapter in training.

    Attributes:
        config: as it is written to ``adapter_config.json``.
        shapes: every module of the base that can have LoRA by path, as the server sees them.
        layers: the layers that it is in, by path, in the model's order.
        index: its number among the adapters of the model.
        routing: of all adapters.
    """

    config: LoRAConfig
    shapes: Mapping[str, ModuleShape]
    layers: Mapping[str, LoRALayer]
    index: int = 0
    routing: Routing = field(default_factory=Routing)

    def pairs(self) -> dict[str, Pair]:
        """Its share of each layer, by path."""
        return {path: layer.pairs[layer.members[self.index]] for path, layer in self.layers.items()}

    def parameters(self) -> list[nn.Parameter]:
        """All that is trained."""
        return [p for pair in self.pairs().values() for p in pair.parameters]

    @property
    def n_parameters(self) -> int:
        """How many numbers are trained."""
        return sum(p.numel() for p in self.parameters())

    def train(self, mode: bool) -> None:
        """Turn the adapters' dropout on or off; the base stays as it is."""
        for layer in self.layers.values():
            layer.training = mode

    def alone(self) -> AbstractContextManager[None]:
        """Have all tokens be this adapter's within the block."""
        return self.routing.alone(self.index)

    @contextmanager
    def switched_off(self) -> Iterator[None]:
        """Have the model be the base, bit for bit."""
        self.routing.on = False
        try:
            yield
        finally:
            self.routing.on = True

    def tensors(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """What is saved, by PEFT's names, copied to the CPU in ``dtype``."""
        found = {}
        for path, pair in self.pairs().items():
            on_tokens = isinstance(self.layers[path], LoRAEmbedding)
            roles = (Role.EMBEDDING_A, Role.EMBEDDING_B) if on_tokens else (Role.A, Role.B)
            a, b = (each.detach() for each in pair.whole)
            found[tensor_name(path, roles[0])] = a.to("cpu", dtype, copy=True)
            found[tensor_name(path, roles[1])] = b.to("cpu", dtype, copy=True)
            if pair.magnitude is not None:
                name = tensor_name(path, Role.MAGNITUDE)
                found[name] = pair.magnitude.detach().to("cpu", dtype, copy=True)
        return found


def init_a(
    rank: int, in_features: int, init: str, generator: torch.Generator | None = None
) -> torch.Tensor:
    """A's start, ``[rank, in_features]`` float32 on the CPU.

    ``kaiming`` is PEFT's default, uniform within ``±1/sqrt(in_features)``; ``gaussian`` is the
    ancestor's, normal with a standard deviation of 0.01.
    """
    a = torch.empty(rank, in_features)
    if init == "gaussian":
        return nn.init.normal_(a, std=_GAUSSIAN_STD, generator=generator)
    return nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)


def module_shapes(model: PreTrainedModel) -> dict[str, ModuleShape]:
    """Every module of ``model`` that can have LoRA by path, in the model's order."""
    head = output_head(model)
    embedding: Any = model.get_input_embeddings()
    shapes = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            size = module.in_features, module.out_features
        elif isinstance(module, Conv1D):  # stores W as [in, out]
            size = module.weight.shape[0], module.weight.shape[1]
        elif isinstance(module, QuantizedLinear):
            size = module.in_features, module.out_features
        elif module is embedding:
            size = module.num_embeddings, module.embedding_dim
        else:
            continue
        if module is embedding:
            kind = ModuleKind.EMBEDDING
        else:
            kind = ModuleKind.OUTPUT if module is head else ModuleKind.LINEAR
        shapes[path] = ModuleShape(*size, kind)
    return shapes


def inject(
    model: PreTrainedModel, settings: InjectionConfig, base_name: str, seed: int
) -> TrainableLoRA:
    """``inject_all`` of one adapter."""
    return inject_all(model, [settings], base_name, [seed])[0]


def inject_all(
    model: PreTrainedModel,
    settings: Sequence[InjectionConfig],
    base_name: str,
    seeds: Sequence[int],
) -> list[TrainableLoRA]:
    """Replace the targeted modules of a frozen model by LoRA layers, in place.

    Args:
        model: the base.
        settings: of each adapter. Their dropouts must be equal where they share a layer.
        base_name: for the adapters' configs.
        seeds: of each adapter's start.

    Raises:
        TrainingError: when a target matches nothing.
    """
    shapes = module_shapes(model)
    routing = Routing()
    layers: dict[str, LoRALayer] = {}
    modules = {path: model.get_submodule(path) for path in shapes}
    adapters = []
    for index, (own, seed) in enumerate(zip(settings, seeds, strict=True)):
        paths, names = resolve_targets(own.targets, shapes)
        # PiSSA's start is taken away by as many fixed ranks again, with the same scale.
        times = 2 if own.init == "pissa" else 1
        config = LoRAConfig(
            r=own.r * times,
            lora_alpha=own.lora_alpha * (math.sqrt(times) if own.rslora else times),
            target_modules=names,
            lora_dropout=own.dropout,
            use_rslora=own.rslora,
            use_dora=own.dora,
            fan_in_fan_out=all(_is_transposed(modules[path]) for path in paths),
            init_lora_weights=own.init if own.init == "gaussian" else True,
            base_model_name_or_path=base_name,
        )
        generator = torch.Generator().manual_seed(seed)
        for path in paths:
            if path not in layers:
                number = list(shapes).index(path)
                layers[path] = _replace(model, path, routing, own.dropout, number)
            shape, scale = shapes[path], config.scale_for(path)
            layers[path].add(index, _start(layers[path], shape, own, scale, generator))
        own_layers = {path: layers[path] for path in paths}
        adapters.append(TrainableLoRA(config, shapes, own_layers, index, routing))
    return adapters


def _is_transposed(module: nn.Module) -> bool:
    """Whether the base stores this weight as ``[in, out]``, which PEFT must be told."""
    if isinstance(module, QuantizedLinear):
        return module.transposed
    return isinstance(module, Conv1D)


def _replace(
    model: PreTrainedModel, path: str, routing: Routing, dropout: float, number: int
) -> LoRALayer:
    module = model.get_submodule(path)
    kind = LoRAEmbedding if isinstance(module, nn.Embedding) else LoRALinear
    layer = kind(module, routing, dropout, number)
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, layer.eval())
    return layer


def _start(
    layer: LoRALayer,
    shape: ModuleShape,
    own: InjectionConfig,
    scale: float,
    generator: torch.Generator,
) -> Pair:
    device = layer.weight.device
    if own.init == "pissa":
        assert isinstance(layer, LoRALinear)
        a, b = _principal(layer.product.dense(), own.r, scale)
        pair = Pair(nn.Parameter(a.clone()), nn.Parameter(b.clone()), scale, fixed=(a, -b))
    else:
        a = init_a(own.r, shape.in_features, own.init, generator)
        b = torch.zeros(shape.out_features, own.r)
        if isinstance(layer, LoRAEmbedding):  # PEFT starts these the other way round
            a, b = torch.zeros_like(a), torch.randn(b.shape, generator=generator)
        pair = Pair(nn.Parameter(a.to(device)), nn.Parameter(b.to(device)), scale)
    if own.dora:
        assert isinstance(layer, LoRALinear)
        pair.magnitude = nn.Parameter(layer.row_lengths(pair))
    return pair


def _principal(w: torch.Tensor, rank: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """PiSSA's start (arXiv:2404.02948): A and B whose ``scale * B A`` is the best approximation of
    ``w`` of this rank."""
    u, s, v = torch.linalg.svd(w.float(), full_matrices=False)
    root = (s[:rank] / scale).sqrt()
    return root[:, None] * v[:rank], u[:, :rank] * root
