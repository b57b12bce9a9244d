"""Frozen linear layers as products with a weight, whatever module holds it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorax_train.model.lora import FrozenProduct

__all__ = ["Conv1DProduct", "LinearProduct", "product_of"]


class LinearProduct:
    """Of an ``nn.Linear``, whose weight is ``[out, in]``."""

    def __init__(self, module: nn.Linear) -> None:
        self._module = module

    def forward_product(self, x: torch.Tensor) -> torch.Tensor:
        """``x @ W.T + bias``."""
        return F.linear(x, self._module.weight, self._module.bias)

    def backward_product(self, dy: torch.Tensor) -> torch.Tensor:
        """``dy @ W``."""
        return dy @ self._module.weight

    def dense(self) -> torch.Tensor:
        """The weight ``[out, in]``."""
        return self._module.weight


class Conv1DProduct:
    """Of GPT-2's ``Conv1D``, whose weight is ``[in, out]``."""

    def __init__(self, module: Conv1D) -> None:
        self._module = module

    def forward_product(self, x: torch.Tensor) -> torch.Tensor:
        """``x @ W + bias``."""
        return torch.addmm(self._module.bias, x, self._module.weight)

    def backward_product(self, dy: torch.Tensor) -> torch.Tensor:
        """``dy @ W.T``."""
        return dy @ self._module.weight.T

    def dense(self) -> torch.Tensor:
        """The weight as ``[out, in]``."""
        return self._module.weight.T


def product_of(module: nn.Module) -> FrozenProduct:
    """The product that a frozen module computes."""
    if isinstance(module, Conv1D):
        return Conv1DProduct(module)
    if isinstance(module, nn.Linear):
        return LinearProduct(module)
    quantized: Any = module  # which says itself
    product: FrozenProduct = quantized.product()
    return product
