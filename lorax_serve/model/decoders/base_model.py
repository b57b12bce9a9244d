"""What decoders in torch have in common: the base model's weights, its norms and its output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F

from lorax_serve.checkpoint.spec import SITES_PER_LAYER, Activation, DecoderSpec
from lorax_serve.checkpoint.weights import DecoderWeights, LinearWeights, Norm
from lorax_serve.model.adapters.folded import FoldedAdapter
from lorax_serve.model.adapters.lora_ops import add_lora_segment, replace_logits, scale_and_shift
from lorax_serve.model.group import ALONE, Group

__all__ = ["BaseModel", "OutputChanges", "rope_tables"]

_ACTIVATIONS: dict[Activation, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


class OutputChanges(Protocol):
    """Adapter slots, as far as the output is concerned."""

    def output_changes(self, slots: Sequence[int]) -> list[tuple[list[int], FoldedAdapter]]:
        """The rows of each adapter that changes the output, given the adapter slots of all rows."""


class BaseModel:
    """Weights on one device, stateless; ``fold.BaseWeights``.

    Args:
        weights: of the model, or of this rank's part; their layers are read to the end.
        group: the ranks that compute the model together.
    """

    def __init__(self, weights: DecoderWeights, group: Group = ALONE) -> None:
        self.group = group
        self.spec: DecoderSpec = weights.spec
        self.embedding = weights.embedding
        self.positions = weights.positions
        self.layers = list(weights.layers)
        self.norm = weights.norm
        self.head = weights.head
        self.dtype, self.device = self.embedding.dtype, self.embedding.device
        self._activation = _ACTIVATIONS[self.spec.activation]

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """The embeddings of token ids int32 ``[T]``, without positions: ``[T, hidden]``."""
        return F.embedding(token_ids, self.embedding)

    def embed_positions(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """x with learned embeddings of ``positions`` int32 ``[T]``, if the model has them."""
        return x if self.positions is None else x + F.embedding(positions, self.positions)

    def normed(self, x: torch.Tensor, norm: Norm) -> torch.Tensor:
        """x ``[..., size]`` through a norm of the model's kind."""
        size, eps = (x.shape[-1],), self.spec.norm_eps
        if self.spec.norm == "layer":
            return F.layer_norm(x, size, norm.weight, norm.bias, eps)
        return F.rms_norm(x, size, norm.weight, eps)

    def activated(self, y: torch.Tensor) -> torch.Tensor:
        """What goes into ``down``, of what ``gate_up`` gave."""
        if not self.spec.gated:
            return self._activation(y)
        gate, up = y.chunk(2, dim=-1)
        return self._activation(gate) * up

    def logits(
        self, hidden: torch.Tensor, slots: Sequence[int], adapters: OutputChanges
    ) -> torch.Tensor:
        """From hidden states to scores of tokens.

        Args:
            hidden: rows of the last layer's result, ``[rows, hidden]``.
            slots: the adapter slot of each, ``BASE`` for none.
            adapters: in the slots.

        Returns:
            float32 ``[rows, vocab]``.
        """
        logits = self.base_logits(hidden)
        self.change_logits(logits, hidden, slots, adapters)
        return logits

    def change_logits(
        self,
        logits: torch.Tensor,
        hidden: torch.Tensor,
        slots: Sequence[int],
        adapters: OutputChanges,
    ) -> None:
        """Make of ``base_logits``, in place, what ``logits`` returns."""
        for rows, adapter in adapters.output_changes(slots):
            logits[rows] = self._own_logits(hidden[rows], adapter)

    def base_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Of rows without adapter, or whose adapter leaves the output as it is."""
        return self._head(self.normed(hidden, self.norm)).float()

    def site_weights(self, site: int) -> LinearWeights:
        """See ``fold.BaseWeights``."""
        layer, part = divmod(site, SITES_PER_LAYER)
        if layer == len(self.layers):
            return LinearWeights(self.head)
        weights = self.layers[layer]
        return (weights.qkv, weights.o, weights.gate_up, weights.down)[part]

    def norm_weights(self, site: int) -> Norm | None:
        """See ``fold.BaseWeights``."""
        layer, part = divmod(site, SITES_PER_LAYER)
        if layer == len(self.layers):
            return self.norm
        return (self.layers[layer].input_norm, None, self.layers[layer].post_norm, None)[part]

    def embedding_weights(self) -> torch.Tensor:
        """See ``fold.BaseWeights``."""
        return self.embedding

    def _own_logits(self, hidden: torch.Tensor, adapter: FoldedAdapter) -> torch.Tensor:
        """Of rows that share an adapter that changes the output."""
        lora, output = adapter.sites[-1], adapter.output
        norm = self.norm if lora is None or lora.norm is None else lora.norm
        h = self.normed(hidden, norm)
        own = None if output is None else output.weight
        y = self._head(h) if own is None else F.linear(h, own)
        if lora is not None:
            add_lora_segment(h, y, lora)
            y = y if lora.plain else scale_and_shift(y, lora, None)
        y = y.float()
        if output is not None and output.tokens is not None:
            replace_logits(y, h, output.tokens)
        return y

    def _head(self, h: torch.Tensor) -> torch.Tensor:
        """The base's output for normed rows: ``[rows, vocab]``."""
        return self.group.side_by_side(F.linear(h, self.head), self.spec.vocab_size)


def rope_tables(spec: DecoderSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of a spec with RoPE, float32 ``[max_positions, head_dim / 2]``."""
    assert spec.inv_freq is not None
    angles = torch.arange(spec.max_positions, dtype=torch.float32)[:, None] * spec.inv_freq
    return angles.cos() * spec.rope_scale, angles.sin() * spec.rope_scale
