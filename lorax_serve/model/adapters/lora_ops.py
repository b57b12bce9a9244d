"""LoRA on a batch of rows, in plain torch: the reference and the fast ways to the same result.

All of them add ``x[t] @ A[s].T @ B[s]`` to ``y[t]`` in place, for each row t with adapter slot s;
B is scaled already. Rows without adapter are left bit for bit as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from lorax_serve.model.adapters.folded import EmbeddingChange, SiteLoRA, TokenTable

__all__ = [
    "StackedLoRA",
    "add_lora_masked",
    "add_lora_reference",
    "add_lora_segment",
    "change_embeddings",
    "replace_logits",
    "scale_and_shift",
]


@dataclass(frozen=True, slots=True)
class StackedLoRA:
    """Several adapters at one site, as one pair of matrices.

    Attributes:
        a: ``[R, in]``, all their A below each other, R the sum of true ranks.
        b: ``[R, out]``, each B in its own rows and columns, zero elsewhere.
        ranks: each adapter's number of rows, in order.
    """

    a: torch.Tensor
    b: torch.Tensor
    ranks: tuple[int, ...]

    @classmethod
    def build(cls, adapters: Sequence[SiteLoRA | None], out_features: int) -> StackedLoRA | None:
        """Stack the adapters that have LoRA at this site; None if not one has."""
        present = [adapter for adapter in adapters if adapter is not None]
        if not present:
            return None
        a = torch.cat([adapter.a for adapter in present])
        b = a.new_zeros(a.shape[0], out_features)
        first = 0
        for adapter in present:
            for rows, columns, part in adapter.parts:
                b[first + rows.start : first + rows.stop, columns] = part
            first += adapter.a.shape[0]
        ranks = tuple(0 if adapter is None else adapter.a.shape[0] for adapter in adapters)
        return cls(a, b, ranks)


def add_lora_reference(
    x: torch.Tensor, y: torch.Tensor, slots: Sequence[int], adapters: Mapping[int, SiteLoRA]
) -> None:
    """Row by row, as written above. x ``[T, in]``, y ``[T, out]``, ``slots`` of length T."""
    for row, slot in enumerate(slots):
        adapter = adapters.get(slot)
        if adapter is None:
            continue
        for rows, columns, b in adapter.parts:
            y[row, columns] += x[row] @ adapter.a[rows].T @ b


def add_lora_masked(
    x: torch.Tensor, y: torch.Tensor, stacked: StackedLoRA, foreign: torch.Tensor | None
) -> None:
    """``y += ((x @ A.T) with foreign entries zeroed) @ B``: few rows, many adapters.

    Args:
        x: ``[T, in]``.
        y: ``[T, out]``, changed in place.
        stacked: the adapters of these rows.
        foreign: bool ``[T, R]``, true where rank row r is not of row t's adapter; None if all
            rows have the one adapter. Filled, not multiplied: one adapter's overflow must not
            become another row's NaN.
    """
    h = x @ stacked.a.T
    if foreign is not None:
        h.masked_fill_(foreign, 0)
    y.addmm_(h, stacked.b)


def add_lora_segment(x: torch.Tensor, y: torch.Tensor, adapter: SiteLoRA) -> None:
    """``y += x @ A.T @ B`` for rows that share one adapter: a prompt."""
    h = x @ adapter.a.T
    for rows, columns, b in adapter.parts:
        y[:, columns].addmm_(h[:, rows], b)


def scale_and_shift(y: torch.Tensor, lora: SiteLoRA, bias: torch.Tensor | None) -> torch.Tensor:
    """``(y - bias) * gain + bias + shift`` for rows that share one adapter, in float32.

    Args:
        y: ``[T, out]``, LoRA and bias added; not changed.
        lora: its gain and shift.
        bias: ``[out]``, of the base.
    """
    result = y.float()
    if lora.gain is not None:
        own = 0 if bias is None else bias.float()
        result = (result - own) * lora.gain + own
    if lora.shift is not None:
        result = result + lora.shift
    return result.to(y.dtype)


def change_embeddings(
    x: torch.Tensor, token_ids: torch.Tensor, change: EmbeddingChange
) -> torch.Tensor:
    """The embeddings of tokens that share one adapter, ``[T, hidden]``.

    Rank by rank: products of matrices round differently with their number of rows, and a token's
    embedding must not depend on its neighbours.

    Args:
        x: ``[T, hidden]``, of the base; not changed.
        token_ids: ``[T]``.
        change: what the adapter does.
    """
    result = x if change.table is None else F.embedding(token_ids, change.table)
    if change.tokens is not None:
        table = change.tokens.token_ids
        if len(table):
            place = torch.searchsorted(table, token_ids.long()).clamp_(max=len(table) - 1)
            known = table[place] == token_ids
            result = torch.where(known[:, None], change.tokens.rows[place], result)
    if change.a is not None and change.b is not None:
        total, a = result.float(), F.embedding(token_ids, change.a).float()
        for column, b in zip(a.T, change.b.float(), strict=True):
            total = total + column[:, None] * b
        result = (total if change.gain is None else total * change.gain).to(x.dtype)
    return result


def replace_logits(logits: torch.Tensor, h: torch.Tensor, tokens: TokenTable) -> None:
    """Put the logits of replaced rows of the output's weight in place, a row at a time.

    Args:
        logits: float32 ``[T, vocab]``, changed in place.
        h: ``[T, hidden]``, normed.
        tokens: the rows.
    """
    for row, own in zip(logits, h, strict=True):
        row[tokens.token_ids] = F.linear(own[None], tokens.rows)[0].float()
