"""A lean Llama-like forward over a flat batch of tokens of many sequences.

Rows 0..D-1 are one token each of the decoding sequences; then come the prompt chunks, one after
the other. Everything but attention treats all rows alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from lorax_serve.model.kv_cache import KVCache
from lorax_serve.model.multi_lora import LoRABatch
from lorax_serve.model.spec import SITES_PER_LAYER, DecoderSpec

__all__ = ["Decoder", "DecoderLayer", "ForwardBatch", "Linear", "PromptChunk"]


@dataclass(frozen=True, slots=True)
class Linear:
    """``y = x @ weight.T + bias``; weight ``[out, in]``, bias ``[out]`` or None."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x ``[T, in]`` to ``[T, out]``."""
        return F.linear(x, self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """One layer's weights; the norms are vectors."""

    input_norm: torch.Tensor
    qkv: Linear
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    o: Linear
    post_norm: torch.Tensor
    gate_up: Linear
    down: Linear


@dataclass(frozen=True, slots=True)
class PromptChunk:
    """Rows ``[start, end)`` are positions ``[end_position - (end - start), end_position)``.

    ``mask`` is bool ``[rows, end_position]``, true where a row may look; None for a whole prompt,
    which is plainly causal.
    """

    start: int
    end: int
    slot: int
    end_position: int
    mask: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """One step's input on the device.

    Attributes:
        token_ids, positions: int64 ``[T]``.
        kv_index: where the rows' keys and values go (``KVCache.index``).
        num_decodes: D, the rows that decode.
        decode_rows: the KV slot of each decoding row, int64 ``[D]``; None if it is 0..D-1.
        decode_mask: bool ``[S, 1, 1, L]`` over KV slots 0..S-1 and positions 0..L-1.
        prompts: the chunks of the other rows.
        lora: None if all rows are the base model's.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    kv_index: torch.Tensor
    num_decodes: int
    decode_rows: torch.Tensor | None
    decode_mask: torch.Tensor | None
    prompts: Sequence[PromptChunk]
    lora: LoRABatch | None


class Decoder:
    """The base model; stateless but for its weights."""

    def __init__(
        self,
        spec: DecoderSpec,
        embedding: torch.Tensor,
        layers: list[DecoderLayer],
        norm: torch.Tensor,
        head: torch.Tensor,
    ) -> None:
        self.spec = spec
        self.sites = spec.sites()
        self._embedding = embedding
        self._layers = layers
        self._norm = norm
        self._head = head
        self._cos, self._sin = _rope_tables(spec, embedding.dtype, embedding.device)

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and activations."""
        return self._embedding.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._embedding.device

    @property
    def num_parameters(self) -> int:
        """Number of weights; tied ones count once."""
        total = self._embedding.numel() + self._norm.numel()
        if self._head is not self._embedding:
            total += self._head.numel()
        for layer in self._layers:
            for linear in (layer.qkv, layer.o, layer.gate_up, layer.down):
                total += linear.weight.numel()
                total += 0 if linear.bias is None else linear.bias.numel()
            norms = (layer.input_norm, layer.post_norm, layer.q_norm, layer.k_norm)
            total += sum(norm.numel() for norm in norms if norm is not None)
        return total

    def forward(self, batch: ForwardBatch, cache: KVCache) -> torch.Tensor:
        """Compute all rows, writing their keys and values; returns ``[T, hidden]``, normalised."""
        x = F.embedding(batch.token_ids, self._embedding)
        cos, sin = self._cos[batch.positions], self._sin[batch.positions]
        for index, layer in enumerate(self._layers):
            site = index * SITES_PER_LAYER
            h = self._rms_norm(x, layer.input_norm)
            qkv = _linear(layer.qkv, h, batch.lora, site)
            attended = self._attend(layer, index, qkv, cos, sin, batch, cache)
            x = x + _linear(layer.o, attended, batch.lora, site + 1)
            h = self._rms_norm(x, layer.post_norm)
            gate, up = _linear(layer.gate_up, h, batch.lora, site + 2).chunk(2, dim=-1)
            x = x + _linear(layer.down, F.silu(gate) * up, batch.lora, site + 3)
        return self._rms_norm(x, self._norm)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[rows, hidden]`` to float32 ``[rows, vocab]``."""
        return F.linear(hidden, self._head).float()

    def _rms_norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight, self.spec.norm_eps)

    def _attend(
        self,
        layer: DecoderLayer,
        index: int,
        qkv: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        batch: ForwardBatch,
        cache: KVCache,
    ) -> torch.Tensor:
        spec = self.spec
        heads, kv_heads = spec.num_heads, spec.num_kv_heads
        rows = qkv.view(len(qkv), -1, spec.head_dim)
        q, k, v = torch.split(rows, [heads, kv_heads, kv_heads], dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = self._rms_norm(q, layer.q_norm), self._rms_norm(k, layer.k_norm)
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        cache.write(index, batch.kv_index, k, v)
        keys, values = cache.keys[index], cache.values[index]
        out = torch.empty_like(q)
        if batch.num_decodes:
            out[: batch.num_decodes] = _attend_decodes(q[: batch.num_decodes], keys, values, batch)
        for chunk in batch.prompts:
            out[chunk.start : chunk.end] = _attend_prompt(
                q[chunk.start : chunk.end], keys, values, chunk
            )
        return out.flatten(1)


def _linear(linear: Linear, x: torch.Tensor, lora: LoRABatch | None, site: int) -> torch.Tensor:
    y = linear(x)
    if lora is not None:
        lora.add(site, x, y)
    return y


def _attend_decodes(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, batch: ForwardBatch
) -> torch.Tensor:
    """One query a sequence over its own row of the cache; q and result ``[D, heads, dim]``.

    The query heads that share a kv head are laid along the query axis, so that the cache is read
    once for all of them and never copied.
    """
    assert batch.decode_mask is not None
    slots, length = batch.decode_mask.shape[0], batch.decode_mask.shape[-1]
    kv_heads = keys.shape[1]
    rows = q
    if batch.decode_rows is not None:
        rows = q.new_zeros(slots, *q.shape[1:])
        rows[batch.decode_rows] = q
    out = F.scaled_dot_product_attention(
        rows.view(slots, kv_heads, -1, q.shape[-1]),
        keys[:slots, :, :length],
        values[:slots, :, :length],
        attn_mask=batch.decode_mask,
    ).reshape(slots, *q.shape[1:])
    return out if batch.decode_rows is None else out[batch.decode_rows]


def _attend_prompt(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, chunk: PromptChunk
) -> torch.Tensor:
    """A chunk of one sequence over its cache, itself included; q and result ``[n, heads, dim]``."""
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        keys[chunk.slot, :, : chunk.end_position][None],
        values[chunk.slot, :, : chunk.end_position][None],
        attn_mask=chunk.mask,
        is_causal=chunk.mask is None,
        enable_gqa=True,
    )
    return out[0].transpose(0, 1)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE by halves, as Hugging Face checkpoints expect it: x ``[T, heads, dim]``."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _rope_tables(
    spec: DecoderSpec, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, ``[max_positions, 1, head_dim / 2]``, computed in float32."""
    angles = torch.arange(spec.max_positions, dtype=torch.float32)[:, None] * spec.inv_freq
    return tuple(  # type: ignore[return-value]
        (f(angles) * spec.rope_scale).to(device, dtype)[:, None] for f in (torch.cos, torch.sin)
    )
