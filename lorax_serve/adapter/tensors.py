"""PEFT's names of an adapter's tensors: which module each belongs to, and what it is of it."""

from __future__ import annotations

import re
from enum import Enum
from typing import NamedTuple

__all__ = ["PREFIX", "Role", "TensorKey", "explain_foreign", "parse_key", "tensor_name"]

PREFIX = "base_model.model."


class Role(Enum):
    """What a tensor is of its module. The values are PEFT's endings."""

    A = "lora_A.weight"
    B = "lora_B.weight"
    B_BIAS = "lora_B.bias"
    EMBEDDING_A = "lora_embedding_A"
    EMBEDDING_B = "lora_embedding_B"
    MAGNITUDE = "lora_magnitude_vector"
    TOKENS = "token_adapter.trainable_tokens_delta"
    """Whole rows of an embedding, despite the name."""
    WEIGHT = "weight"
    """Of a module in ``modules_to_save``."""
    BIAS = "bias"
    """The base module's own bias, trained."""
    BASE_WEIGHT = "base_layer.weight"
    """The base's own weight, which PEFT stores beside LoRA on embeddings."""
    BASE_BIAS = "base_layer.bias"
    """As ``BIAS``, of a module with LoRA."""


class TensorKey(NamedTuple):
    """A tensor's place in the base model."""

    path: str
    role: Role


_ENDINGS = "|".join(
    re.escape(role.value) for role in sorted(Role, key=lambda role: -len(role.value))
)
_KEY = re.compile(rf"(?P<path>.+?)\.(?P<ending>{_ENDINGS})")
# Older versions of PEFT.
_OLD_MAGNITUDE = ".lora_magnitude_vector.weight"


def tensor_name(path: str, role: Role) -> str:
    """PEFT's name of a tensor."""
    return f"{PREFIX}{path}.{role.value}"


def parse_key(name: str) -> TensorKey | None:
    """The place of a tensor, given its name with or without PEFT's prefix; None if it has none."""
    if name.endswith(_OLD_MAGNITUDE):
        name = name.removesuffix(".weight")
    match = _KEY.fullmatch(name.removeprefix(PREFIX))
    if match is None or ".lora_" in match["path"]:
        return None
    return TensorKey(match["path"], Role(match["ending"]))


def explain_foreign(name: str) -> str:
    """Why a name is none of those above."""
    if re.search(r"\.lora_\w+\.(?!weight|bias)[^.]+(\.|$)", name):
        return (
            "an adapter's name inside a tensor's name: save it with PEFT's save_pretrained, which "
            "leaves that out"
        )
    return f"not a LoRA tensor in PEFT's naming ({tensor_name('<path>', Role.A)})"
