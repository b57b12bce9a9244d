"""LoRA layers, put into a frozen model in place of the linear layers that they extend.

Names, shapes and scales are PEFT's, through the adapter leaf that the server reads with.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lorax_serve.adapter import LoRAConfig, ModuleKind, ModuleShape, Role, tensor_name
from lorax_train.base import output_head
from lorax_train.config import InjectionConfig
from lorax_train.targets import resolve_targets

__all__ = ["LoRALinear", "TrainableLoRA", "init_a", "inject", "linear_shapes", "lora_linear"]

# The ancestor's A ~ N(0, 0.01) is Axon's normal initialiser, whose scale is a standard deviation.
# PEFT's gaussian has 1/r, which for the ancestor's r = 1 is a hundred times as much.
_GAUSSIAN_STD = 0.01


def lora_linear(
    y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float
) -> torch.Tensor:
    """``y + scale * (x @ a.T) @ b.T`` (arXiv:2106.09685).

    Args:
        y: ``[..., out]``, the frozen layer's output.
        x: ``[..., in]``, in y's dtype.
        a: ``[r, in]`` float32; cast to x's dtype, so that both products run in the base's dtype.
        b: ``[out, r]`` float32; likewise.
        scale: applied to the ``[..., r]`` product, the smallest tensor here.
    """
    h = F.linear(x, a.to(x.dtype)) * scale
    flat = torch.addmm(y.flatten(0, -2), h.flatten(0, -2), b.to(x.dtype).t())
    return flat.view(y.shape)


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


class LoRALinear(nn.Module):
    """A frozen ``nn.Linear`` or ``Conv1D`` with one trainable LoRA pair in float32."""

    def __init__(
        self, base: nn.Linear | Conv1D, a: torch.Tensor, out: int, scale: float, dropout: float
    ) -> None:
        super().__init__()
        self.base = base
        self.scale = scale
        self.dropout = dropout
        device = base.weight.device
        self.lora_a = nn.Parameter(a.to(device))
        self.lora_b = nn.Parameter(torch.zeros(out, a.shape[0], device=device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``[..., in]`` to ``[..., out]``; dropout acts on the LoRA branch only, as in PEFT."""
        branch = F.dropout(x, self.dropout, self.training) if self.dropout else x
        return lora_linear(self.base(x), branch, self.lora_a, self.lora_b, self.scale)

    @property
    def weight(self) -> torch.Tensor:
        """The base's weight: some models look at its dtype or device."""
        return self.base.weight

    @property
    def bias(self) -> torch.Tensor | None:
        """The base's bias."""
        return self.base.bias


@dataclass(frozen=True)
class TrainableLoRA:
    """The adapter in training.

    Attributes:
        config: as it is written to ``adapter_config.json``.
        shapes: every linear module of the base by path, as the server sees them.
        layers: the LoRA layers by path, in the model's order.
    """

    config: LoRAConfig
    shapes: Mapping[str, ModuleShape]
    layers: Mapping[str, LoRALinear]

    def parameters(self) -> list[nn.Parameter]:
        """Every A and B."""
        return [p for layer in self.layers.values() for p in (layer.lora_a, layer.lora_b)]

    @property
    def n_parameters(self) -> int:
        """How many numbers are trained."""
        return sum(p.numel() for p in self.parameters())

    def train(self, mode: bool) -> None:
        """Turn the adapter's dropout on or off; the base stays as it is."""
        for layer in self.layers.values():
            layer.training = mode

    def tensors(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """A and B by PEFT's names, copied to the CPU in ``dtype``."""
        return {
            tensor_name(path, role): weight.detach().to("cpu", dtype, copy=True)
            for path, layer in self.layers.items()
            for role, weight in ((Role.A, layer.lora_a), (Role.B, layer.lora_b))
        }


def linear_shapes(model: PreTrainedModel) -> dict[str, ModuleShape]:
    """Every linear module of ``model`` by path, in the model's order."""
    head = output_head(model)
    shapes = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            size = module.in_features, module.out_features
        elif isinstance(module, Conv1D):  # stores W as [in, out]
            size = module.weight.shape[0], module.weight.shape[1]
        else:
            continue
        kind = ModuleKind.OUTPUT if module is head else ModuleKind.LINEAR
        shapes[path] = ModuleShape(*size, kind)
    return shapes


def inject(
    model: PreTrainedModel, settings: InjectionConfig, base_name: str, seed: int
) -> TrainableLoRA:
    """Replace the targeted linear modules of a frozen model by ``LoRALinear``, in place.

    Raises:
        TrainingError: when a target matches nothing.
    """
    shapes = linear_shapes(model)
    paths, names = resolve_targets(settings.targets, shapes)
    modules = {path: model.get_submodule(path) for path in paths}
    config = LoRAConfig(
        r=settings.r,
        lora_alpha=settings.lora_alpha,
        target_modules=names,
        lora_dropout=settings.dropout,
        use_rslora=settings.rslora,
        fan_in_fan_out=all(isinstance(module, Conv1D) for module in modules.values()),
        init_lora_weights=True if settings.init == "kaiming" else settings.init,
        base_model_name_or_path=base_name,
    )
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for path, module in modules.items():
        assert isinstance(module, nn.Linear | Conv1D)  # linear_shapes lists nothing else
        shape = shapes[path]
        a = init_a(settings.r, shape.in_features, settings.init, generator)
        layer = LoRALinear(module, a, shape.out_features, config.scale_for(path), settings.dropout)
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, layer.eval())
        layers[path] = layer
    return TrainableLoRA(config, shapes, layers)
