"""What PEFT makes of a config on the tiny model: the oracle of the adapter tests."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM

from lorax_serve.adapter import ModuleKind, ModuleShape
from tests.helpers import TINY_LLAMA


class PeftLayer(NamedTuple):
    """One LoRA layer that PEFT made."""

    rank: int
    scale: float


def tiny_base() -> Any:
    """The tiny Llama with any weights."""
    auto: Any = AutoModelForCausalLM
    return auto.from_config(TINY_LLAMA, dtype=torch.float32)


def tiny_modules() -> dict[str, ModuleShape]:
    """Every linear module of the tiny Llama, from transformers' own modules."""
    return {
        name: ModuleShape(
            module.in_features,
            module.out_features,
            ModuleKind.OUTPUT if name == "lm_head" else ModuleKind.LINEAR,
        )
        for name, module in tiny_base().named_modules()
        if isinstance(module, torch.nn.Linear)
    }


def peft_layers(config: Any) -> dict[str, PeftLayer]:
    """The modules that PEFT puts LoRA on for a ``peft.LoraConfig``, by path."""
    from peft import get_peft_model
    from peft.tuners.lora import LoraLayer

    model = get_peft_model(tiny_base(), config)
    return {
        name.removeprefix("base_model.model."): PeftLayer(
            module.r["default"], module.scaling["default"]
        )
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }
