"""Several adapters as one: their ranks beside each other, each with a weight of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lorax_serve.adapter.weights import LoRAPair, LoRAWeights
from lorax_serve.errors import AdapterRejected, RejectReason

__all__ = ["compose"]


def compose(parts: Sequence[tuple[str, LoRAWeights, float]]) -> LoRAWeights:
    """The adapter whose change of each module is the weighted sum of the parts' changes.

    ``sum_i weight_i * scale_i * x @ A_i.T @ B_i.T``, as PEFT's ``add_weighted_adapter(...,
    combination_type="cat")``: the A are laid below each other, the B beside each other. Nothing is
    lost, and nothing is merged into the base. In float32, before the fold rounds.

    Args:
        parts: a name to call each by in errors, its weights, and its own weight in the sum.

    Raises:
        AdapterRejected: a part is more than plain LoRA, whose sum would not be defined so.
    """
    for name, weights, _ in parts:
        what = _beyond_lora(weights)
        if what:
            raise AdapterRejected(
                RejectReason.UNSUPPORTED,
                f"adapter {name} cannot be composed with others: it has {what}, and only LoRA can "
                "be added up",
            )
    paths = dict.fromkeys(path for _, weights, _ in parts for path in weights.pairs)
    pairs = {}
    for path in paths:
        a, b = [], []
        for _, weights, weight in parts:
            pair = weights.pairs.get(path)
            if pair is not None:
                a.append(pair.a.float())
                b.append(pair.b.float() * (pair.scale * weight))
        pairs[path] = LoRAPair(torch.cat(a), torch.cat(b, dim=1), 1.0)
    return LoRAWeights(pairs, {k: t for _, w, _ in parts for k, t in w.parameters.items()})


def _beyond_lora(weights: LoRAWeights) -> str:
    copies = {f"{path}.weight" for path in weights.pairs}  # the base's own, stored beside LoRA
    found = {
        "DoRA": any(pair.magnitude is not None for pair in weights.pairs.values()),
        "lora_bias": any(pair.bias is not None for pair in weights.pairs.values()),
        "modules of its own": not weights.parameters.keys() <= copies,
        "trained tokens": weights.tokens,
        "an invocation (aLoRA)": weights.invocation_tokens,
    }
    return ", ".join(what for what, is_there in found.items() if is_there)
