"""Frozen parts of a model, computed as before, that keep less for the gradient.

What Hugging Face's modules compute is repeated operation by operation, so the values have the same
bits; the gradient is written by hand. A module is replaced only if a trial agrees.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lorax_train.model.lean_ops import PLAIN, LeanOps

__all__ = ["LeanMLP", "LeanRMSNorm", "make_lean"]

_GATED = ("gate_proj", "up_proj", "down_proj")


class _RMSNorm(torch.autograd.Function):
    """Keeps x and one number a token, instead of three float32 copies of x."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, ops: LeanOps
    ) -> torch.Tensor:
        y, scale = ops.norm(x, weight, eps)
        ctx.save_for_backward(x, scale)
        ctx.weight, ctx.ops = weight, ops
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
        x, scale = ctx.saved_tensors
        return ctx.ops.norm_gradient(dy, x, scale, ctx.weight), None, None, None


class _GatedSiLU(torch.autograd.Function):
    """Keeps gate and up, and not the SiLU between them."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, ops: LeanOps) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.ops = ops
        return ops.gated(gate, up)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
        return *ctx.ops.gated_gradient(dy, *ctx.saved_tensors), None


class LeanRMSNorm(nn.Module):
    """``weight * (x / sqrt(mean(x^2) + eps))``, normed in float32, for a frozen weight."""

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        super().__init__()
        self.weight = weight
        self.variance_epsilon = eps
        self.ops = PLAIN

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., n]`` to the same."""
        function: Any = _RMSNorm
        out: torch.Tensor = function.apply(x, self.weight, self.variance_epsilon, self.ops)
        return out


class LeanMLP(nn.Module):
    """``down(silu(gate(x)) * up(x))``."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.ops = PLAIN

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., hidden]`` to the same."""
        function: Any = _GatedSiLU
        gated = function.apply(self.gate_proj(x), self.up_proj(x), self.ops)
        out: torch.Tensor = self.down_proj(gated)
        return out


def make_lean(model: PreTrainedModel, ops: LeanOps = PLAIN) -> int:
    """Replace what can be replaced, in place; returns how many modules that are.

    The model's paths stay as they are.

    Args:
        model: frozen.
        ops: what they compute with from then on; whether they may replace the model's is tried
            with the plain ones.
    """
    replaced = 0
    for path, module in list(model.named_modules()):
        found = _lean(module, model)
        if found is None:
            continue
        parent, _, name = path.rpartition(".")
        found.ops = ops
        setattr(model.get_submodule(parent), name, found)
        replaced += 1
    return replaced


@torch.no_grad()
def _lean(module: Any, model: PreTrainedModel) -> LeanRMSNorm | LeanMLP | None:
    eps = getattr(module, "variance_epsilon", None)
    # Asked for second: a quantised layer would dequantise its weight to answer.
    weight = getattr(module, "weight", None) if isinstance(eps, float) else None
    if isinstance(weight, torch.Tensor) and isinstance(eps, float) and weight.ndim == 1:
        found: LeanRMSNorm | LeanMLP = LeanRMSNorm(weight, eps)
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
