"""What a base model is made of: its sizes, its kinds of parts, its modules and its LoRA sites.

A *site* is one fused linear of the decoder, where several modules of the checkpoint (q, k and v)
are computed by one matrix product; each module keeps its own slice of the site's output.
``architectures`` says how each family's ``config.json`` is read into this.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch

from lorax_serve.adapter import ModuleKind, ModuleShape

__all__ = [
    "OUTPUT",
    "SITES_PER_LAYER",
    "Activation",
    "DecoderSpec",
    "Layout",
    "NormKind",
    "Site",
    "Slice",
]

SITES_PER_LAYER = 4
OUTPUT = "lm_head"
NormKind = Literal["rms", "layer"]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]


@dataclass(frozen=True, slots=True)
class Slice:
    """One checkpoint module's columns ``[start, start + length)`` of its site's output."""

    path: str
    start: int
    length: int
    has_bias: bool = False


@dataclass(frozen=True, slots=True)
class Site:
    """One fused linear, ``y = x @ W.T`` with W of ``[out_features, in_features]``.

    Attributes:
        gated: ``activation(first half of y) * second half`` is what is made of it.
        norm_path: the norm that x went through, None if it went through none.
    """

    in_features: int
    out_features: int
    slices: tuple[Slice, ...]
    gated: bool = False
    norm_path: str | None = None


@dataclass(frozen=True, slots=True)
class Layout:
    """How checkpoints of a family store a decoder: names of modules, and the form of linears.

    Attributes:
        inner: the module that is all but lm_head; the names below are relative to it. Checkpoints
            that were saved from it alone leave it out.
        embedding, norm: of the whole model; ``positions`` is its table of positions, if it has one.
        layers: the list of layers; the names below are relative to one of them.
        input_norm, post_norm: before attention and before the MLP.
        qk_norm: the norms of each query's and key's head, if there are any.
        qkv, o, gate_up, down: the modules of the four sites, in the order in which they are fused.
        conv1d: linears are transformers' ``Conv1D``: W is stored ``[in, out]``, with a bias.
        buffers: endings of the names of tensors that the config determines.
    """

    inner: str
    embedding: str
    positions: str | None
    norm: str
    layers: str
    input_norm: str
    post_norm: str
    qk_norm: tuple[str, str] | None
    qkv: tuple[str, ...]
    o: str
    gate_up: tuple[str, ...]
    down: str
    conv1d: bool
    buffers: tuple[str, ...]

    def in_model(self, name: str) -> str:
        """The path of a module of the whole model."""
        return f"{self.inner}.{name}"

    def in_layer(self, layer: int, name: str) -> str:
        """The path of a module of one layer."""
        return f"{self.inner}.{self.layers}.{layer}.{name}"


@dataclass(frozen=True, slots=True)
class DecoderSpec:
    """A pre-norm decoder: attention and MLP one after the other, each added to its input.

    Attributes:
        layout: where its checkpoint keeps what.
        norm, norm_eps: RMSNorm, or LayerNorm with a bias.
        activation, gated: the MLP is ``down(activation(gate) * up)``, or ``down(activation(up))``.
        inv_freq: RoPE's ``[head_dim / 2]`` in float32; None without RoPE.
        rope_scale: the factor of RoPE's cos and sin.
        biased: the linears of a layer that have a bias, by their names in the layout.
        max_positions: tokens that a sequence may have; rows of the table of learned positions.
    """

    layout: Layout
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm: NormKind
    norm_eps: float
    activation: Activation
    gated: bool
    max_positions: int
    inv_freq: torch.Tensor | None
    rope_scale: float
    tied_embeddings: bool
    biased: tuple[str, ...]
    eos_token_ids: tuple[int, ...]

    @property
    def learned_positions(self) -> bool:
        """Whether a row of a table is added to each embedding, by position."""
        return self.layout.positions is not None

    def sites(self) -> list[Site]:
        """The LoRA sites: qkv, o, gate_up and down of each layer, in the order of the forward."""
        names, hidden, inner = self.layout, self.hidden_size, self.intermediate_size
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        qkv = (q, kv, kv) if len(names.qkv) == 3 else (q + 2 * kv,)
        gate_up = (inner, inner) if self.gated else (inner,)

        def site(
            layer: int,
            size: int,
            modules: Sequence[str],
            widths: Sequence[int],
            norm: str | None = None,
            gated: bool = False,
        ) -> Site:
            slices = tuple(
                Slice(names.in_layer(layer, module), start, width, module in self.biased)
                for module, start, width in zip(
                    modules, accumulate(widths[:-1], initial=0), widths, strict=True
                )
            )
            norm_path = None if norm is None else names.in_layer(layer, norm)
            return Site(size, sum(widths), slices, gated, norm_path)

        found = []
        for layer in range(self.num_layers):
            found += [
                site(layer, hidden, names.qkv, qkv, names.input_norm),
                site(layer, q, [names.o], [hidden]),
                site(layer, hidden, names.gate_up, gate_up, names.post_norm, self.gated),
                site(layer, inner, [names.down], [hidden]),
            ]
        return found

    def output_site(self) -> Site:
        """The linear that makes logits; it comes after all of ``sites``."""
        norm = self.layout.in_model(self.layout.norm)
        head = Slice(OUTPUT, 0, self.vocab_size)
        return Site(self.hidden_size, self.vocab_size, (head,), norm_path=norm)

    @property
    def num_parameters(self) -> int:
        """Number of weights of the linears and the embeddings; tied ones count once."""
        linears = sum(site.in_features * site.out_features for site in self.sites())
        rows = self.vocab_size * (1 if self.tied_embeddings else 2)
        rows += self.max_positions if self.learned_positions else 0
        return linears + rows * self.hidden_size

    @property
    def embedding_path(self) -> str:
        """The path of the embedding of tokens."""
        return self.layout.in_model(self.layout.embedding)

    def modules(self) -> dict[str, ModuleShape]:
        """Every module that an adapter may change, by its path in the transformers model."""
        hidden, layer_norm = self.hidden_size, self.norm == "layer"
        found = {self.embedding_path: ModuleShape(self.vocab_size, hidden, ModuleKind.EMBEDDING)}
        if self.layout.positions is not None:
            path = self.layout.in_model(self.layout.positions)
            found[path] = ModuleShape(self.max_positions, hidden, ModuleKind.POSITIONS)
        for site in (*self.sites(), self.output_site()):
            if site.norm_path is not None:
                found[site.norm_path] = ModuleShape(hidden, hidden, ModuleKind.NORM, layer_norm)
            for part in site.slices:
                found[part.path] = ModuleShape(
                    site.in_features, part.length, has_bias=part.has_bias
                )
        tied_to = self.embedding_path if self.tied_embeddings else None
        found[OUTPUT] = found[OUTPUT]._replace(kind=ModuleKind.OUTPUT, tied_to=tied_to)
        return found
