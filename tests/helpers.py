"""Tiny models, makers of PEFT adapters, and what can be tested here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.tiny_model import TINY_GPT2 as TINY_GPT2
from benchmarks.tiny_model import TINY_LLAMA as TINY_LLAMA
from benchmarks.tiny_model import save_tiny_model as save_tiny_model
from lorax_serve.kernels.build import INSTRUCTION_SETS, compiler, cpu_lacks, instruction_sets


def _without(instruction_set: str | None = None) -> str:
    """Why kernels cannot be built and run here; empty if they can. A compiler that fails on them
    is no reason: their tests fail then."""
    if compiler() is None:
        return "there is no C++ compiler"
    if instruction_set is not None and cpu_lacks(instruction_set):
        return f"the CPU has no {', '.join(cpu_lacks(instruction_set))}"
    return "" if instruction_sets() else "not an x86 CPU with AVX2"


needs_kernels = pytest.mark.skipif(bool(_without()), reason=_without())
each_kernels = pytest.mark.parametrize(
    "kernels", ["torch", pytest.param("compiled", marks=needs_kernels), "paged"]
)
each_instruction_set = pytest.mark.parametrize(
    "instruction_set",
    [
        pytest.param(name, marks=pytest.mark.skipif(bool(_without(name)), reason=_without(name)))
        for name in INSTRUCTION_SETS
    ],
)


def save_peft_adapter(model: Path, directory: Path, **config: Any) -> Path:
    """Have PEFT write an adapter for ``model`` with random, non-zero A and B."""
    from peft import LoraConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    peft_model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **config))
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.15)
    peft_model.save_pretrained(directory)
    return directory
