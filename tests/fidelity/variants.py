"""The variants: what PEFT is asked for, on which models it means something."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lorax_serve.adapter import WEIGHTS_FILE

__all__ = [
    "BARE",
    "GPT2",
    "INVOCATION",
    "TIED",
    "UNTIED",
    "VARIANTS",
    "Variant",
    "with_prefix",
    "write_variant",
]

INVOCATION = (9, 11)
BARE = "names without the prefix"
UNTIED, TIED, GPT2 = "llama", "llama_tied", "gpt2"


@dataclass(frozen=True)
class Variant:
    """A way of making an adapter.

    Attributes:
        config: fields of PEFT's ``LoraConfig`` by the kind of model; "" stands for all others.
        rewrite: changes the files that PEFT wrote.
    """

    config: dict[str, dict[str, Any]] = field(default_factory=dict)
    rewrite: Callable[[Path], None] = lambda directory: None

    def fields(self, model: str) -> dict[str, Any] | None:
        """Of one kind of model; None if the variant says nothing on it."""
        return self.config.get(model, self.config.get(""))


def everywhere(**fields: Any) -> Variant:
    """With the same fields on all models; ``target_modules`` all linear modules by default."""
    return Variant({"": {"target_modules": "all-linear", "r": 4, "lora_alpha": 6} | fields})


def by_model(
    llama: dict[str, Any] | None, gpt2: dict[str, Any] | None, tied: dict[str, Any] | None = None
) -> Variant:
    """With fields of its own on each model; those of ``llama`` on both Llamas, if not given."""
    given = {UNTIED: llama, TIED: llama if tied is None else tied, GPT2: gpt2}
    usual = {"target_modules": "all-linear", "r": 4, "lora_alpha": 6}
    return Variant({name: usual | fields for name, fields in given.items() if fields is not None})


def _cast(dtype: torch.dtype) -> Callable[[Path], None]:
    def rewrite(directory: Path) -> None:
        tensors = load_file(directory / WEIGHTS_FILE)
        save_file({k: t.to(dtype) for k, t in tensors.items()}, directory / WEIGHTS_FILE)

    return rewrite


def _drop_prefix(directory: Path) -> None:
    tensors = load_file(directory / WEIGHTS_FILE)
    bare = {name.removeprefix("base_model.model."): t for name, t in tensors.items()}
    save_file(bare, directory / WEIGHTS_FILE)


def with_prefix(directory: Path) -> Path:
    """A copy beside it with PEFT's names again."""
    copy = directory.with_name(f"{directory.name}-prefixed")
    shutil.copytree(directory, copy, dirs_exist_ok=True)
    tensors = load_file(directory / WEIGHTS_FILE)
    save_file({f"base_model.model.{n}": t for n, t in tensors.items()}, copy / WEIGHTS_FILE)
    return copy


def _old_names(directory: Path) -> None:
    """As PEFT 0.8 wrote DoRA."""
    tensors = load_file(directory / WEIGHTS_FILE)
    ending = "lora_magnitude_vector"
    old = {f"{n}.weight" if n.endswith(ending) else n: t for n, t in tensors.items()}
    save_file(old, directory / WEIGHTS_FILE)


def _llama(*names: str) -> dict[str, Any]:
    return {"target_modules": list(names)}


VARIANTS: dict[str, Variant] = {
    "linear": everywhere(),
    "rank 64": everywhere(r=64, lora_alpha=16),
    "rslora": everywhere(r=16, lora_alpha=4, use_rslora=True),
    "patterns": by_model(
        {
            "target_modules": r".*\.(k_proj|o_proj|down_proj|gate_proj)",
            "rank_pattern": {"down_proj": 3, r"layers\.1\.self_attn\.k_proj": 5},
            "alpha_pattern": {"o_proj": 31, "gate_proj": 2},
        },
        {"rank_pattern": {"c_attn": 3, r"h\.1\.mlp\.c_proj": 7}, "alpha_pattern": {"c_fc": 2.5}},
    ),
    "layers_to_transform": by_model(
        {"target_modules": ["up_proj", "q_proj"], "layers_to_transform": [1]},
        {"target_modules": ["c_attn"], "layers_to_transform": 1, "layers_pattern": "h"},
    ),
    "exclude_modules": by_model(
        {"exclude_modules": ["q_proj", "layers.0.mlp.up_proj"]}, {"exclude_modules": r".*mlp.*"}
    ),
    "dora": everywhere(use_dora=True),
    "dora, rslora, patterns": everywhere(
        use_dora=True, use_rslora=True, rank_pattern={"down_proj": 7, "c_proj": 5}
    ),
    "dora, old names": Variant(everywhere(use_dora=True).config, _old_names),
    "lora_bias": everywhere(lora_bias=True),
    "lora_bias on lm_head": by_model(
        _llama("q_proj", "lm_head") | {"lora_bias": True},
        _llama("c_fc", "lm_head") | {"lora_bias": True},
    ),
    "bias all": everywhere(bias="all"),
    "bias lora_only": by_model(
        _llama("q_proj", "gate_proj", "down_proj") | {"bias": "lora_only"},
        _llama("c_attn") | {"bias": "lora_only"},
    ),
    "bias all, dora": everywhere(bias="all", use_dora=True),
    "embedding": by_model(_llama("embed_tokens", "v_proj"), _llama("wte", "c_attn")),
    "embedding, dora": by_model(
        _llama("embed_tokens", "v_proj") | {"use_dora": True},
        _llama("wte", "c_attn") | {"use_dora": True},
    ),
    "lm_head": by_model(_llama("lm_head", "v_proj"), _llama("lm_head", "c_fc")),
    "lm_head, dora": by_model(
        _llama("lm_head", "v_proj") | {"use_dora": True}, _llama("lm_head") | {"use_dora": True}
    ),
    "embedding and lm_head": by_model(
        _llama("embed_tokens", "lm_head", "q_proj") | {"use_rslora": True, "lora_alpha": 2},
        _llama("wte", "lm_head", "c_attn"),
    ),
    "embedding, ensure_weight_tying": by_model(
        None,
        _llama("wte", "c_attn") | {"ensure_weight_tying": True},
        tied=_llama("embed_tokens", "q_proj") | {"ensure_weight_tying": True},
    ),
    # On GPT-2, PEFT writes it so that it does not read it whole itself: refused.
    "lm_head, ensure_weight_tying": by_model(
        None,
        None,
        tied={"target_modules": r".*q_proj|lm_head", "ensure_weight_tying": True},
    ),
    "modules_to_save lm_head": everywhere(modules_to_save=["lm_head"]),
    "modules_to_save embedding": by_model(
        {"modules_to_save": ["embed_tokens"]}, {"modules_to_save": ["wte"]}
    ),
    "modules_to_save both": by_model(
        {"modules_to_save": ["embed_tokens", "lm_head"]}, {"modules_to_save": ["wte", "lm_head"]}
    ),
    "modules_to_save, ensure_weight_tying": by_model(
        None,
        {"modules_to_save": ["wte"], "ensure_weight_tying": True},
        tied={"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "modules_to_save norms": by_model(
        {"modules_to_save": ["norm"]}, {"modules_to_save": ["ln_1", "ln_f"]}
    ),
    "modules_to_save embedding and norms, dora": by_model(
        {"modules_to_save": ["embed_tokens", "norm"], "use_dora": True},
        {"modules_to_save": ["wte", "ln_2"], "use_dora": True},
    ),
    "trainable_token_indices": everywhere(trainable_token_indices=[3, 9, 77, 20]),
    "trainable_token_indices of both": by_model(
        {"trainable_token_indices": {"embed_tokens": [20, 4], "lm_head": [77, 3, 5]}}, None, tied={}
    ),
    "alora": everywhere(alora_invocation_tokens=list(INVOCATION)),
    "alora, lora_bias, lm_head": by_model(
        _llama("q_proj", "lm_head")
        | {"alora_invocation_tokens": list(INVOCATION), "lora_bias": True},
        _llama("c_attn", "lm_head")
        | {"alora_invocation_tokens": list(INVOCATION), "lora_bias": True},
    ),
    "alora, not invoked": everywhere(alora_invocation_tokens=[120, 121, 122]),
    "float16 file": Variant(everywhere().config, _cast(torch.float16)),
    "bfloat16 file": Variant(everywhere(use_dora=True).config, _cast(torch.bfloat16)),
    BARE: Variant(everywhere().config, _drop_prefix),
}


def write_variant(variant: Variant, model: Path, kind: str, directory: Path, seed: int) -> None:
    """Have PEFT write an adapter with random weights."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    auto: Any = AutoModelForCausalLM
    base = auto.from_pretrained(model, dtype=torch.float32)
    fields = variant.fields(kind)
    assert fields is not None
    peft_model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **fields))
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if not parameter.requires_grad:
                continue
            if "magnitude" in name:
                parameter.mul_(torch.empty_like(parameter).uniform_(0.7, 1.4))
            elif "lora_" in name:
                parameter.normal_(std=0.15)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    peft_model.save_pretrained(directory)
    variant.rewrite(directory)
