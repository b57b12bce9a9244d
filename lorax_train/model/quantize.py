"""A frozen linear layer whose weight is kept in 4 or 8 bits (QLoRA, arXiv:2305.14314).

The weight is dequantised to the compute dtype for the forward product and again for the backward
one; nothing dense is kept between the two. Two formats:

- ``nf4``: 4-bit NormalFloat in blocks of 64 with an absolute maximum each, which are themselves
  quantised to 8 bits in blocks of 256 (double quantisation): 4.13 bits a weight. By bitsandbytes.
- ``int8``: whole numbers from -127 to 127, with one float32 scale for each output. Plain torch.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorax_serve.errors import TrainingError
from lorax_train.config import Quantize

__all__ = [
    "Int8Weight",
    "NF4Weight",
    "QuantizedLinear",
    "QuantizedProduct",
    "check_available",
    "count_parameters",
]

REQUIREMENT = "bitsandbytes>=0.46"
_BLOCK = 64
_BLOCKS_OF_ABSMAX = 256
# bitsandbytes compares each element with all 16 values at once on a CPU, so a whole weight would
# take 64 times its own bytes.
_PIECE = 1 << 18


def check_available(quantize: Quantize) -> None:
    """Make sure that what a format needs is installed.

    Raises:
        TrainingError: for nf4 without bitsandbytes.
    """
    if quantize == "nf4" and importlib.util.find_spec("bitsandbytes") is None:
        raise TrainingError(
            "--quantize nf4 needs bitsandbytes, which is not installed; run "
            f"pip install '{REQUIREMENT}', or use --quantize int8, which needs nothing more"
        )


@cache
def _functional() -> Any:
    """``bitsandbytes.functional``, imported only where nf4 is asked for: it takes a second."""
    # It warns at import that a kernel for inference is missing, which is not used here.
    log = logging.getLogger("bitsandbytes")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        return importlib.import_module("bitsandbytes.functional")
    finally:
        log.setLevel(level)


class NF4Weight(nn.Module):
    """A tensor in 4-bit NormalFloat. Everything is a buffer, so that it moves with the model.

    Args:
        weight: any shape; float32, bfloat16 or float16.
        double: whether the absolute maxima are quantised too.
    """

    packed: torch.Tensor
    absmax: torch.Tensor
    code: torch.Tensor

    def __init__(self, weight: torch.Tensor, *, double: bool = True) -> None:
        super().__init__()
        self.shape = weight.shape
        self.nested = double
        functional = _functional()
        parts = [
            functional.quantize_4bit(part, blocksize=_BLOCK, quant_type="nf4")
            for part in torch.split(weight.reshape(-1), _PIECE)
        ]
        absmax = torch.cat([state.absmax for _, state in parts])
        self.register_buffer("packed", torch.cat([packed for packed, _ in parts]))
        self.register_buffer("code", parts[0][1].code)
        if double:
            mean = absmax.mean()
            absmax, state = functional.quantize_blockwise(
                absmax - mean, blocksize=_BLOCKS_OF_ABSMAX
            )
            self.register_buffer("mean", mean)
            self.register_buffer("absmax_absmax", state.absmax)
            self.register_buffer("absmax_code", state.code)
        self.register_buffer("absmax", absmax)

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """A new dense tensor."""
        functional = _functional()
        outer = None
        if self.nested:
            outer = functional.QuantState(
                absmax=self.absmax_absmax,
                code=self.absmax_code,
                blocksize=_BLOCKS_OF_ABSMAX,
                dtype=torch.float32,
            )
        state = functional.QuantState(
            absmax=self.absmax,
            shape=self.shape,
            code=self.code,
            blocksize=_BLOCK,
            quant_type="nf4",
            dtype=dtype,
            offset=self.mean if self.nested else None,
            state2=outer,
        )
        found: torch.Tensor = functional.dequantize_4bit(self.packed, state)
        return found


class Int8Weight(nn.Module):
    """A matrix ``[out, in]`` as int8, scaled so that each row's greatest element is ±127."""

    whole: torch.Tensor
    scale: torch.Tensor

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        scale = weight.abs().amax(dim=1, keepdim=True).float() / 127
        # A row of zeros stays one.
        divisor = scale.masked_fill(scale == 0, 1)
        self.register_buffer("whole", (weight / divisor).round_().to(torch.int8))
        self.register_buffer("scale", scale)

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """A new dense tensor, multiplied in float32 and rounded once: a few rows at a time, so that
        no float32 matrix exists, which the C library would keep."""
        found = torch.empty(self.whole.shape, dtype=dtype, device=self.whole.device)
        rows = max(1, _PIECE // self.whole.shape[1])
        parts = (torch.split(each, rows) for each in (found, self.whole, self.scale))
        for part, whole, scale in zip(*parts, strict=True):
            part.copy_(whole * scale)
        return found


class QuantizedProduct:
    """The product with a quantised weight, dequantised each time."""

    def __init__(self, module: QuantizedLinear) -> None:
        self._module = module

    def forward_product(self, x: torch.Tensor) -> torch.Tensor:
        """``x @ W.T + bias``."""
        return F.linear(x, self._module.dense(), self._module.bias)

    def backward_product(self, dy: torch.Tensor) -> torch.Tensor:
        """``dy @ W``."""
        return dy @ self._module.dense()

    def dense(self) -> torch.Tensor:
        """The weight ``[out, in]``, a new tensor."""
        return self._module.dense()


class QuantizedLinear(nn.Module):
    """In place of a frozen ``nn.Linear`` or ``Conv1D``.

    Args:
        weight: ``[out, in]``, on the device where it is to stay; its dtype is the compute dtype.
        bias: ``[out]``, kept as it is; or None.
        quantize: ``nf4`` or ``int8``.

    Attributes:
        in_features: of x.
        out_features: of y.
        dtype: the weight's when it is dequantised.
        transposed: whether the original is a ``Conv1D``, whose weight is ``[in, out]``.
        source: the name of the original weight in the checkpoint, None if it was converted.
        original: gives the original weight ``[out, in]``; while it is set, the layer computes with
            that instead.
    """

    bias: nn.Parameter | None

    def __init__(self, weight: torch.Tensor, bias: nn.Parameter | None, quantize: Quantize) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.dtype = weight.dtype
        self.quantized = NF4Weight(weight) if quantize == "nf4" else Int8Weight(weight)
        self.register_parameter("bias", bias)
        self.transposed = False
        self.source: str | None = None
        self.original: Callable[[], torch.Tensor] | None = None

    @classmethod
    def of(cls, module: nn.Linear | Conv1D, weight: torch.Tensor, quantize: Quantize) -> Any:
        """In place of ``module``, whose weight, as it stores it, is ``weight``."""
        transposed = isinstance(module, Conv1D)
        layer = cls(weight.T.contiguous() if transposed else weight, module.bias, quantize)
        layer.transposed = transposed
        return layer

    @torch.no_grad()
    def dense(self) -> torch.Tensor:
        """The weight ``[out, in]`` in the compute dtype, a new tensor."""
        return self.quantized.dense(self.dtype) if self.original is None else self.original()

    @property
    def weight(self) -> torch.Tensor:
        """``dense()``: some models look at a linear layer's weight."""
        return self.dense()

    def product(self) -> QuantizedProduct:
        """What LoRA layers compute with."""
        return QuantizedProduct(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``[..., in]`` to ``[..., out]``, keeping nothing for the gradient."""
        function: Any = _Frozen
        y: torch.Tensor = function.apply(x, self.product())
        return y

    def extra_repr(self) -> str:
        """The shape, as of an ``nn.Linear``."""
        return f"in_features={self.in_features}, out_features={self.out_features}"


class _Frozen(torch.autograd.Function):
    """``F.linear`` would keep the dequantised weight until the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, product: QuantizedProduct) -> torch.Tensor:
        ctx.product = product
        return product.forward_product(x)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.product.backward_product(dy), None


def count_parameters(model: nn.Module) -> int:
    """How many numbers the model has, those in quantised weights included."""
    dense = sum(parameter.numel() for parameter in model.parameters())
    quantized = (m for m in model.modules() if isinstance(m, QuantizedLinear))
    return dense + sum(layer.in_features * layer.out_features for layer in quantized)
