"""Checkpoint to weights: safetensors shards read once, q/k/v and gate/up fused as they come."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from lorax_serve.errors import ModelUnsupported
from lorax_serve.model.shards import open_shards
from lorax_serve.model.spec import SITES_PER_LAYER, DecoderSpec, Layout, Site
from lorax_serve.model.spec_cache import load_spec
from lorax_serve.model.weights import DecoderWeights, LayerWeights, LinearWeights, Norm

__all__ = ["load_weights"]


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
        checkpoint = _Checkpoint(directory, spec.layout, stack, dtype, device)
        yield _weights(spec, checkpoint)
    left = checkpoint.unread()
    if left:
        raise ModelUnsupported(
            f"{directory}: {left[0]} is not part of the forward that is computed here "
            f"({len(left)} such tensors)"
        )


class _Checkpoint:
    """Tensors by their names in the whole model, over all shards; remembers which were read."""

    def __init__(
        self,
        directory: Path,
        layout: Layout,
        stack: ExitStack,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._directory = directory
        self._buffers = layout.buffers
        self._dtype = dtype
        self._device = device
        self._shard_of = open_shards(directory, stack)
        self._read: set[str] = set()
        whole = any(name.startswith(f"{layout.inner}.") for name in self._shard_of)
        self._left_out = "" if whole else f"{layout.inner}."

    def __contains__(self, name: str) -> bool:
        return name.removeprefix(self._left_out) in self._shard_of

    def get(self, name: str, *shape: int) -> torch.Tensor:
        name = name.removeprefix(self._left_out)
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
        # Old checkpoints carry RoPE's frequencies or causal masks.
        return sorted(
            name for name in self._shard_of.keys() - self._read if not name.endswith(self._buffers)
        )


def _weights(spec: DecoderSpec, checkpoint: _Checkpoint) -> DecoderWeights:
    names, hidden = spec.layout, spec.hidden_size
    embedding = checkpoint.get(f"{names.in_model(names.embedding)}.weight", spec.vocab_size, hidden)
    positions = None
    if names.positions is not None:
        path = names.in_model(names.positions)
        positions = checkpoint.get(f"{path}.weight", spec.max_positions, hidden)
    sites = spec.sites()
    layers = (
        _layer(spec, checkpoint, index, sites[index * SITES_PER_LAYER :][:SITES_PER_LAYER])
        for index in range(spec.num_layers)
    )
    norm = _norm(spec, checkpoint, names.in_model(names.norm), hidden)
    if not spec.tied_embeddings:
        head = checkpoint.get("lm_head.weight", spec.vocab_size, hidden)
    else:
        head = embedding
        if "lm_head.weight" in checkpoint:  # some checkpoints store the tied copy
            stored = checkpoint.get("lm_head.weight", spec.vocab_size, hidden)
            if not torch.equal(stored, embedding):
                raise ModelUnsupported("lm_head.weight differs from the embedding it is tied to")
    return DecoderWeights(spec, embedding, positions, norm, head, layers)


def _layer(
    spec: DecoderSpec, checkpoint: _Checkpoint, index: int, sites: list[Site]
) -> LayerWeights:
    names = spec.layout
    qkv, o, gate_up, down = (_fused(spec, checkpoint, site) for site in sites)

    def norm(name: str, size: int = spec.hidden_size) -> Norm:
        return _norm(spec, checkpoint, names.in_layer(index, name), size)

    q_norm, k_norm = (
        (None, None)
        if names.qk_norm is None
        else (norm(name, spec.head_dim) for name in names.qk_norm)
    )
    return LayerWeights(
        input_norm=norm(names.input_norm),
        qkv=qkv,
        q_norm=q_norm,
        k_norm=k_norm,
        o=o,
        post_norm=norm(names.post_norm),
        gate_up=gate_up,
        down=down,
    )


def _norm(spec: DecoderSpec, checkpoint: _Checkpoint, path: str, size: int) -> Norm:
    weight = checkpoint.get(f"{path}.weight", size)
    return Norm(weight, checkpoint.get(f"{path}.bias", size) if spec.norm == "layer" else None)


def _fused(spec: DecoderSpec, checkpoint: _Checkpoint, site: Site) -> LinearWeights:
    weights = [
        checkpoint.get(f"{part.path}.weight", site.in_features, part.length).T
        if spec.layout.conv1d
        else checkpoint.get(f"{part.path}.weight", part.length, site.in_features)
        for part in site.slices
    ]
    biases = [
        checkpoint.get(f"{part.path}.bias", part.length)
        if part.has_bias
        else weight.new_zeros(part.length)
        for part, weight in zip(site.slices, weights, strict=True)
    ]
    has_bias = any(part.has_bias for part in site.slices)
    return LinearWeights(torch.cat(weights), torch.cat(biases) if has_bias else None)
