"""The decoder on compiled CPU kernels: the calls of ``decoder.Decoder``, several times as fast."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from lorax_serve.checkpoint.spec import SITES_PER_LAYER, DecoderSpec
from lorax_serve.checkpoint.weights import DecoderWeights, LayerWeights, LinearWeights, Norm
from lorax_serve.kernels.build import KernelsUnavailable
from lorax_serve.kernels.cpu import ADD, GATED, WRITE, WRITE_FLOAT, load
from lorax_serve.kernels.packing import PANEL, Arena, PackedLinear, step_of
from lorax_serve.kernels.structs import AttentionArgs, PromptArgs, RowsArgs
from lorax_serve.model.adapters.lora_ops import replace_logits
from lorax_serve.model.adapters.packed_lora import PackedAdapter, PackedBatch, PackedLoRA
from lorax_serve.model.decoders.base_model import rope_tables
from lorax_serve.model.decoders.decoder import ForwardBatch
from lorax_serve.model.decoders.kv_cache import KVCache

__all__ = ["CompiledDecoder", "check_sizes"]


@dataclass(frozen=True, slots=True)
class _Layer:
    qkv: PackedLinear
    o: PackedLinear
    gate_up: PackedLinear
    down: PackedLinear
    attention: AttentionArgs
    norms: tuple[torch.Tensor | None, ...]


class CompiledDecoder:
    """The base model in packed weights.

    Args:
        weights: of the model.
        max_length: of the rows of the KV cache.
        batch_invariant: attend to prompts as to tokens that decode: one kernel, one order of
            summation, so that a row's bits do not depend on how its prompt was cut.

    Attributes:
        lora: the device's adapter slots.
        kernels: what computes.

    Raises:
        KernelsUnavailable: the kernels cannot be built or run here, or not for these sizes.
    """

    def __init__(
        self, weights: DecoderWeights, max_length: int, *, batch_invariant: bool = False
    ) -> None:
        self.spec = spec = weights.spec
        self._embedding = weights.embedding
        self.dtype, self.device = self._embedding.dtype, self._embedding.device
        check_sizes(spec, self.dtype, self.device)
        self.kernels = load(self.dtype)
        self._cos, self._sin = (table.contiguous() for table in rope_tables(spec))
        arena = Arena()
        self._layers = [self._pack(layer, arena, max_length) for layer in weights.layers]
        self._norm = weights.norm
        norm = weights.norm.weight.contiguous()
        self._head = PackedLinear.pack(weights.head, None, arena, norm=norm, eps=spec.norm_eps)
        self.lora = PackedLoRA([*spec.sites(), spec.output_site()], self.dtype, self._head)
        self._batch_invariant = batch_invariant
        group = spec.num_heads // spec.num_kv_heads
        self._attend_scratch = self.kernels.attend_scratch(group, spec.head_dim, max_length)
        self._capacity = 0
        self._reserve(1)

    @property
    def base(self) -> CompiledDecoder:
        """Its weights, which it unpacks when asked: itself."""
        return self

    def forward(self, batch: ForwardBatch, cache: KVCache) -> torch.Tensor:
        """See ``Decoder.forward``."""
        rows = len(batch.token_ids)
        self._reserve(rows)
        x = F.embedding(batch.token_ids, self._embedding)
        prompts = batch.prompts
        lora = None
        if batch.lora is not None:
            batch.lora.embed(batch.token_ids, x)
            lora = ctypes.addressof(batch.lora.args)
        row_args = RowsArgs(
            batch.kv_slots.data_ptr(),
            batch.positions.data_ptr(),
            (PromptArgs * len(prompts))(*(PromptArgs(each.start, each.end) for each in prompts)),
            rows,
            batch.num_decodes,
            len(prompts),
            self._batch_invariant,
        )
        row_address = ctypes.addressof(row_args)
        linear, attend = self.kernels.linear, self.kernels.attend
        hidden, qkv, attended = x.data_ptr(), self._qkv.data_ptr(), self._attended.data_ptr()
        gated, scratch = self._gated.data_ptr(), self._linear_scratch.data_ptr()
        attend_scratch = self._attend_scratch.data_ptr()
        for index, layer in enumerate(self._layers):
            site = index * SITES_PER_LAYER
            linear(layer.qkv, WRITE, hidden, rows, qkv, scratch, lora, site)
            attend(
                ctypes.addressof(layer.attention),
                row_address,
                qkv,
                cache.key_addresses[index],
                cache.value_addresses[index],
                attended,
                attend_scratch,
            )
            linear(layer.o, ADD, attended, rows, hidden, scratch, lora, site + 1)
            linear(layer.gate_up, GATED, hidden, rows, gated, scratch, lora, site + 2)
            linear(layer.down, ADD, gated, rows, hidden, scratch, lora, site + 3)
        return x

    def logits(self, hidden: torch.Tensor, slots: Sequence[int]) -> torch.Tensor:
        """See ``Decoder.logits``."""
        hidden = hidden.contiguous()
        self._reserve(len(hidden))
        changes = self.lora.output_changes(slots)
        # All that have the base's weight in one pass; then those that have their own.
        shared = [(rows, adapter) for rows, adapter in changes if adapter.head is None]
        batch = PackedBatch.build(shared, len(hidden)) if shared else None
        logits = self._output(self._head, hidden, batch)
        for rows, adapter in changes:
            if adapter.head is not None:
                batch = PackedBatch.build([(range(len(rows)), adapter)], len(rows))
                logits[rows] = self._output(adapter.head, hidden[rows], batch)
            if adapter.tokens is not None:
                own = logits[rows]
                replace_logits(own, self._normed(hidden[rows], adapter), adapter.tokens)
                logits[rows] = own
        return logits

    def site_weights(self, site: int) -> LinearWeights:
        """See ``fold.BaseWeights``."""
        layer, part = divmod(site, SITES_PER_LAYER)
        if layer == len(self._layers):
            return LinearWeights(self._head.unpack()[0][: self.spec.vocab_size])
        packed = self._layers[layer]
        return LinearWeights(*(packed.qkv, packed.o, packed.gate_up, packed.down)[part].unpack())

    def norm_weights(self, site: int) -> Norm | None:
        """See ``fold.BaseWeights``."""
        layer, part = divmod(site, SITES_PER_LAYER)
        if layer == len(self._layers):
            return self._norm
        packed = self._layers[layer]
        norm = (packed.qkv.norm, None, packed.gate_up.norm, None)[part]
        return None if norm is None else Norm(norm)

    def embedding_weights(self) -> torch.Tensor:
        """See ``fold.BaseWeights``."""
        return self._embedding

    def _output(
        self, head: PackedLinear, hidden: torch.Tensor, batch: PackedBatch | None
    ) -> torch.Tensor:
        out = torch.empty(len(hidden), head.columns)
        self.kernels.linear(
            head,
            WRITE_FLOAT,
            hidden.data_ptr(),
            len(hidden),
            out.data_ptr(),
            self._linear_scratch.data_ptr(),
            None if batch is None else ctypes.addressof(batch.args),
            len(self._layers) * SITES_PER_LAYER,
        )
        return out[:, : self.spec.vocab_size].contiguous()

    def _normed(self, hidden: torch.Tensor, adapter: PackedAdapter) -> torch.Tensor:
        """The output's norm, the adapter's own if it has one; row by row the same bits."""
        norm = self._norm if adapter.output_norm is None else adapter.output_norm
        size = (self.spec.hidden_size,)
        rows = [F.rms_norm(row, size, norm.weight, self.spec.norm_eps) for row in hidden]
        return torch.stack(rows)

    def _reserve(self, rows: int) -> None:
        """Make room for the intermediate results of a step of ``rows`` rows."""
        if rows <= self._capacity:
            return
        spec = self.spec
        heads, kv_heads = spec.num_heads, spec.num_kv_heads
        self._qkv = torch.empty(rows, heads + 2 * kv_heads, spec.head_dim, dtype=self.dtype)
        self._attended = torch.empty(rows, heads, spec.head_dim, dtype=self.dtype)
        self._gated = torch.empty(rows, spec.intermediate_size, dtype=self.dtype)
        most = max(spec.hidden_size, spec.intermediate_size, heads * spec.head_dim)
        nbytes = self.kernels.linear_scratch(most)
        self._linear_scratch = torch.empty(rows, nbytes, dtype=torch.uint8)
        self._capacity = rows  # only now: an allocation may have failed

    def _pack(self, layer: LayerWeights, arena: Arena, max_length: int) -> _Layer:
        spec, eps = self.spec, self.spec.norm_eps
        norms = [
            None if norm is None else norm.weight.contiguous()
            for norm in (layer.input_norm, layer.post_norm, layer.q_norm, layer.k_norm)
        ]
        input_norm, post_norm, q_norm, k_norm = norms

        def pack(name: str, norm: torch.Tensor | None = None, gated: bool = False) -> PackedLinear:
            plain = getattr(layer, name)
            return PackedLinear.pack(
                plain.weight, plain.bias, arena, norm=norm, eps=eps, gated=gated
            )

        return _Layer(
            qkv=pack("qkv", input_norm),
            o=pack("o"),
            gate_up=pack("gate_up", post_norm, gated=True),
            down=pack("down"),
            attention=AttentionArgs(
                spec.num_heads,
                spec.num_kv_heads,
                spec.head_dim,
                max_length,
                spec.head_dim**-0.5,
                eps,
                self._cos.data_ptr(),
                self._sin.data_ptr(),
                None if q_norm is None else q_norm.data_ptr(),
                None if k_norm is None else k_norm.data_ptr(),
            ),
            norms=tuple(norms),
        )


def check_sizes(spec: DecoderSpec, dtype: torch.dtype, device: torch.device) -> None:
    """Whether the kernels take a model.

    Raises:
        KernelsUnavailable: naming the part or the size that they do not take.
    """
    if device.type != "cpu":
        raise KernelsUnavailable(f"they run on the CPU, not on {device}")
    parts = {
        f"{spec.norm} norm": spec.norm == "rms",
        "learned positions": not spec.learned_positions,
        f"an MLP with {spec.activation}": spec.activation == "silu",
        "an MLP without a gate": spec.gated,
    }
    other = [part for part, written in parts.items() if not written]
    if other:
        raise KernelsUnavailable(f"they are not written for {', '.join(other)}")
    dot = PANEL * step_of(dtype)  # a register of a dot product
    sizes = {
        "hidden_size": (spec.hidden_size, dot),
        "intermediate_size": (spec.intermediate_size, dot),
        "head_dim": (spec.head_dim, dot),
    }
    for name, (size, unit) in sizes.items():
        if size % unit:
            raise KernelsUnavailable(f"{name} {size} is not a multiple of {unit}")
    if spec.head_dim > 256:
        raise KernelsUnavailable(f"head_dim {spec.head_dim} is more than 256")
