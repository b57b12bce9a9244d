"""Which part of a model each rank of several has that compute it together.

Linears before attention and before the activation (q, k, v; gate, up) are cut by columns: heads,
and features of the MLP. Those after (o, down) are cut by the same features of their input, so that
nothing has to travel in between, and what they give is a sum over ranks. The output is cut by
tokens of the vocabulary. All else every rank has: norms, and the embedding, of which a step reads
but a row a token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from lorax_serve.checkpoint.spec import SITES_PER_LAYER, DecoderSpec, Site
from lorax_serve.errors import ModelUnsupported

__all__ = ["WHOLE", "Part", "SitePart"]

_QKV, _O, _GATE_UP, _DOWN = range(SITES_PER_LAYER)


@dataclass(frozen=True, slots=True)
class SitePart:
    """What a rank has of one site.

    Attributes:
        inputs: the features of x.
        columns: of each slice, pieces of its columns, counted from its start, in order.
        adds: whether this rank adds what must come into the sum once: biases and shifts.
    """

    inputs: slice
    columns: tuple[tuple[slice, ...], ...]
    adds: bool

    @property
    def widths(self) -> list[int]:
        """How many columns of each slice it has."""
        return [sum(piece.stop - piece.start for piece in pieces) for pieces in self.columns]

    def columns_of(self, which: int, tensor: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """A rank's columns of slice number ``which``.

        Args:
            which: the slice.
            tensor: ``dim`` goes over all columns of the slice.
            dim: which dimension does.
        """
        pieces = [_narrow(tensor, piece, dim) for piece in self.columns[which]]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)


@dataclass(frozen=True, slots=True)
class Part:
    """Rank ``rank`` of ``size``."""

    rank: int = 0
    size: int = 1

    def check(self, spec: DecoderSpec) -> None:
        """Refuse a model that cannot be cut into so many parts.

        Raises:
            ModelUnsupported: naming the number that does not divide.
        """
        for what, number in (
            ("attention heads", spec.num_heads),
            ("key and value heads", spec.num_kv_heads),
            ("features of the MLP", spec.intermediate_size),
        ):
            if number % self.size:
                raise ModelUnsupported(
                    f"--tensor-parallel {self.size}: the model's {number} {what} do not divide by "
                    f"{self.size}"
                )

    def spec(self, whole: DecoderSpec) -> DecoderSpec:
        """The decoder that a rank computes: as wide a stream, fewer heads, a narrower MLP."""
        return replace(
            whole,
            num_heads=whole.num_heads // self.size,
            num_kv_heads=whole.num_kv_heads // self.size,
            intermediate_size=whole.intermediate_size // self.size,
        )

    def site(self, whole: DecoderSpec, index: int, site: Site) -> SitePart:
        """What a rank has of a site of a layer.

        Args:
            whole: of the model.
            index: the site's number.
            site: it, of ``whole``.
        """
        kind = index % SITES_PER_LAYER
        if kind in (_O, _DOWN):
            every = tuple((slice(0, part.length),) for part in site.slices)
            return SitePart(self._share(0, site.in_features), every, self.rank == 0)
        inputs = slice(0, site.in_features)
        if kind == _QKV and len(site.slices) == 1:  # q, k and v are one module
            q, kv = whole.num_heads * whole.head_dim, whole.num_kv_heads * whole.head_dim
            pieces = self._share(0, q), self._share(q, kv), self._share(q + kv, kv)
            return SitePart(inputs, (pieces,), True)
        own = tuple((self._share(0, part.length),) for part in site.slices)
        return SitePart(inputs, own, True)

    def tokens(self, vocab_size: int) -> slice:
        """The tokens that a rank computes logits of; the last ranks may have fewer."""
        each = -(-vocab_size // self.size)
        return slice(min(self.rank * each, vocab_size), min((self.rank + 1) * each, vocab_size))

    def _share(self, start: int, length: int) -> slice:
        each = length // self.size
        return slice(start + self.rank * each, start + (self.rank + 1) * each)


WHOLE = Part()
"""The model on one device."""


def _narrow(tensor: torch.Tensor, piece: slice, dim: int) -> torch.Tensor:
    return tensor.narrow(dim, piece.start, piece.stop - piece.start)
