"""Variants added up, each with its scale, as PEFT adds them up."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["COMPOSITIONS", "compositions_of", "peft_side_by_side", "peft_sum"]

COMPOSITIONS: dict[str, dict[str, float]] = {
    "one, scaled": {"linear": -0.8},
    "one with patterns, scaled": {"patterns": 0.5},
    "two added up": {"linear": 0.7, "rank 64": -0.4},
    "three added up": {"rslora": 0.5, "layers_to_transform": 2, "linear": 1},
    "embedding and lm_head added up": {"embedding": 0.6, "embedding and lm_head": -1.2},
    "eight added up": {
        "rank 64": -0.3,
        "layers_to_transform": 1,
        "linear": 0.5,
        "embedding": 0.8,
        "lm_head": -0.7,
        "rslora": 0.4,
        "exclude_modules": 0.6,
        "float16 file": 0.3,
    },
}
# What PEFT 0.21 takes over from the first of them, and applies to the sum: use_rslora multiplies it
# by the root of its rank.
_OF_THE_FIRST = ("use_rslora", "layers_to_transform", "exclude_modules")


def compositions_of(variants: Mapping[str, Path]) -> list[str]:
    """Those that can be made of these variants."""
    return [name for name, parts in COMPOSITIONS.items() if parts.keys() <= variants.keys()]


def peft_sum(base: Any, parts: Mapping[str, float], adapters: Mapping[str, Path]) -> Any:
    """The model with what ``add_weighted_adapter`` makes of the parts."""
    from peft import PeftConfig

    configs = {name: PeftConfig.from_pretrained(adapters[name]) for name in parts}
    # The sum does not depend on the order; PEFT's is one if the first has nothing of this.
    names = sorted(parts, key=lambda name: any(getattr(configs[name], f) for f in _OF_THE_FIRST))
    model = _loaded(base, names, adapters)
    scales = [parts[name] for name in names]
    model.add_weighted_adapter(names, scales, "sum", combination_type="cat")
    model.set_adapter("sum")
    return model


def peft_side_by_side(base: Any, parts: Mapping[str, float], adapters: Mapping[str, Path]) -> Any:
    """The model with all parts active at once, each with its scale."""
    from peft.tuners.lora import LoraLayer

    model = _loaded(base, list(parts), adapters)
    model.base_model.set_adapter(list(parts))
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for name in parts.keys() & module.scaling.keys():
                module.set_scale(name, parts[name])
    return model


def _loaded(base: Any, names: list[str], adapters: Mapping[str, Path]) -> Any:
    from peft import PeftModel

    first, *others = names
    model = PeftModel.from_pretrained(base, adapters[first], adapter_name=first)
    for name in others:
        model.load_adapter(adapters[name], adapter_name=name)
    return model
