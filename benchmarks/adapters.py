"""Random adapters on disk: small seeded weights in bfloat16 on all linear modules of a model."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from lorax_serve.adapter import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    LoRAConfig,
    ModuleKind,
    ModuleShape,
    Role,
    save,
    tensor_name,
)
from lorax_serve.model.architectures import read_spec
from lorax_serve.model.source import cache_dir

__all__ = ["adapter_bytes", "adapters_cache", "random_adapters", "write_random_adapter"]


def adapters_cache(model: Path) -> Path:
    """Where adapters for a model are kept from one benchmark to the next."""
    return cache_dir() / "bench-adapters" / model.name


def random_adapters(
    place: Path, model: Path, ranks: Sequence[int], weight_files: int = 32
) -> dict[str, Path]:
    """An adapter below ``place`` for each rank, by name; those that are there are kept.

    Of each rank, ``weight_files`` weights are written; further adapters are hard links to them,
    with another ``lora_alpha``: another digest, hence another adapter, at no disk space.
    """
    found: dict[str, Path] = {}
    seen: Counter[int] = Counter()
    for rank in ranks:
        index = seen[rank]
        seen[rank] += 1
        name = f"r{rank}-{index:04d}"
        directory = found[name] = place / name
        if (directory / CONFIG_FILE).exists():
            continue
        if index < weight_files:
            write_random_adapter(directory, model, rank, seed=index)
        else:
            _link(found[f"r{rank}-{index % weight_files:04d}"], directory, rank + index / 1000)
    return found


def write_random_adapter(directory: Path, model: Path, rank: int, seed: int) -> None:
    """An adapter for the model in the directory ``model``."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    config = _config(model, rank)
    for path, shape in _linears(model).items():
        a = torch.randn(rank, shape.in_features, generator=generator)
        b = torch.randn(shape.out_features, rank, generator=generator)
        tensors[tensor_name(path, Role.A)] = (0.02 * a).bfloat16()
        tensors[tensor_name(path, Role.B)] = (0.02 * b).bfloat16()
    save(directory, config, tensors)


def adapter_bytes(model: Path, rank: int) -> int:
    """Bytes of such an adapter's weights."""
    shapes = _linears(model).values()
    return 2 * rank * sum(shape.in_features + shape.out_features for shape in shapes)


def _linears(model: Path) -> dict[str, ModuleShape]:
    modules = read_spec(model).modules().items()
    return {path: shape for path, shape in modules if shape.kind is ModuleKind.LINEAR}


def _config(model: Path, rank: int) -> LoRAConfig:
    # By their names: not every peer knows PEFT's "all-linear".
    targets = {path.rpartition(".")[2] for path in _linears(model)}
    return LoRAConfig(r=rank, lora_alpha=rank, target_modules=tuple(sorted(targets)))


def _link(original: Path, directory: Path, alpha: float) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / WEIGHTS_FILE).unlink(missing_ok=True)
    os.link(original / WEIGHTS_FILE, directory / WEIGHTS_FILE)
    config = LoRAConfig.from_dict(json.loads((original / CONFIG_FILE).read_text()))
    text = json.dumps(replace(config, lora_alpha=alpha).to_dict())
    staged = directory / f".{CONFIG_FILE}.{os.getpid()}.tmp"
    staged.write_text(text)
    staged.replace(directory / CONFIG_FILE)
