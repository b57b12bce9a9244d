"""The form of an adapter that loads rightly where little of PEFT's config is read.

llama.cpp scales by alpha over a tensor's rank, whatever the config says; others drop the patterns
of ranks and alphas, or rsLoRA. So the scale is a part of B, every module has the same rank, and
alpha is equal to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F

from lorax_serve.adapter import (
    LoRAConfig,
    LoRAWeights,
    ModuleKind,
    ModuleShape,
    Role,
    select_targets,
    tensor_name,
)
from lorax_serve.errors import AdapterRejected, TrainingError

__all__ = ["check_portable", "portable"]


def portable(
    config: LoRAConfig, weights: LoRAWeights, modules: Mapping[str, ModuleShape]
) -> tuple[LoRAConfig, dict[str, torch.Tensor]]:
    """Fold the scales into B, and pad all ranks with zeros to the largest.

    Args:
        config: the adapter's.
        weights: its tensors, matched with the base.
        modules: of the base.

    Returns:
        A config with ``lora_alpha`` equal to ``r`` and nothing that changes a scale, and tensors by
        PEFT's names: A ``[r, in]`` in its own dtype, B ``[out, r]`` in its own dtype where the
        folding is exact in it, else in float32.

    Raises:
        TrainingError: it is more than LoRA on linear modules.
    """
    check_portable(config, weights.pairs, modules)
    if weights.parameters:
        raise TrainingError(
            f"the adapter has a copy of {min(weights.parameters)} that differs from the base's, "
            "which plain LoRA loaders do not read: it has no portable form"
        )
    r = weights.max_rank
    tensors: dict[str, torch.Tensor] = {}
    for path, pair in weights.pairs.items():
        more = r - pair.rank
        tensors[tensor_name(path, Role.A)] = F.pad(pair.a, (0, 0, 0, more))
        scaled = pair.b.float() * pair.scale
        if not bool(scaled.isfinite().all()):
            raise TrainingError(f"{tensor_name(path, Role.B)} overflows once it is scaled")
        same = scaled.to(pair.b.dtype)
        b = same if torch.equal(same.float(), scaled) else scaled
        tensors[tensor_name(path, Role.B)] = F.pad(b, (0, more))
    plain = LoRAConfig(
        r=r,
        lora_alpha=r,
        target_modules=_names(list(weights.pairs), modules),
        lora_dropout=config.lora_dropout,
        fan_in_fan_out=config.fan_in_fan_out,
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
    )
    return plain, tensors


def _names(paths: list[str], modules: Mapping[str, ModuleShape]) -> tuple[str, ...]:
    """The last parts of the paths, if they select these alone; else the paths."""
    last = tuple(sorted({path.rpartition(".")[2] for path in paths}))
    try:
        selected = select_targets(LoRAConfig(target_modules=last), modules)
    except AdapterRejected:
        return tuple(sorted(paths))
    return last if sorted(selected) == sorted(paths) else tuple(sorted(paths))


def check_portable(
    config: LoRAConfig, paths: Iterable[str], modules: Mapping[str, ModuleShape]
) -> None:
    """Make sure that an adapter with LoRA on ``paths`` has a portable form.

    Raises:
        TrainingError: naming what it has beside LoRA on linear modules.
    """
    linear = (ModuleKind.LINEAR, ModuleKind.OUTPUT)
    found = {
        "DoRA (use_dora)": config.use_dora,
        "lora_bias": config.lora_bias,
        "LoRA on an embedding": any(modules[path].kind not in linear for path in paths),
        f"trained biases (bias={config.bias!r})": config.bias != "none",
        "modules_to_save": config.modules_to_save,
        "trainable_token_indices": config.trainable_token_indices,
        "alora_invocation_tokens": config.alora_invocation_tokens,
    }
    beyond = ", ".join(what for what, is_there in found.items() if is_there)
    if beyond:
        raise TrainingError(
            f"the adapter has {beyond}, which plain LoRA loaders do not apply: it has no portable "
            "form; use it as it is, or merge it into the base (lorax-train merge)"
        )
