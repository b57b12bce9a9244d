"""An adapter in the decoder's form: fused by site, scaled, in the compute type."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lorax_serve.checkpoint.weights import Norm

__all__ = ["EmbeddingChange", "FoldedAdapter", "OutputChange", "SiteLoRA", "TokenTable"]


@dataclass(frozen=True, slots=True)
class SiteLoRA:
    """What one adapter does at one fused site:
    ``y = (norm(x) @ W.T + norm(x) @ A.T @ B) * gain + bias + shift``.

    Attributes:
        a: ``[R, in]``; the A matrices of the site's targeted slices below each other.
        parts: a slice's rows of ``a``, its columns of the output, and its scaled B
            ``[rank, columns]``. R is the sum of the slices' true ranks.
        gain: float32 ``[out]``: DoRA's magnitudes over the lengths of the changed rows; or None.
        shift: float32 ``[out]``: of ``lora_B``'s bias and of trained biases; or None.
        norm: takes the place of the base's norm before the site; or None.
    """

    a: torch.Tensor
    parts: tuple[tuple[slice, slice, torch.Tensor], ...] = ()
    gain: torch.Tensor | None = None
    shift: torch.Tensor | None = None
    norm: Norm | None = None

    @property
    def plain(self) -> bool:
        """Whether it is LoRA and nothing else."""
        return self.gain is None and self.shift is None and self.norm is None

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All that there are."""
        norm = () if self.norm is None else (self.norm.weight, self.norm.bias)
        every = (self.a, *(b for _, _, b in self.parts), self.gain, self.shift, *norm)
        return tuple(tensor for tensor in every if tensor is not None)

    def to(self, device: torch.device) -> SiteLoRA:
        """The same on ``device``; itself if it is there."""
        norm = self.norm
        return SiteLoRA(
            self.a.to(device),
            tuple((rows, columns, b.to(device)) for rows, columns, b in self.parts),
            None if self.gain is None else self.gain.to(device),
            None if self.shift is None else self.shift.to(device),
            None if norm is None else Norm(norm.weight.to(device), _to(norm.bias, device)),
        )


@dataclass(frozen=True, slots=True)
class TokenTable:
    """Rows of an embedding or of the output's weight that take the place of the base's.

    Attributes:
        token_ids: int64 ``[n]``, ascending.
        rows: ``[n, hidden]``.
    """

    token_ids: torch.Tensor
    rows: torch.Tensor

    def to(self, device: torch.device) -> TokenTable:
        """The same on ``device``."""
        return TokenTable(self.token_ids.to(device), self.rows.to(device))


@dataclass(frozen=True, slots=True)
class EmbeddingChange:
    """What an adapter does to the embedding of token t:
    ``(table[t] + A[t] @ B) * gain``, or a row of ``tokens``.

    Attributes:
        table: ``[vocab, hidden]`` in place of the base's; or None.
        tokens: single rows in place of the base's; or None.
        a, b: ``[vocab, rank]`` and scaled ``[rank, hidden]``; or None.
        gain: float32 ``[hidden]``, or None.
    """

    table: torch.Tensor | None = None
    tokens: TokenTable | None = None
    a: torch.Tensor | None = None
    b: torch.Tensor | None = None
    gain: torch.Tensor | None = None

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All that there are."""
        rows = None if self.tokens is None else self.tokens.rows
        every = (self.table, rows, self.a, self.b, self.gain)
        return tuple(tensor for tensor in every if tensor is not None)

    def to(self, device: torch.device) -> EmbeddingChange:
        """The same on ``device``."""
        return EmbeddingChange(
            _to(self.table, device),
            None if self.tokens is None else self.tokens.to(device),
            _to(self.a, device),
            _to(self.b, device),
            _to(self.gain, device),
        )


@dataclass(frozen=True, slots=True)
class OutputChange:
    """What an adapter does to the output's weight, beside LoRA, which is a site's.

    Attributes:
        weight: ``[vocab, hidden]`` in place of the base's; or None.
        tokens: single rows in place of the base's; or None.
    """

    weight: torch.Tensor | None = None
    tokens: TokenTable | None = None

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All that there are."""
        rows = None if self.tokens is None else self.tokens.rows
        return tuple(tensor for tensor in (self.weight, rows) if tensor is not None)

    def to(self, device: torch.device) -> OutputChange:
        """The same on ``device``."""
        tokens = None if self.tokens is None else self.tokens.to(device)
        return OutputChange(_to(self.weight, device), tokens)


@dataclass(frozen=True, slots=True)
class FoldedAdapter:
    """One entry a site, the output's last; None where the adapter changes nothing."""

    sites: tuple[SiteLoRA | None, ...]
    embedding: EmbeddingChange | None = None
    output: OutputChange | None = None

    @property
    def plain(self) -> bool:
        """Whether it is LoRA on the layers' linears, and nothing else."""
        layers = all(site is None or site.plain for site in self.sites)
        return layers and self.embedding is None and not self.changes_output

    @property
    def changes_output(self) -> bool:
        """Whether the output is others than the base's, its norm included."""
        return self.output is not None or self.sites[-1] is not None

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All of them."""
        parts = (*self.sites, self.embedding, self.output)
        return [tensor for part in parts if part is not None for tensor in part.tensors]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def to(self, device: torch.device) -> FoldedAdapter:
        """The same on ``device``."""
        return FoldedAdapter(
            tuple(None if site is None else site.to(device) for site in self.sites),
            None if self.embedding is None else self.embedding.to(device),
            None if self.output is None else self.output.to(device),
        )


def _to(tensor: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    return None if tensor is None else tensor.to(device)
