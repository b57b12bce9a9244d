"""An adapter's weights, each known to fit the base model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

__all__ = ["LoRAPair", "LoRAWeights", "TokenRows", "first_not_finite"]


@dataclass(frozen=True, slots=True)
class LoRAPair:
    """LoRA on one module: ``y += scale * (x @ a.T) @ b.T`` (arXiv:2106.09685).

    On an embedding of tokens, x is one-hot: ``in_features`` is the vocabulary.

    Attributes:
        a: ``[rank, in_features]``, as stored in the file.
        b: ``[out_features, rank]``, as stored in the file, not scaled.
        scale: ``alpha / rank`` or ``alpha / sqrt(rank)``, with this module's own alpha and rank.
        bias: ``[out_features]``, of ``lora_B``: scaled as it is; or None.
        magnitude: ``[out_features]``: DoRA's length of each row of the changed weight; or None.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    bias: torch.Tensor | None = None
    magnitude: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        """The true rank of this module, which may differ from the config's ``r``."""
        return self.a.shape[0]

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All that there are."""
        return tuple(t for t in (self.a, self.b, self.bias, self.magnitude) if t is not None)


@dataclass(frozen=True, slots=True)
class TokenRows:
    """Rows of an embedding, or of the output's weight, that an adapter replaces.

    Attributes:
        token_ids: which.
        rows: ``[len(token_ids), hidden]``.
    """

    token_ids: tuple[int, ...]
    rows: torch.Tensor


@dataclass(frozen=True, slots=True)
class LoRAWeights:
    """Everything that an adapter changes.

    Attributes:
        pairs: LoRA by module path.
        parameters: tensors that take the place of the base's, by the base's parameter name.
        tokens: replaced rows by the path of the embedding or output.
        invocation_tokens: where LoRA begins in a prompt (aLoRA); empty: at the first token.
    """

    pairs: Mapping[str, LoRAPair]
    parameters: Mapping[str, torch.Tensor] = field(default_factory=dict)
    tokens: Mapping[str, TokenRows] = field(default_factory=dict)
    invocation_tokens: tuple[int, ...] = ()

    @property
    def max_rank(self) -> int:
        """The largest rank of any module."""
        return max(pair.rank for pair in self.pairs.values())

    @property
    def num_modules(self) -> int:
        """How many modules of the base it changes."""
        replaced = {name.rsplit(".", 1)[0] for name in self.parameters}
        return len(self.pairs.keys() | self.tokens.keys() | replaced)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as stored."""
        rows = [part.rows for part in self.tokens.values()]
        pairs = [tensor for pair in self.pairs.values() for tensor in pair.tensors]
        return sum(tensor.nbytes for tensor in (*pairs, *self.parameters.values(), *rows))


def first_not_finite(tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """The first of the tensors that holds NaN or infinity, if one does.

    All are looked at in three calls: a call a tensor, on a thread beside a busy one, waits for the
    interpreter's lock hundreds of times. The maximum hands NaN on, and is seven times as fast as
    ``torch._foreach_norm`` in bfloat16.
    """
    filled = [tensor for tensor in tensors if tensor.numel()]
    if not filled:
        return None
    largest = torch.stack(torch._foreach_max(torch._foreach_abs(filled)))
    if bool(torch.isfinite(largest).all()):
        return None
    return next(t for t in filled if not bool(torch.isfinite(t).all()))
