"""Frozen parts of a model, computed as before, that keep less for the gradient.

What Hugging Face's modules compute is repeated operation by operation, so the values have the same
bits; the gradient is written by hand. A module is replaced only if a trial agrees.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

__all__ = ["LeanMLP", "LeanRMSNorm", "make_lean"]

_GATED = ("gate_proj", "up_proj", "down_proj")


class _RMSNorm(torch.autograd.Function):
    """Keeps x and one number a token, instead of three float32 copies of x."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, scale)
        ctx.weight = weight
        return weight * (wide * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
        x, scale = ctx.saved_tensors
        normed = x.float() * scale
        d = (dy * ctx.weight).float()
        d -= normed * (d * normed).mean(-1, keepdim=True)
        return (d * scale).to(x.dtype), None, None


class _GatedSiLU(torch.autograd.Function):
    """Keeps gate and up, and not the SiLU between them."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        silu = F.silu(gate)
        dgate = torch.ops.aten.silu_backward(dy * up, gate)
        return dgate, dy * silu


class LeanRMSNorm(nn.Module):
    """``weight * (x / sqrt(mean(x^2) + eps))``, normed in float32, for a frozen weight."""

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        super().__init__()
        self.weight = weight
        self.variance_epsilon = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., n]`` to the same."""
        function: Any = _RMSNorm
        out: torch.Tensor = function.apply(x, self.weight, self.variance_epsilon)
        return out


class LeanMLP(nn.Module):
    """``down(silu(gate(x)) * up(x))``."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., hidden]`` to the same."""
        function: Any = _GatedSiLU
        out: torch.Tensor = self.down_proj(function.apply(self.gate_proj(x), self.up_proj(x)))
        return out


def make_lean(model: PreTrainedModel) -> int:
    """Replace what can be replaced, in place; returns how many modules that are.

    The model's paths stay as they are.
    """
    replaced = 0
    for path, module in list(model.named_modules()):
        found = _lean(module, model)
        if found is None:
            continue
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, found)
        replaced += 1
    return replaced


@torch.no_grad()
def _lean(module: Any, model: PreTrainedModel) -> nn.Module | None:
    eps = getattr(module, "variance_epsilon", None)
    # Asked for second: a quantised layer would dequantise its weight to answer.
    weight = getattr(module, "weight", None) if isinstance(eps, float) else None
    if isinstance(weight, torch.Tensor) and isinstance(eps, float) and weight.ndim == 1:
        found: nn.Module = LeanRMSNorm(weight, eps)
        width = len(weight)
    elif all(isinstance(getattr(module, name, None), nn.Module) for name in _GATED):
        found = LeanMLP(module)
        width = getattr(module.gate_proj, "in_features", 0)
    else:
        return None
    if not width or len(inspect.signature(module.forward).parameters) != 1:
        return None
    trial = torch.linspace(-3, 5, 2 * width, device=model.device, dtype=model.dtype).view(2, -1)
    return found if torch.equal(module(trial), found(trial)) else None
