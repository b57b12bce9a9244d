"""LoRA layers, put into a frozen model in place of the layers that they extend.

One model takes any number of adapters at once. Names, shapes and scales are PEFT's, through the
adapter leaf that the server reads with.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lorax_serve.adapter import LoRAConfig, ModuleKind, ModuleShape, Role, tensor_name
from lorax_train.config import InjectionConfig
from lorax_train.model.base import output_head
from lorax_train.model.layers import LoRAEmbedding, LoRALayer, LoRALinear, Pair, Routing
from lorax_train.model.quantize import QuantizedLinear
from lorax_train.model.start import starting_pair
from lorax_train.model.targets import resolve_targets

__all__ = ["TrainableLoRA", "inject", "inject_all", "module_shapes", "tied_targets"]


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
        """Turn dropout on or off in this adapter's layers; the base stays as it is."""
        for layer in self.layers.values():
            layer.training = mode

    def alone(self) -> AbstractContextManager[None]:
        """Have all tokens be this adapter's within the block."""
        return self.routing.alone(self.index)

    def switched_off(self) -> AbstractContextManager[None]:
        """Have the model be the base within the block, bit for bit."""
        return self.routing.switched_off()

    @contextmanager
    def rounded(self, dtype: torch.dtype) -> Iterator[None]:
        """Compute within the block what the files in ``dtype`` will."""
        kept = self.pairs()
        for path, pair in kept.items():
            self._set(path, pair.rounded(dtype))
        try:
            yield
        finally:
            for path, pair in kept.items():
                self._set(path, pair)

    def tensors(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """What is saved, by PEFT's names, copied to the CPU in ``dtype``."""
        found = {}
        for path, pair in self.pairs().items():
            on_tokens = isinstance(self.layers[path], LoRAEmbedding)
            roles = (Role.EMBEDDING_A, Role.EMBEDDING_B) if on_tokens else (Role.A, Role.B)
            by_role = dict(zip(roles, pair.whole, strict=True))
            if pair.magnitude is not None:
                by_role[Role.MAGNITUDE] = pair.magnitude
            for role, tensor in by_role.items():
                found[tensor_name(path, role)] = tensor.detach().to("cpu", dtype, copy=True)
        return found

    def _set(self, path: str, pair: Pair) -> None:
        layer = self.layers[path]
        layer.pairs[layer.members[self.index]] = pair


def module_shapes(model: PreTrainedModel) -> dict[str, ModuleShape]:
    """Every module of ``model`` that can have LoRA by path, in the model's order."""
    head = output_head(model)
    embedding: Any = model.get_input_embeddings()
    shapes = {}
    for path, module in model.named_modules():
        if module is embedding:
            size = module.num_embeddings, module.embedding_dim
        elif isinstance(module, Conv1D):  # stores W as [in, out]
            size = module.weight.shape[0], module.weight.shape[1]
        elif isinstance(module, nn.Linear | QuantizedLinear):
            size = module.in_features, module.out_features
        else:
            continue
        kind = ModuleKind.OUTPUT if module is head else ModuleKind.LINEAR
        shapes[path] = ModuleShape(*size, ModuleKind.EMBEDDING if module is embedding else kind)
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
        settings: of each adapter.
        base_name: for the adapters' configs.
        seeds: of each adapter's start.

    Raises:
        TrainingError: when a target matches nothing, or a layer cannot have what is asked for.
    """
    shapes = module_shapes(model)
    routing = Routing()
    layers: dict[str, LoRALayer] = {}
    transposed = {path for path in shapes if _is_transposed(model.get_submodule(path))}
    adapters = []
    for index, (own, seed) in enumerate(zip(settings, seeds, strict=True)):
        targets = resolve_targets(own.targets, shapes, own.layers)
        linear = [p for p in targets.paths if shapes[p].kind is not ModuleKind.EMBEDDING]
        # What PiSSA's start is written out with has twice the rank, at the same scale.
        times = 2 if own.init == "pissa" else 1
        config = LoRAConfig(
            r=own.r * times,
            lora_alpha=own.lora_alpha * (math.sqrt(times) if own.rslora else times),
            target_modules=targets.names,
            layers_to_transform=targets.layers,
            lora_dropout=own.dropout,
            use_rslora=own.rslora,
            use_dora=own.dora,
            fan_in_fan_out=bool(linear) and transposed.issuperset(linear),
            init_lora_weights=own.init if own.init == "gaussian" else True,
            base_model_name_or_path=base_name,
        )
        generator = torch.Generator().manual_seed(seed)
        for path in targets.paths:
            if path not in layers:
                layers[path] = _replace(model, path, routing, list(shapes).index(path))
            scale = config.scale_for(path)
            pair = starting_pair(layers[path], path, shapes[path], own, scale, generator)
            layers[path].add(index, pair)
        own_layers = {path: layers[path] for path in targets.paths}
        adapters.append(TrainableLoRA(config, shapes, own_layers, index, routing))
    return adapters


def _is_transposed(module: nn.Module) -> bool:
    """Whether the base stores this weight as ``[in, out]``, which PEFT must be told."""
    if isinstance(module, QuantizedLinear):
        return module.transposed
    return isinstance(module, Conv1D)


def tied_targets(model: PreTrainedModel, adapter: TrainableLoRA) -> list[str]:
    """The paths of an adapter's layers whose weight is also another module's.

    As in PEFT without ``ensure_weight_tying``, LoRA acts on the one that is named: the shared
    weight stays as it is, so the adapter is exact until somebody merges it into that weight.
    """
    head, embedding = output_head(model), model.get_input_embeddings()
    tied = {id(each) for each in (head, embedding)} if _share_weight(head, embedding) else set()
    return [path for path, layer in adapter.layers.items() if id(layer) in tied]


def _share_weight(*modules: Any) -> bool:
    weights = [getattr(module, "weight", None) for module in modules]
    return weights[0] is not None and weights[0] is weights[1]


def _replace(model: PreTrainedModel, path: str, routing: Routing, number: int) -> LoRALayer:
    module = model.get_submodule(path)
    kind = LoRAEmbedding if isinstance(module, nn.Embedding) else LoRALinear
    layer = kind(module, routing, number)
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, layer.eval())
    return layer
