"""The frozen base in pieces: each process keeps a part of every decoder layer (FSDP2).

A layer is put together before it is computed, forward and backward, and taken apart again. What is
trained stays whole in every process, and so do the embeddings, the last norm and the output head,
which is used outside of the model's own forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from lorax_serve.errors import TrainingError
from lorax_train.memory import give_back_at_once
from lorax_train.model.checkpointing import decoder_layers
from lorax_train.model.inject import TrainableLoRA

__all__ = ["Sharded", "shard_layers"]


@dataclass(frozen=True, slots=True)
class Sharded:
    """What ``shard_layers`` has done, in bytes.

    Attributes:
        whole: of the layers that are in pieces.
        own: of this process's pieces of them.
    """

    whole: int
    own: int


def shard_layers(
    model: PreTrainedModel,
    adapters: Sequence[TrainableLoRA],
    processes: int,
    device: torch.device,
) -> Sharded:
    """Put the decoder layers in pieces, in place, and everything else on ``device``.

    Args:
        model: with the adapters in it; on the CPU, so that no more than one layer is ever whole
            on the device.
        adapters: that are in it.
        processes: all of those that have joined.
        device: of this process.

    Raises:
        TrainingError: when the model does not mark its layers, or they cannot be in pieces.
    """
    layers = decoder_layers(model, "--fsdp")
    trained = {parameter for adapter in adapters for parameter in adapter.parameters()}
    options: dict[str, Any] = {
        "mesh": init_device_mesh(device.type, (processes,)),
        "reshard_after_forward": True,
    }
    try:
        for layer in layers:
            fully_shard(layer, ignored_params=trained, **options)
        # It holds nothing itself: it is the root that knows in which order the layers come.
        whole = {each for each in model.parameters() if not isinstance(each, DTensor)}
        base: nn.Module = model.base_model
        fully_shard(base, ignored_params=whole, **options)
    except (ValueError, NotImplementedError) as error:
        raise TrainingError(f"--fsdp: this model's layers cannot be in pieces: {error}") from error
    if device.type == "cpu":
        give_back_at_once()
    _move_the_rest(model, adapters, device)
    _always_go_back(model)
    pieces = [each for each in model.parameters() if isinstance(each, DTensor)]
    return Sharded(
        whole=sum(each.numel() * each.element_size() for each in pieces),
        own=sum(each.to_local().nbytes for each in pieces),
    )


def _move_the_rest(
    model: PreTrainedModel, adapters: Sequence[TrainableLoRA], device: torch.device
) -> None:
    """As ``model.to(device)``, which would ask for whole layers. Parameters stay the objects that
    they are: optimizers and tied modules know them."""
    for parameter in model.parameters():
        if not isinstance(parameter, DTensor):
            parameter.data = parameter.data.to(device)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
    for adapter in adapters:
        for pair in adapter.pairs().values():
            if pair.start is not None:
                pair.start = pair.start[0].to(device), pair.start[1].to(device)


def _always_go_back(model: PreTrainedModel) -> None:
    """Have the backward pass go through every layer, whichever of them rows of this process train:
    processes put a layer together at the same time, or wait for ever."""

    def wants_gradient(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output.requires_grad_() if torch.is_grad_enabled() else output

    embedding: Any = model.get_input_embeddings()
    embedding.register_forward_hook(wants_gradient)
