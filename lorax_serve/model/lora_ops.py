"""LoRA on a batch of rows, in plain torch: the reference and the fast ways to the same result.

All of them add ``x[t] @ A[s].T @ B[s]`` to ``y[t]`` in place, for each row t with adapter slot s;
B is scaled already. Rows without adapter are left bit for bit as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

__all__ = ["SiteLoRA", "StackedLoRA", "add_lora_masked", "add_lora_reference", "add_lora_segment"]


@dataclass(frozen=True, slots=True)
class SiteLoRA:
    """One adapter at one fused site.

    Attributes:
        a: ``[R, in]``; the A matrices of the site's targeted slices below each other.
        parts: a slice's rows of ``a``, its columns of the output, and its scaled B
            ``[rank, columns]``. R is the sum of the slices' true ranks.
    """

    a: torch.Tensor
    parts: tuple[tuple[slice, slice, torch.Tensor], ...]

    @property
    def nbytes(self) -> int:
        """Bytes of A and B."""
        return self.a.nbytes + sum(b.nbytes for _, _, b in self.parts)

    def to(self, device: torch.device) -> SiteLoRA:
        """The same on ``device``; itself if it is there."""
        parts = tuple((rows, columns, b.to(device)) for rows, columns, b in self.parts)
        return SiteLoRA(self.a.to(device), parts)


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
