"""Checkpoint to weights: safetensors shards read once, q/k/v and gate/up fused as they come."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import torch

from lorax_serve.checkpoint.part import WHOLE, Part, SitePart
from lorax_serve.checkpoint.shards import open_shards
from lorax_serve.checkpoint.spec import OUTPUT, SITES_PER_LAYER, DecoderSpec, Layout, Site
from lorax_serve.checkpoint.spec_cache import load_spec
from lorax_serve.checkpoint.weights import DecoderWeights, LayerWeights, LinearWeights, Norm
from lorax_serve.errors import ModelUnsupported

__all__ = [
    "Checkpoint",
    "load_weights",
    "read_bias",
    "read_head",
    "read_norm",
    "read_weight",
]


@contextmanager
def load_weights(
    directory: Path, dtype: torch.dtype, device: torch.device, part: Part = WHOLE
) -> Iterator[DecoderWeights]:
    """Open a Hugging Face model directory; its layers are read as they are asked for.

    Args:
        directory: with ``config.json`` and safetensors weights.
        dtype: of all weights and activations.
        device: where they live.
        part: what is wanted of them; of the rest, nothing is brought into memory.

    Raises:
        ModelUnsupported: when a tensor is missing, has another shape than the config says, or is
            left over: a forward that ignores part of a checkpoint is not this model's forward.
    """
    spec = load_spec(directory)
    with ExitStack() as stack:
        checkpoint = Checkpoint(directory, spec.layout, stack, dtype, device)
        yield _weights(spec, checkpoint, part)
    left = checkpoint.unread()
    if left:
        raise ModelUnsupported(
            f"{directory}: {left[0]} is not part of the forward that is computed here "
            f"({len(left)} such tensors)"
        )


class Checkpoint:
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

    def get(
        self, name: str, *shape: int, of: Callable[[torch.Tensor], torch.Tensor] | None = None
    ) -> torch.Tensor:
        """A tensor on the device, or what ``of`` makes of a view of it in its file.

        Raises:
            ModelUnsupported: it is not there, or has another shape.
        """
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
        own = tensor if of is None else of(tensor)
        result: torch.Tensor = own.to(self._device, self._dtype)
        return result

    def unread(self) -> list[str]:
        """The names of tensors that nobody has asked for."""
        # Old checkpoints carry RoPE's frequencies or causal masks.
        return sorted(
            name for name in self._shard_of.keys() - self._read if not name.endswith(self._buffers)
        )


def read_weight(
    spec: DecoderSpec, checkpoint: Checkpoint, site: Site, part: SitePart
) -> torch.Tensor:
    """A part of a site's weight, ``[columns, inputs]``.

    Args:
        spec: of the whole model.
        checkpoint: its files.
        site: of ``spec``.
        part: of the site.
    """
    conv1d = spec.layout.conv1d

    def own(which: int, stored: torch.Tensor) -> torch.Tensor:
        weight = stored.T if conv1d else stored
        return part.columns_of(which, weight[:, part.inputs], 0)

    weights = []
    for which, each in enumerate(site.slices):
        shape = (each.length, site.in_features)
        name, stored_shape = f"{each.path}.weight", shape[::-1] if conv1d else shape
        weights.append(checkpoint.get(name, *stored_shape, of=partial(own, which)))
    return torch.cat(weights)


def read_bias(checkpoint: Checkpoint, site: Site, part: SitePart) -> torch.Tensor | None:
    """A part of a site's bias; None if no slice has one."""
    if not any(each.has_bias for each in site.slices):
        return None
    biases: list[torch.Tensor | None] = []
    for which, each in enumerate(site.slices):
        own = partial(part.columns_of, which)
        stored = checkpoint.get(f"{each.path}.bias", each.length, of=own) if each.has_bias else None
        biases.append(stored)
    like = next(bias for bias in biases if bias is not None)
    return torch.cat(
        [
            like.new_zeros(width) if bias is None else bias
            for bias, width in zip(biases, part.widths, strict=True)
        ]
    )


def read_head(
    spec: DecoderSpec, checkpoint: Checkpoint, tokens: slice = slice(None)
) -> torch.Tensor:
    """Rows of the output's weight that is tied to nothing, ``[tokens, hidden]``."""
    name, shape = f"{OUTPUT}.weight", (spec.vocab_size, spec.hidden_size)
    return checkpoint.get(name, *shape, of=lambda stored: stored[tokens])


def read_norm(spec: DecoderSpec, checkpoint: Checkpoint, path: str, size: int) -> Norm:
    """A norm of the kind that the spec names."""
    weight = checkpoint.get(f"{path}.weight", size)
    return Norm(weight, checkpoint.get(f"{path}.bias", size) if spec.norm == "layer" else None)


def _weights(spec: DecoderSpec, checkpoint: Checkpoint, part: Part) -> DecoderWeights:
    names, hidden = spec.layout, spec.hidden_size
    embedding = checkpoint.get(f"{names.in_model(names.embedding)}.weight", spec.vocab_size, hidden)
    positions = None
    if names.positions is not None:
        path = names.in_model(names.positions)
        positions = checkpoint.get(f"{path}.weight", spec.max_positions, hidden)
    sites = spec.sites()
    layers = (
        _layer(spec, checkpoint, layer, sites[layer * SITES_PER_LAYER :][:SITES_PER_LAYER], part)
        for layer in range(spec.num_layers)
    )
    norm = read_norm(spec, checkpoint, names.in_model(names.norm), hidden)
    tokens = part.tokens(spec.vocab_size)
    if not spec.tied_embeddings:
        head = read_head(spec, checkpoint, tokens)
    else:
        head = embedding if part == WHOLE else embedding[tokens]
        stored = f"{OUTPUT}.weight" in checkpoint  # some checkpoints store the tied copy
        if stored and not torch.equal(read_head(spec, checkpoint, tokens), head):
            raise ModelUnsupported("lm_head.weight differs from the embedding it is tied to")
    return DecoderWeights(part.spec(spec), embedding, positions, norm, head, layers)


def _layer(
    spec: DecoderSpec, checkpoint: Checkpoint, layer: int, sites: list[Site], part: Part
) -> LayerWeights:
    names = spec.layout
    qkv, o, gate_up, down = (
        _linear(spec, checkpoint, site, part.site(spec, index, site))
        for index, site in enumerate(sites)
    )

    def norm(name: str, size: int = spec.hidden_size) -> Norm:
        return read_norm(spec, checkpoint, names.in_layer(layer, name), size)

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


def _linear(spec: DecoderSpec, checkpoint: Checkpoint, site: Site, part: SitePart) -> LinearWeights:
    bias = read_bias(checkpoint, site, part)
    return LinearWeights(read_weight(spec, checkpoint, site, part), bias if part.adds else None)
