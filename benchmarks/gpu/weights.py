"""A Llama of random weights, made on the device, for our runner and for transformers at once."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from benchmarks.gpu.shapes import Shape
from lorax_serve.checkpoint.architectures import read_spec
from lorax_serve.checkpoint.spec import DecoderSpec
from lorax_serve.checkpoint.weights import DecoderWeights, LayerWeights, LinearWeights, Norm

__all__ = ["RandomLlama"]

_DEVIATION = 0.02


class RandomLlama:
    """Weights of a shape, drawn on the device: nothing is written or read.

    Attributes:
        config: transformers' description of the model.
        spec: ours.
        layers: ours, in order.
    """

    def __init__(
        self, shape: Shape, dtype: torch.dtype, device: torch.device, seed: int = 0
    ) -> None:
        self.config: Any = LlamaConfig(
            **shape.config,
            architectures=["LlamaForCausalLM"],
            bos_token_id=1,
            eos_token_id=2,
        )
        self.spec = _spec(self.config)
        self._dtype, self._device = dtype, device
        self._generator = torch.Generator(device).manual_seed(seed)
        vocab, hidden = self.spec.vocab_size, self.spec.hidden_size
        self._embedding = self._random(vocab, hidden)
        self._head = self._embedding if self.spec.tied_embeddings else self._random(vocab, hidden)
        self._norm = self._ones()
        self.layers = [self._layer() for _ in range(self.spec.num_layers)]

    def decoder_weights(self) -> DecoderWeights:
        """For ``ModelRunner.from_weights``; the tensors are the same each time."""
        return DecoderWeights(
            self.spec, self._embedding, None, self._norm, self._head, iter(self.layers)
        )

    def transformers_model(self) -> Any:
        """A ``LlamaForCausalLM`` whose parameters are views of these weights: it takes no memory
        of its own."""
        auto: Any = AutoModelForCausalLM
        with torch.device("meta"):
            model = auto.from_config(self.config, attn_implementation="sdpa", dtype=self._dtype)
        inner = model.model
        inner.rotary_emb = LlamaRotaryEmbedding(self.config).to(self._device)
        _put(inner.embed_tokens, self._embedding)
        _put(inner.norm, self._norm.weight)
        _put(model.lm_head, self._head)
        q, kv = (n * self.spec.head_dim for n in (self.spec.num_heads, self.spec.num_kv_heads))
        for theirs, ours in zip(inner.layers, self.layers, strict=True):
            attention, mlp = theirs.self_attn, theirs.mlp
            _put(theirs.input_layernorm, ours.input_norm.weight)
            _put(theirs.post_attention_layernorm, ours.post_norm.weight)
            parts = torch.split(ours.qkv.weight, [q, kv, kv])
            for linear, part in zip(
                (attention.q_proj, attention.k_proj, attention.v_proj), parts, strict=True
            ):
                _put(linear, part)
            _put(attention.o_proj, ours.o.weight)
            gate, up = ours.gate_up.weight.chunk(2)
            _put(mlp.gate_proj, gate)
            _put(mlp.up_proj, up)
            _put(mlp.down_proj, ours.down.weight)
        # Random weights end when they like.
        model.generation_config.eos_token_id = None
        return model.eval()

    def _layer(self) -> LayerWeights:
        qkv, o, gate_up, down = (
            LinearWeights(self._random(site.out_features, site.in_features))
            for site in self.spec.sites()[:4]
        )
        return LayerWeights(self._ones(), qkv, None, None, o, self._ones(), gate_up, down)

    def _random(self, *size: int) -> torch.Tensor:
        tensor = torch.empty(size, dtype=self._dtype, device=self._device)
        return tensor.normal_(std=_DEVIATION, generator=self._generator)

    def _ones(self) -> Norm:
        size = self.spec.hidden_size
        return Norm(torch.ones(size, dtype=self._dtype, device=self._device))


def _spec(config: Any) -> DecoderSpec:
    with tempfile.TemporaryDirectory() as place:
        config.save_pretrained(place)
        return read_spec(Path(place))


def _put(module: Any, weight: torch.Tensor) -> None:
    module.weight = torch.nn.Parameter(weight, requires_grad=False)
