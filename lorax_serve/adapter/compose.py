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
        parts: a name to call each by in errors, its weights, and its own weight in the sum. The
            base's own weights, which PEFT stores beside LoRA on an embedding, must have been taken
            out: any parameter that is left is taken for one that the adapter changes.

    Raises:
        AdapterRejected: a part is more than plain LoRA, whose sum would not be defined so.
    """
    for name, weights, _ in parts:
        beyond = _beyond_lora(weights)
        if beyond:
            raise AdapterRejected(
                RejectReason.UNSUPPORTED,
                f"adapter {name!r} has {beyond}: only plain LoRA can be added up or scaled; name "
                "this adapter alone, in adapter_id",
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
    return LoRAWeights(pairs)


def _beyond_lora(weights: LoRAWeights) -> str:
    """What else there is, in words."""
    own = sorted(weights.parameters)
    more = f" and {len(own) - 1} more" if len(own) > 1 else ""
    found = {
        "DoRA": any(pair.magnitude is not None for pair in weights.pairs.values()),
        "lora_bias": any(pair.bias is not None for pair in weights.pairs.values()),
        f"its own {', '.join(own[:1])}{more} in place of the base's": own,
        "trained tokens": weights.tokens,
        "an invocation (aLoRA)": weights.invocation_tokens,
    }
    return ", ".join(what for what, is_there in found.items() if is_there)
