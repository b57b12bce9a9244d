"""How A, B and DoRA's magnitudes start."""

from __future__ import annotations

import math

import torch
from torch import nn

from lorax_serve.adapter import ModuleShape
from lorax_serve.errors import TrainingError
from lorax_train.config import InjectionConfig
from lorax_train.model.layers import LoRAEmbedding, LoRALayer, LoRALinear, Pair

__all__ = ["init_a", "starting_pair"]

# The ancestor's A ~ N(0, 0.01) is Axon's normal initialiser, whose scale is a standard deviation.
# PEFT's gaussian has 1/r, which for the ancestor's r = 1 is a hundred times as much.
_GAUSSIAN_STD = 0.01
# Of PiSSA's subspace iteration: columns beyond the rank, and rounds.
_SPARE, _ITERATIONS = 16, 8


def starting_pair(
    layer: LoRALayer,
    path: str,
    shape: ModuleShape,
    settings: InjectionConfig,
    scale: float,
    generator: torch.Generator,
) -> Pair:
    """One adapter's share of a layer before the first step, on the layer's device.

    Args:
        layer: with the frozen base.
        path: of the layer, for messages.
        shape: of the base.
        settings: the adapter's.
        scale: of the product.
        generator: on the CPU; draws A.

    Raises:
        TrainingError: when the layer cannot have what the settings ask for.
    """
    start = None
    if isinstance(layer, LoRAEmbedding):
        _check_embedding(layer, path, settings)
        # PEFT starts these the other way round.
        a = torch.zeros(settings.r, shape.in_features)
        b = torch.randn(shape.out_features, settings.r, generator=generator)
    elif settings.init == "pissa":
        assert isinstance(layer, LoRALinear)
        _check_rank(path, shape, settings.r)
        start = _principal(layer.product.dense(), settings.r, scale)
        a, b = start[0].clone(), start[1].clone()
    else:
        a = init_a(settings.r, shape.in_features, settings.init, generator)
        b = torch.zeros(shape.out_features, settings.r)
    device = layer.device
    a, b = nn.Parameter(a.to(device)), nn.Parameter(b.to(device))
    pair = Pair(a, b, scale, settings.dropout, start=start)
    if settings.dora:
        assert isinstance(layer, LoRALinear)
        pair.magnitude = nn.Parameter(layer.row_lengths(pair))
    return pair


def init_a(
    rank: int, in_features: int, init: str, generator: torch.Generator | None = None
) -> torch.Tensor:
    """A's start, ``[rank, in_features]`` float32 on the CPU.

    ``kaiming`` is PEFT's default, uniform within ``±1/sqrt(in_features)``; ``gaussian`` is the
    ancestor's, normal with a standard deviation of 0.01.
    """
    a = torch.empty(rank, in_features)
    if init == "gaussian":
        return nn.init.normal_(a, std=_GAUSSIAN_STD, generator=generator)
    return nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)


def _principal(w: torch.Tensor, rank: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """PiSSA's start (arXiv:2404.02948): A and B whose ``scale * B A`` is the best approximation of
    ``w`` of this rank.

    It is found by subspace iteration, as in PEFT's ``pissa_niter_[n]``: a whole decomposition takes
    minutes for each layer of a large model. How near it is decides how well training starts, and
    not whether the adapter is exact, since what is there at the start is taken away again.
    """
    devices = [w.device] if w.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(0)
        found = torch.svd_lowrank(w.float(), q=min(rank + _SPARE, *w.shape), niter=_ITERATIONS)
    u, s, v = (each[..., :rank] for each in found)
    root = (s / scale).sqrt()
    return root[:, None] * v.T, u * root


def _check_embedding(layer: LoRAEmbedding, path: str, settings: InjectionConfig) -> None:
    for flag, given in (("--dora", settings.dora), ("--init pissa", settings.init == "pissa")):
        if given:
            raise TrainingError(
                f"{flag}: {path} is an embedding, which cannot have it; leave "
                f"{path.rpartition('.')[2]} out of --targets"
            )
    if hasattr(layer.base, "embed_scale"):
        raise TrainingError(
            f"--targets: this model scales what {path} gives, and versions of PEFT differ in "
            "whether LoRA's part is scaled too; target other modules"
        )


def _check_rank(path: str, shape: ModuleShape, rank: int) -> None:
    most = min(shape.in_features, shape.out_features)
    if rank > most:
        raise TrainingError(
            f"--init pissa: {path} is {shape.out_features} x {shape.in_features}, so its rank is "
            f"at most {most}; lower --r (now {rank}) to it"
        )
