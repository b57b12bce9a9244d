"""The GPU's decoder: paged keys and values, and ``gpu.ops`` between torch's matrix products.

On a CPU it runs as well, with the same calls in plain torch, which is how it is tested.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from lorax_serve.checkpoint.spec import SITES_PER_LAYER
from lorax_serve.checkpoint.weights import DecoderWeights, LinearWeights, Norm
from lorax_serve.gpu.ops import Ops
from lorax_serve.gpu.pages import LayerPages, Rope
from lorax_serve.gpu.prompt_attention import prompt_attention
from lorax_serve.model.adapters.arena_lora import ArenaBatch, ArenaLoRA
from lorax_serve.model.decoders.base_model import BaseModel, rope_tables
from lorax_serve.model.decoders.paged_cache import PagedKVCache
from lorax_serve.model.group import ALONE, Group
from lorax_serve.model.layout import PromptChunk

__all__ = ["PagedDecoder", "Rows"]


@dataclass(frozen=True, slots=True)
class Rows:
    """A step's rows on the device: those of sequences that decode, then prompt chunks.

    Attributes:
        token_ids, positions, kv_slots: int32 ``[T]``; a KV slot of -1 is padding.
        num_decodes: rows that decode.
        prompts: the chunks of the other rows.
        lora: None if all rows are the base model's.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    kv_slots: torch.Tensor
    num_decodes: int
    prompts: Sequence[PromptChunk]
    lora: ArenaBatch | None


class PagedDecoder:
    """The base model with its adapter slots in an arena.

    Args:
        weights: of the model.
        ops: of one kind.
        arena_bytes: device memory for adapters, see ``Arena``.
        group: the ranks that compute the model together, each with its part of the weights.

    Attributes:
        lora: the device's adapter slots.
    """

    def __init__(
        self, weights: DecoderWeights, ops: Ops, arena_bytes: int, group: Group = ALONE
    ) -> None:
        self.base = base = BaseModel(weights, group)
        self.group = group
        self.spec, self.dtype, self.device = base.spec, base.dtype, base.device
        self._ops = ops
        sites = [*self.spec.sites(), self.spec.output_site()]
        self.lora = ArenaLoRA(sites, self.dtype, self.device, ops, arena_bytes)
        cos = sin = None
        if self.spec.inv_freq is not None:
            cos, sin = (table.to(self.device) for table in rope_tables(self.spec))
        self._ropes = [
            Rope(
                cos,
                sin,
                None if layer.q_norm is None else layer.q_norm.weight,
                None if layer.k_norm is None else layer.k_norm.weight,
                self.spec.norm_eps,
            )
            for layer in base.layers
        ]
        self._fused_norm = self.spec.norm == "rms"
        self._fused_activation = self.spec.gated and self.spec.activation == "silu"

    def forward(self, rows: Rows, cache: PagedKVCache) -> torch.Tensor:
        """Compute all rows, writing their keys and values, for which the cache has pages; returns
        the last layer's ``[T, hidden]`` for ``logits``. Nothing is read back from the device."""
        base, lora = self.base, rows.lora
        x = base.embed(rows.token_ids)
        if lora is not None:
            lora.embed(rows.token_ids, x)
        x = base.embed_positions(x, rows.positions)
        y: torch.Tensor | None = None
        for index, layer in enumerate(base.layers):
            site = index * SITES_PER_LAYER
            h = self._normed(x, y, layer.input_norm, lora, site)
            qkv = _linear(layer.qkv, h, lora, site)
            qkv = qkv.view(len(qkv), -1, self.spec.head_dim)
            attended = self._attend(qkv, rows, cache.layer(index), self._ropes[index])
            y = self.group.add_up(_linear(layer.o, attended, lora, site + 1))
            h = self._normed(x, y, layer.post_norm, lora, site + 2)
            h = self._activated(_linear(layer.gate_up, h, lora, site + 2))
            y = self.group.add_up(_linear(layer.down, h, lora, site + 3))
        return x if y is None else x.add_(y)

    def logits(self, hidden: torch.Tensor, slots: Sequence[int]) -> torch.Tensor:
        """See ``BaseModel.logits``."""
        return self.base.logits(hidden, slots, self.lora)

    def _normed(
        self,
        x: torch.Tensor,
        y: torch.Tensor | None,
        norm: Norm,
        lora: ArenaBatch | None,
        site: int,
    ) -> torch.Tensor:
        """``x += y``, in place, and the norm of that before ``site``, of each row's adapter if it
        has its own."""
        if not self._fused_norm:
            h = self.base.normed(x if y is None else x.add_(y), norm)
        elif y is None:
            h = self._ops.rms_norm(x, norm.weight, self.spec.norm_eps)
        else:
            h = self._ops.add_rms_norm(x, y, norm.weight, self.spec.norm_eps)
        if lora is not None:
            lora.norm(site, x, h, self.base.normed)
        return h

    def _activated(self, y: torch.Tensor) -> torch.Tensor:
        return self._ops.silu_mul(y) if self._fused_activation else self.base.activated(y)

    def _attend(self, qkv: torch.Tensor, rows: Rows, pages: LayerPages, rope: Rope) -> torch.Tensor:
        """qkv ``[T, heads + 2 * kv_heads, head_dim]``, q changed in place; returns
        ``[T, heads * head_dim]``."""
        spec, count = self.spec, rows.num_decodes
        scale = spec.head_dim**-0.5
        self._ops.rotate_and_store(qkv, rows.positions, rows.kv_slots, pages, rope)
        q, k, v = torch.split(qkv, [spec.num_heads, spec.num_kv_heads, spec.num_kv_heads], dim=1)
        if not rows.prompts:
            out = self._ops.decode_attention(q, rows.positions, rows.kv_slots, pages, scale)
            return out.flatten(1)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        if count:
            out[:count] = self._ops.decode_attention(
                q[:count], rows.positions[:count], rows.kv_slots[:count], pages, scale
            )
        for chunk in rows.prompts:
            of = slice(chunk.start, chunk.end)
            out[of] = prompt_attention(
                q[of], k[of], v[of], chunk.slot, chunk.end_position, pages, scale
            )
        return out.flatten(1)


def _linear(
    linear: LinearWeights, x: torch.Tensor, lora: ArenaBatch | None, site: int
) -> torch.Tensor:
    y = F.linear(x, linear.weight, linear.bias)
    if lora is not None:
        lora.add(site, x, y, linear.bias)
    return y
