"""The arithmetic of frozen norms and gated MLPs: as it stands, or compiled into one pass over the
memory each.

Compiled, what lies between two operations is not rounded to the tensors' dtype, so the last bits
differ.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from lorax_serve.errors import TrainingError

__all__ = ["PLAIN", "LeanOps", "compiled_ops"]


class LeanOps(NamedTuple):
    """Attributes:
    norm: of x ``[..., n]``, weight ``[n]`` and eps: the normed x, and float32 ``[..., 1]``, what x
        was multiplied by.
    norm_gradient: of dy, x, that factor and the weight: dx.
    gated: of gate and up: ``silu(gate) * up``.
    gated_gradient: of dy, gate and up: the gradients of both.
    """

    norm: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    norm_gradient: Callable[..., torch.Tensor]
    gated: Callable[..., torch.Tensor]
    gated_gradient: Callable[..., tuple[torch.Tensor, torch.Tensor]]


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    wide = x.float()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * (wide * scale).to(x.dtype), scale


def _norm_gradient(
    dy: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    normed = x.float() * scale
    d = (dy * weight).float()
    return ((d - normed * (d * normed).mean(-1, keepdim=True)) * scale).to(x.dtype)


def _gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.silu(gate) * up


def _gated_gradient(
    dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ops.aten.silu_backward(dy * up, gate), dy * F.silu(gate)


PLAIN = LeanOps(_norm, _norm_gradient, _gated, _gated_gradient)


@functools.cache
def compiled_ops(device: torch.device, dtype: torch.dtype) -> LeanOps:
    """The same, through torch.compile, for rows of any number; tried out once.

    Args:
        device, dtype: on which and in which they will be used.

    Raises:
        TrainingError: there is no compiler, saying what is needed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what torch imports then
            made: Any = [_compiled(each) for each in PLAIN]
            ops, x = LeanOps(*made), torch.ones(2, 8, dtype=dtype, device=device)
            _, scale = ops.norm(x, x[0], 1e-5)
            ops.norm_gradient(x, x, scale, x[0])
            ops.gated_gradient(x, ops.gated(x, x), x)
    except Exception as error:  # inductor's own, by the version, or the compiler's
        first = str(error).strip().partition("\n")[0]
        raise TrainingError(
            "--compile: torch.compile does not work here; on CPU it needs g++ and Python's "
            f"headers, on CUDA triton: {first}"
        ) from error
    return ops


def _compiled(plain: Callable[..., Any]) -> Callable[..., Any]:
    compiled = torch.compile(plain, dynamic=True)

    def call(*args: Any) -> Any:
        # The gradients are ours; a tensor with a graph behind it makes dynamo warn.
        return compiled(*(a.detach() if isinstance(a, torch.Tensor) else a for a in args))

    return call
