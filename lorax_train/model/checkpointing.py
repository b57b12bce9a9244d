"""Activation checkpointing: a decoder layer keeps its input only, and is computed again for the
gradient.

Hugging Face's own asks for a model in training mode, which a frozen base never is here, and knows
nothing of whose tokens are whose.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from lorax_serve.errors import TrainingError
from lorax_train.model.layers import Routing

__all__ = ["checkpoint_layers", "decoder_layers"]


def decoder_layers(model: PreTrainedModel, flag: str) -> list[GradientCheckpointingLayer]:
    """The model's layers, each computed once in a forward pass.

    Args:
        model: one of transformers'.
        flag: that needs them, for the message.

    Raises:
        TrainingError: when the model does not mark its layers.
    """
    layers = [each for each in model.modules() if isinstance(each, GradientCheckpointingLayer)]
    if not layers:
        raise TrainingError(
            f"{flag}: this model does not say what its layers are; leave it out, and lower "
            "--batch-size instead if memory is short"
        )
    return layers


def checkpoint_layers(model: PreTrainedModel, routing: Routing) -> int:
    """Have each decoder layer computed again in the backward pass; returns how many there are.

    The second computation routes tokens and draws dropout's masks as the first did.

    Raises:
        TrainingError: when the model does not mark its layers.
    """
    layers = decoder_layers(model, "--checkpointing")
    for layer in layers:
        _wrap(layer, routing)
    return len(layers)


def _wrap(layer: Any, routing: Routing) -> None:
    forward = layer.forward

    def lean_forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        route = routing.spans, routing.real, routing.draws

        def as_before(*args: Any, **kwargs: Any) -> Any:
            with routing.to(*route):
                return forward(*args, **kwargs)

        # Nothing in a layer draws from torch's own generator.
        return checkpoint(as_before, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    layer.forward = lean_forward
