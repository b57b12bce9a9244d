"""Changes of other modules than linears: what is asked for, and what is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lorax_serve.adapter import LoRAConfig, ModuleKind, ModuleShape, match_tensors
from lorax_serve.adapter.expected import expected_tensors
from lorax_serve.adapter.tensors import tensor_name
from lorax_serve.errors import AdapterRejected, RejectReason

MODULES = {
    "m.embed": ModuleShape(9, 6, ModuleKind.EMBEDDING),
    "m.places": ModuleShape(5, 6, ModuleKind.POSITIONS),
    "m.norm": ModuleShape(6, 6, ModuleKind.NORM),
    "m.q": ModuleShape(6, 4, has_bias=True),
    "head": ModuleShape(6, 9, ModuleKind.OUTPUT, tied_to="m.embed"),
}


def read(**fields: Any) -> LoRAConfig:
    return LoRAConfig.from_dict({"peft_type": "LORA", "r": 2, "target_modules": ["q"]} | fields)


@pytest.mark.parametrize(
    ("fields", "reason", "said"),
    [
        ({"target_modules": ["places"]}, RejectReason.UNSUPPORTED, "learned positions (m.places)"),
        (
            {"modules_to_save": ["q"], "target_modules": ["head"]},
            RejectReason.UNSUPPORTED,
            "full copy of m.q",
        ),
        ({"modules_to_save": ["places"]}, RejectReason.UNSUPPORTED, "full copy of m.places"),
        ({"modules_to_save": ["score"]}, RejectReason.NO_MATCH, "'score'"),
        ({"trainable_token_indices": {"head": [1]}}, RejectReason.UNSUPPORTED, "tied"),
        ({"trainable_token_indices": {"nothing": [1]}}, RejectReason.NO_MATCH, "'nothing'"),
        ({"trainable_token_indices": [9]}, RejectReason.SHAPE_MISMATCH, "names token 9"),
        (
            {"trainable_token_indices": [1], "modules_to_save": ["embed"]},
            RejectReason.UNSUPPORTED,
            "also changes as a whole",
        ),
        (
            {"target_modules": ["embed"], "lora_bias": True},
            RejectReason.UNSUPPORTED,
            "lora_bias on an embedding (m.embed)",
        ),
        (
            {"target_modules": ["embed"], "alora_invocation_tokens": [1]},
            RejectReason.UNSUPPORTED,
            "alora_invocation_tokens on an embedding",
        ),
    ],
    ids=str,
)
def test_refusals_name_the_module(fields: Any, reason: RejectReason, said: str) -> None:
    match = match_tensors(read(**fields), {"any": torch.zeros(1)}, MODULES)
    assert match.weights is None
    assert match.problems[0].reason is reason
    assert said in str(match.problems[0])


def filled(config: LoRAConfig) -> dict[str, torch.Tensor]:
    """Random tensors of all that the config asks for."""
    generator = torch.Generator().manual_seed(0)
    return {
        tensor_name(*key): torch.randn(want.shape, generator=generator)
        for key, want in expected_tensors(config, MODULES).items()
    }


def test_a_replaced_token_is_replaced_in_the_tied_output_too() -> None:
    config = read(trainable_token_indices=[4, 1])
    weights = match_tensors(config, filled(config), MODULES).weights
    assert weights is not None
    assert list(weights.tokens) == ["m.embed", "head"]
    assert weights.tokens["head"] is weights.tokens["m.embed"]
    assert weights.tokens["head"].token_ids == (4, 1)
    assert weights.num_modules == 3


def test_tied_copies_must_be_equal() -> None:
    modules = {"m.embed_tokens": MODULES["m.embed"], "m.q": MODULES["m.q"]}
    modules["lm_head"] = MODULES["head"]._replace(tied_to="m.embed_tokens")
    config = read(target_modules=["embed_tokens"], ensure_weight_tying=True)
    expected = expected_tensors(config, modules)
    tensors = {tensor_name(*key): torch.ones(want.shape) for key, want in expected.items()}
    assert match_tensors(config, tensors, modules).weights is not None
    tensors["base_model.model.lm_head.lora_A.weight"][0, 0] = 2
    with pytest.raises(AdapterRejected, match=r"lm_head\.lora_A\.weight differs from"):
        raise match_tensors(config, tensors, modules).problems[0]
