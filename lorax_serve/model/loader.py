"""Checkpoint to weights: safetensors shards read once, q/k/v and gate/up fused as they come."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import safetensors
import torch

from lorax_serve.errors import ModelUnsupported
from lorax_serve.model.spec import SITES_PER_LAYER, DecoderSpec, Site
from lorax_serve.model.spec_cache import load_spec
from lorax_serve.model.weights import DecoderWeights, LayerWeights, LinearWeights

__all__ = ["load_weights"]

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


@contextmanager
def load_weights(
    directory: Path, dtype: torch.dtype, device: torch.device
) -> Iterator[DecoderWeights]:
    """Open a Hugging Face model directory; its layers are read as they are asked for.

    Args:
        directory: with ``config.json`` and safetensors weights.
        dtype: of all weights and activations.
        device: where they live.

    Raises:
        ModelUnsupported: when a tensor is missing, has another shape than the config says, or is
            left over: a forward that ignores part of a checkpoint is not this model's forward.
    """
    spec = load_spec(directory)
    with ExitStack() as stack:
        checkpoint = _Checkpoint(directory, stack, dtype, device)
        yield _weights(spec, checkpoint)
    left = checkpoint.unread()
    if left:
        raise ModelUnsupported(
            f"{directory}: {left[0]} is not part of the forward that is computed here "
            f"({len(left)} such tensors)"
        )


class _Checkpoint:
    """Tensors by name over all shards; remembers which were read."""

    def __init__(
        self, directory: Path, stack: ExitStack, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._directory = directory
        self._dtype = dtype
        self._device = device
        self._shard_of: dict[str, Any] = {}
        self._read: set[str] = set()
        for path in _shards(directory):
            try:
                shard = stack.enter_context(safetensors.safe_open(path, framework="pt"))
            except (OSError, safetensors.SafetensorError) as error:
                raise ModelUnsupported(f"{path} is not a whole safetensors file: {error}") from (
                    error
                )
            self._shard_of |= dict.fromkeys(shard.keys(), shard)

    def __contains__(self, name: str) -> bool:
        return name in self._shard_of

    def get(self, name: str, *shape: int) -> torch.Tensor:
        if name not in self._shard_of:
            raise ModelUnsupported(f"{self._directory}: the checkpoint has no tensor {name}")
        tensor = self._shard_of[name].get_tensor(name)
        if tuple(tensor.shape) != shape:
            raise ModelUnsupported(
                f"{self._directory}: {name} has shape {list(tensor.shape)}; config.json says "
                f"{list(shape)}"
            )
        self._read.add(name)
        result: torch.Tensor = tensor.to(self._device, self._dtype)
        return result

    def unread(self) -> list[str]:
        # Old checkpoints carry RoPE's frequencies, which the config determines.
        return sorted(
            name
            for name in self._shard_of.keys() - self._read
            if not name.endswith("rotary_emb.inv_freq")
        )


def _shards(directory: Path) -> Iterator[Path]:
    if (directory / _INDEX).is_file():
        index = json.loads((directory / _INDEX).read_text())
        yield from sorted({directory / name for name in index["weight_map"].values()})
    elif (directory / _SINGLE).is_file():
        yield directory / _SINGLE
    else:
        raise ModelUnsupported(
            f"{directory} has neither {_SINGLE} nor {_INDEX}; only safetensors weights are read"
        )


def _weights(spec: DecoderSpec, checkpoint: _Checkpoint) -> DecoderWeights:
    embedding = checkpoint.get("model.embed_tokens.weight", spec.vocab_size, spec.hidden_size)
    sites = spec.sites()
    layers = (
        _layer(spec, checkpoint, index, sites[index * SITES_PER_LAYER :][:SITES_PER_LAYER])
        for index in range(spec.num_layers)
    )
    norm = checkpoint.get("model.norm.weight", spec.hidden_size)
    if not spec.tied_embeddings:
        head = checkpoint.get("lm_head.weight", spec.vocab_size, spec.hidden_size)
    else:
        head = embedding
        if "lm_head.weight" in checkpoint:  # some checkpoints store the tied copy
            stored = checkpoint.get("lm_head.weight", spec.vocab_size, spec.hidden_size)
            if not torch.equal(stored, embedding):
                raise ModelUnsupported("lm_head.weight differs from the embedding it is tied to")
    return DecoderWeights(spec, embedding, norm, head, layers)


def _layer(
    spec: DecoderSpec, checkpoint: _Checkpoint, index: int, sites: list[Site]
) -> LayerWeights:
    prefix = f"model.layers.{index}"
    hidden = spec.hidden_size
    qkv, o, gate_up, down = (_fused(checkpoint, site) for site in sites)

    def head_norm(name: str) -> torch.Tensor | None:
        if not spec.qk_norm:
            return None
        return checkpoint.get(f"{prefix}.self_attn.{name}.weight", spec.head_dim)

    return LayerWeights(
        input_norm=checkpoint.get(f"{prefix}.input_layernorm.weight", hidden),
        qkv=qkv,
        q_norm=head_norm("q_norm"),
        k_norm=head_norm("k_norm"),
        o=o,
        post_norm=checkpoint.get(f"{prefix}.post_attention_layernorm.weight", hidden),
        gate_up=gate_up,
        down=down,
    )


def _fused(checkpoint: _Checkpoint, site: Site) -> LinearWeights:
    weights = [
        checkpoint.get(f"{part.path}.weight", part.length, site.in_features) for part in site.slices
    ]
    biases = [
        checkpoint.get(f"{part.path}.bias", part.length)
        if f"{part.path}.bias" in checkpoint
        else weight.new_zeros(part.length)
        for part, weight in zip(site.slices, weights, strict=True)
    ]
    has_bias = any(f"{part.path}.bias" in checkpoint for part in site.slices)
    return LinearWeights(torch.cat(weights), torch.cat(biases) if has_bias else None)
