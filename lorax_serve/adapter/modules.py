"""What an adapter can change in a base model: its modules by path, with their sizes."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

__all__ = ["ModuleKind", "ModuleShape"]


class ModuleKind(Enum):
    """What a module computes, which decides how PEFT changes it and names its tensors."""

    LINEAR = "linear"
    OUTPUT = "output"
    """The linear that makes logits (lm_head), which ``all-linear`` leaves out."""
    EMBEDDING = "embedding"
    """Of tokens: ``in_features`` is the vocabulary, ``out_features`` the hidden size."""
    POSITIONS = "positions"
    """A learned embedding of positions."""
    NORM = "norm"


class ModuleShape(NamedTuple):
    """A module of the base model.

    A linear is ``y = x @ W.T + bias`` with W of ``[out_features, in_features]``, however the
    checkpoint stores it.

    Attributes:
        tied_to: of the output only: the path of the embedding that it shares its weight with.
    """

    in_features: int
    out_features: int
    kind: ModuleKind = ModuleKind.LINEAR
    has_bias: bool = False
    tied_to: str | None = None
