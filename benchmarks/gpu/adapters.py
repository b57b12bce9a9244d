"""Random adapters on all linears: in memory for slots, on disk for loads, and what they weigh."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from lorax_serve.adapter import (
    LoRAConfig,
    LoRAPair,
    LoRAWeights,
    ModuleKind,
    ModuleShape,
    Role,
    save,
    tensor_name,
)

__all__ = ["TARGETS", "adapter_bytes", "random_adapter", "write_adapter"]

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linears of a Llama's layer, by the names that PEFT wants."""

_DEVIATION = 0.02


def random_adapter(
    modules: Mapping[str, ModuleShape], rank: int, dtype: torch.dtype, device: torch.device
) -> LoRAWeights:
    """An adapter in host memory; ``device`` is where its numbers are drawn, which is faster.

    Args:
        modules: the model's, by path.
        rank: of all linears.
        dtype: of A and B.
        device: any.
    """
    generator = torch.Generator(device).manual_seed(rank)

    def random(*size: int) -> torch.Tensor:
        tensor = torch.empty(size, dtype=dtype, device=device)
        return tensor.normal_(std=_DEVIATION, generator=generator).cpu()

    return LoRAWeights(
        {
            path: LoRAPair(random(rank, shape.in_features), random(shape.out_features, rank), 1.0)
            for path, shape in _linears(modules).items()
        }
    )


def write_adapter(directory: Path, weights: LoRAWeights) -> None:
    """Write it as PEFT does."""
    tensors = {}
    for path, pair in weights.pairs.items():
        tensors[tensor_name(path, Role.A)] = pair.a
        tensors[tensor_name(path, Role.B)] = pair.b
    rank = weights.max_rank
    save(directory, LoRAConfig(r=rank, lora_alpha=rank, target_modules=TARGETS), tensors)


def adapter_bytes(modules: Mapping[str, ModuleShape], rank: int, itemsize: int = 2) -> int:
    """Bytes of A and B of such an adapter."""
    shapes = _linears(modules).values()
    return itemsize * rank * sum(shape.in_features + shape.out_features for shape in shapes)


def _linears(modules: Mapping[str, ModuleShape]) -> dict[str, ModuleShape]:
    return {path: shape for path, shape in modules.items() if shape.kind is ModuleKind.LINEAR}
