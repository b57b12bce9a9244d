"""Random adapters on disk: small seeded weights in bfloat16 on all linear modules of a model."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Collection, Sequence
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
from lorax_serve.checkpoint.architectures import read_spec
from lorax_serve.checkpoint.source import cache_dir

__all__ = ["adapter_bytes", "adapters_cache", "random_adapters", "write_random_adapter"]


def adapters_cache(model: Path) -> Path:
    """Where adapters for a model are kept from one benchmark to the next."""
    return cache_dir() / "bench-adapters" / model.name


def random_adapters(
    place: Path,
    model: Path,
    ranks: Sequence[int],
    weight_files: int = 32,
    linears: Collection[str] | None = None,
) -> dict[str, Path]:
    """An adapter below ``place`` for each rank, by name; those that are there are kept.

    They change the linears that have one of the names ``linears``; None is all.

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
            write_random_adapter(directory, model, rank, seed=index, linears=linears)
        else:
            _link(found[f"r{rank}-{index % weight_files:04d}"], directory, rank + index / 1000)
    return found


def write_random_adapter(
    directory: Path, model: Path, rank: int, seed: int, linears: Collection[str] | None = None
) -> None:
    """An adapter for the model in the directory ``model``."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    shapes = _linears(model, linears)
    for path, shape in shapes.items():
        a = torch.randn(rank, shape.in_features, generator=generator)
        b = torch.randn(shape.out_features, rank, generator=generator)
        tensors[tensor_name(path, Role.A)] = (0.02 * a).bfloat16()
        tensors[tensor_name(path, Role.B)] = (0.02 * b).bfloat16()
    # By their names: not every peer knows PEFT's "all-linear".
    targets = {path.rpartition(".")[2] for path in shapes}
    config = LoRAConfig(r=rank, lora_alpha=rank, target_modules=tuple(sorted(targets)))
    save(directory, config, tensors)


def adapter_bytes(model: Path, rank: int, linears: Collection[str] | None = None) -> int:
    """Bytes of such an adapter's weights."""
    shapes = _linears(model, linears).values()
    return 2 * rank * sum(shape.in_features + shape.out_features for shape in shapes)


def _linears(model: Path, names: Collection[str] | None) -> dict[str, ModuleShape]:
    return {
        path: shape
        for path, shape in read_spec(model).modules().items()
        if shape.kind is ModuleKind.LINEAR and (names is None or path.rpartition(".")[2] in names)
    }


def _link(original: Path, directory: Path, alpha: float) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / WEIGHTS_FILE).unlink(missing_ok=True)
    os.link(original / WEIGHTS_FILE, directory / WEIGHTS_FILE)
    config = LoRAConfig.from_dict(json.loads((original / CONFIG_FILE).read_text()))
    text = json.dumps(replace(config, lora_alpha=alpha).to_dict())
    staged = directory / f".{CONFIG_FILE}.{os.getpid()}.tmp"
    staged.write_text(text)
    staged.replace(directory / CONFIG_FILE)
