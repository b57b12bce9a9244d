"""A lean forward over a flat batch of tokens of many sequences, in plain torch.

It runs on every device, and is the reference of ``compiled_decoder``, which has the same calls.
Rows 0..D-1 are one token each of the decoding sequences; then come the prompt chunks, one after
the other. Everything but attention treats all rows alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from lorax_serve.checkpoint.spec import SITES_PER_LAYER
from lorax_serve.checkpoint.weights import DecoderWeights, LayerWeights, LinearWeights, Norm
from lorax_serve.model.adapters.multi_lora import LoRABatch, MultiLoRA
from lorax_serve.model.decoders.base_model import BaseModel, rope_tables
from lorax_serve.model.decoders.kv_cache import KVCache
from lorax_serve.model.layout import PromptChunk

__all__ = ["Decoder", "ForwardBatch"]


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """One step's input.

    Attributes:
        token_ids, positions, kv_slots: int32 ``[T]``, on the CPU.
        num_decodes: D, the rows that decode, in ascending order of their KV slots.
        prompts: the chunks of the other rows.
        lora: what the decoder's own ``lora.batch`` returned; None if all rows are the base model's.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    kv_slots: torch.Tensor
    num_decodes: int
    prompts: Sequence[PromptChunk]
    lora: Any


@dataclass(frozen=True, slots=True)
class _Step:
    """What all layers share.

    Attributes:
        rope: cos and sin of the rows' positions, ``[T, 1, head_dim / 2]``; None without RoPE.
        kv_index: where the rows' keys and values go (``KVCache.index``).
        decode_rows: the KV slot of each decoding row, int64 ``[D]``; None if it is 0..D-1.
        decode_mask: bool ``[S, 1, 1, L]`` over KV slots 0..S-1 and positions 0..L-1.
        prompt_masks: a mask a prompt, see ``_attend_prompt``.
    """

    rope: tuple[torch.Tensor, torch.Tensor] | None
    kv_index: torch.Tensor
    num_decodes: int
    decode_rows: torch.Tensor | None
    decode_mask: torch.Tensor | None
    prompts: Sequence[PromptChunk]
    prompt_masks: Sequence[torch.Tensor | None]
    lora: LoRABatch | None


class Decoder:
    """The base model with its adapter slots.

    Attributes:
        lora: the device's adapter slots.
        kernels: no compiled ones.
    """

    kernels = None

    def __init__(self, weights: DecoderWeights) -> None:
        self.base = BaseModel(weights)
        self.spec, self.dtype, self.device = self.base.spec, self.base.dtype, self.base.device
        self.lora = MultiLoRA([*self.spec.sites(), self.spec.output_site()], self.device)
        self._rope = None
        if self.spec.inv_freq is not None:
            cos, sin = rope_tables(self.spec)
            self._rope = (
                cos[:, None].to(self.device, self.dtype),
                sin[:, None].to(self.device, self.dtype),
            )

    def forward(self, batch: ForwardBatch, cache: KVCache) -> torch.Tensor:
        """Compute all rows, writing their keys and values; returns the last layer's ``[T, hidden]``
        for ``logits``.
        """
        step = self._prepare(batch, cache)
        x = self.base.embed(batch.token_ids.to(self.device))
        if step.lora is not None:
            step.lora.embed(batch.token_ids.to(self.device), x)
        x = self.base.embed_positions(x, batch.positions.to(self.device))
        for index, layer in enumerate(self.base.layers):
            site = index * SITES_PER_LAYER
            h = self._normed(x, layer.input_norm, step.lora, site)
            qkv = _linear(layer.qkv, h, step.lora, site)
            attended = self._attend(layer, index, qkv, step, cache)
            x = x + _linear(layer.o, attended, step.lora, site + 1)
            h = self._normed(x, layer.post_norm, step.lora, site + 2)
            h = self.base.activated(_linear(layer.gate_up, h, step.lora, site + 2))
            x = x + _linear(layer.down, h, step.lora, site + 3)
        return x

    def logits(self, hidden: torch.Tensor, slots: Sequence[int]) -> torch.Tensor:
        """See ``BaseModel.logits``."""
        return self.base.logits(hidden, slots, self.lora)

    def _prepare(self, batch: ForwardBatch, cache: KVCache) -> _Step:
        positions, slots = batch.positions.to(self.device), batch.kv_slots.to(self.device)
        count = batch.num_decodes
        rows, mask = _decode_layout(batch.kv_slots[:count], batch.positions[:count])
        rope = None
        if self._rope is not None:
            rope = self._rope[0][positions], self._rope[1][positions]
        return _Step(
            rope=rope,
            kv_index=cache.index(slots.long(), positions.long()),
            num_decodes=count,
            decode_rows=None if rows is None else rows.to(self.device),
            decode_mask=None if mask is None else mask.to(self.device),
            prompts=batch.prompts,
            prompt_masks=[_prompt_mask(chunk, self.device) for chunk in batch.prompts],
            lora=batch.lora,
        )

    def _normed(
        self, x: torch.Tensor, norm: Norm, lora: LoRABatch | None, site: int
    ) -> torch.Tensor:
        """The norm before a site, of each row's adapter if that has its own."""
        h = self.base.normed(x, norm)
        if lora is not None:
            lora.norm(site, x, h, self.base.normed)
        return h

    def _attend(
        self,
        layer: LayerWeights,
        index: int,
        qkv: torch.Tensor,
        step: _Step,
        cache: KVCache,
    ) -> torch.Tensor:
        spec = self.spec
        heads, kv_heads = spec.num_heads, spec.num_kv_heads
        rows = qkv.view(len(qkv), -1, spec.head_dim)
        q, k, v = torch.split(rows, [heads, kv_heads, kv_heads], dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = self.base.normed(q, layer.q_norm), self.base.normed(k, layer.k_norm)
        if step.rope is not None:
            q, k = _rotate(q, *step.rope), _rotate(k, *step.rope)
        cache.write(index, step.kv_index, k, v)
        keys, values = cache.keys[index], cache.values[index]
        out = torch.empty_like(q)
        if step.num_decodes:
            out[: step.num_decodes] = _attend_decodes(q[: step.num_decodes], keys, values, step)
        for chunk, mask in zip(step.prompts, step.prompt_masks, strict=True):
            out[chunk.start : chunk.end] = _attend_prompt(
                q[chunk.start : chunk.end], keys, values, chunk, mask
            )
        return out.flatten(1)


def _linear(
    linear: LinearWeights, x: torch.Tensor, lora: LoRABatch | None, site: int
) -> torch.Tensor:
    y = F.linear(x, linear.weight, linear.bias)
    if lora is not None:
        lora.add(site, x, y, linear.bias)
    return y


def _attend_decodes(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, step: _Step
) -> torch.Tensor:
    """One query a sequence over its own row of the cache; q and result ``[D, heads, dim]``.

    The query heads that share a kv head are laid along the query axis, so that the cache is read
    once for all of them and never copied.
    """
    assert step.decode_mask is not None
    slots, length = step.decode_mask.shape[0], step.decode_mask.shape[-1]
    kv_heads = keys.shape[1]
    rows = q
    if step.decode_rows is not None:
        rows = q.new_zeros(slots, *q.shape[1:])
        rows[step.decode_rows] = q
    out = F.scaled_dot_product_attention(
        rows.view(slots, kv_heads, -1, q.shape[-1]),
        keys[:slots, :, :length],
        values[:slots, :, :length],
        attn_mask=step.decode_mask,
    ).reshape(slots, *q.shape[1:])
    return out if step.decode_rows is None else out[step.decode_rows]


def _attend_prompt(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    chunk: PromptChunk,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """A chunk of one sequence over its cache, itself included; q and result ``[n, heads, dim]``.

    ``mask`` is ``_prompt_mask(chunk)``.
    """
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        keys[chunk.slot, :, : chunk.end_position][None],
        values[chunk.slot, :, : chunk.end_position][None],
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=True,
    )
    return out[0].transpose(0, 1)


def _prompt_mask(chunk: PromptChunk, device: torch.device) -> torch.Tensor | None:
    """Bool ``[rows, end_position]``, true where a row may look; None for a whole prompt, which is
    plainly causal.
    """
    begin = chunk.end_position - (chunk.end - chunk.start)
    if begin == 0:
        return None
    rows = torch.arange(begin, chunk.end_position, device=device)[:, None]
    return rows >= torch.arange(chunk.end_position, device=device)


def _decode_layout(
    slots: torch.Tensor, positions: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """``_Step.decode_rows`` and ``decode_mask`` for rows in ascending order of their KV slots."""
    if not len(slots):
        return None, None
    used = int(slots[-1]) + 1
    lengths = torch.zeros(used, dtype=torch.int64)
    lengths[slots] = positions.long() + 1
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    rows = None if used == len(slots) else slots.long()
    return rows, mask[:, None, None]


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE by halves, as Hugging Face checkpoints expect it: x ``[T, heads, dim]``."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
