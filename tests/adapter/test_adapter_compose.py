"""``compose``: the weighted sum of several adapters' changes, or a refusal that says of what."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from lorax_serve.adapter import (
    LoRAConfig,
    LoRAPair,
    LoRAWeights,
    ModuleKind,
    ModuleShape,
    TokenRows,
    compose,
    match_weights,
    tensor_name,
)
from lorax_serve.adapter.expected import expected_tensors
from lorax_serve.errors import AdapterRejected, RejectReason

MODULES = {
    "m.embed": ModuleShape(9, 6, ModuleKind.EMBEDDING),
    "m.0.q": ModuleShape(6, 4, has_bias=True),
    "m.0.v": ModuleShape(6, 3),
    "m.1.q": ModuleShape(6, 4, has_bias=True),
    "m.norm": ModuleShape(6, 6, ModuleKind.NORM),
    "head": ModuleShape(6, 9, ModuleKind.OUTPUT),
}


def adapter(seed: int = 0, dtype: torch.dtype = torch.float32, **fields: Any) -> LoRAWeights:
    """Random tensors of all that the config asks for, the base's own weights left out."""
    config = LoRAConfig.from_dict({"peft_type": "LORA", "r": 2, "target_modules": ["q"]} | fields)
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        tensor_name(*key): torch.randn(want.shape, generator=generator).to(dtype)
        for key, want in expected_tensors(config, MODULES).items()
        if want.required
    }
    return match_weights(config, tensors, MODULES)


def change(pair: LoRAPair | None) -> torch.Tensor | float:
    """What is added to a module's weight, in float64."""
    return 0.0 if pair is None else pair.scale * pair.b.double() @ pair.a.double()


def check(*parts: tuple[LoRAWeights, float]) -> LoRAWeights:
    """Compose them, and compare each module's change with the sum of the parts'."""
    composed = compose([(f"a{n}", weights, scale) for n, (weights, scale) in enumerate(parts)])
    paths = {path for weights, _ in parts for path in weights.pairs}
    assert composed.pairs.keys() == paths
    for path, pair in composed.pairs.items():
        wanted = sum(scale * change(weights.pairs.get(path)) for weights, scale in parts)
        rounding = 1e-6 * max(1.0, *(abs(scale) for _, scale in parts))
        torch.testing.assert_close(change(pair), wanted, rtol=1e-6, atol=rounding)
        ranks = [w.pairs[path].rank for w, _ in parts if path in w.pairs]
        assert (pair.rank, pair.a.dtype, pair.b.dtype) == (sum(ranks), *[torch.float32] * 2)
        shape = MODULES[path]
        assert pair.a.shape == (pair.rank, shape.in_features)
        assert pair.b.shape == (shape.out_features, pair.rank)
    assert not composed.parameters
    return composed


def test_ranks_and_alphas_of_their_own() -> None:
    one, two = adapter(1, r=2, lora_alpha=7), adapter(2, r=5, lora_alpha=1)
    composed = check((one, 0.3), (two, 1.7))
    assert (composed.max_rank, composed.num_modules) == (7, 2)


def test_targets_of_their_own() -> None:
    one = adapter(1, target_modules=["q"], layers_to_transform=[1], layers_pattern="m")
    two, three = adapter(2, target_modules=["v"]), adapter(3, target_modules="all-linear")
    composed = check((one, 2), (two, 0.5), (three, 1))
    assert {path: pair.rank for path, pair in composed.pairs.items()} == {
        "m.0.q": 2,
        "m.0.v": 4,
        "m.1.q": 4,
    }


def test_rank_and_alpha_patterns() -> None:
    one = adapter(1, r=3, rank_pattern={"m.1.q": 1}, alpha_pattern={"m.0.q": 11})
    two = adapter(2, rank_pattern={r"m\.0\.q": 4})
    composed = check((one, 0.25), (two, -3))
    assert [pair.rank for pair in composed.pairs.values()] == [3 + 4, 1 + 2]


def test_rslora_scales_by_the_root_of_its_own_rank() -> None:
    one, two = adapter(1, r=4, lora_alpha=2, use_rslora=True), adapter(2, r=2, lora_alpha=2)
    assert (one.pairs["m.0.q"].scale, two.pairs["m.0.q"].scale) == (1.0, 1.0)
    check((one, 0.5), (two, 0.5))
    check((one, -1), (adapter(3, r=9, lora_alpha=5, use_rslora=True), 2))


@pytest.mark.parametrize("scale", [-100, -1, -1e-9, -0.0, 0, 1e-9, 1, 100])
def test_any_scale(scale: float) -> None:
    check((adapter(1), scale), (adapter(2, r=3), 1))
    alone = check((adapter(1), scale))
    assert bool(alone.pairs["m.0.q"].b.any()) == bool(scale)


def test_opposite_scales_cancel_exactly_where_weights_are_the_same() -> None:
    composed = check((adapter(1), 0.7), (adapter(1), -0.7))
    pair = composed.pairs["m.0.q"]
    assert torch.equal(pair.b[:, :2], -pair.b[:, 2:])


def test_embeddings_and_the_output() -> None:
    one = adapter(1, target_modules=["embed", "head"], r=3)
    two = adapter(2, target_modules=["embed", "q"], use_rslora=True)
    composed = check((one, 1.5), (two, -0.5))
    assert {path: pair.rank for path, pair in composed.pairs.items()} == {
        "m.embed": 5,
        "m.0.q": 2,
        "m.1.q": 2,
        "head": 3,
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_files_of_any_dtype_are_added_up_in_float32(dtype: torch.dtype) -> None:
    check((adapter(1, dtype), 1 / 3), (adapter(2), 1 / 7), (adapter(3, dtype), -1 / 9))


def test_one_with_scale_1_has_the_bits_that_it_has_alone() -> None:
    alone = adapter(1, lora_alpha=5, r=3)
    pair, own = compose([("a", alone, 1)]).pairs["m.0.q"], alone.pairs["m.0.q"]
    assert torch.equal(pair.a, own.a)
    assert torch.equal(pair.b * pair.scale, own.b * own.scale)


def test_the_parts_stay_as_they_are() -> None:
    one = adapter(1)
    before = {path: (pair.a.clone(), pair.b.clone()) for path, pair in one.pairs.items()}
    composed = compose([("a", one, 1), ("b", adapter(2), 1)])
    for pair in composed.pairs.values():
        pair.a.zero_()
        pair.b.zero_()
    single = compose([("a", one, 1)])
    for path, (a, b) in before.items():
        assert torch.equal(one.pairs[path].a, a)
        assert torch.equal(one.pairs[path].b, b)
        assert single.pairs[path].rank == 2


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"lora_bias": True}, "lora_bias"),
        ({"use_dora": True, "modules_to_save": ["norm"]}, "DoRA, its own m.norm.weight in place"),
        ({"bias": "lora_only"}, "its own m.0.q.bias and 1 more in place of the base's"),
        ({"modules_to_save": ["norm"]}, "its own m.norm.weight in place of the base's"),
        ({"modules_to_save": ["head"]}, "its own head.weight in place of the base's"),
        ({"modules_to_save": ["embed"]}, "its own m.embed.weight in place of the base's"),
        ({"trainable_token_indices": [4]}, "trained tokens"),
        ({"alora_invocation_tokens": [4, 5]}, r"an invocation \(aLoRA\)"),
    ],
    ids=str,
)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_more_than_lora_is_refused_by_name(fields: Any, said: str, place: int) -> None:
    parts = [("poet", adapter(1), 1.0), ("pilot", adapter(2), 1.0)]
    parts.insert(place, ("judge", adapter(3, **fields), 0.0))
    message = rf"adapter 'judge' has {said}.*: only plain LoRA .* alone, in adapter_id"
    for given in (parts, parts[place : place + 1]):
        with pytest.raises(AdapterRejected, match=message) as caught:
            compose(given)
        assert caught.value.reason is RejectReason.UNSUPPORTED


def test_a_weight_of_the_base_in_the_file_is_taken_for_a_change() -> None:
    """Whoever knows the base takes out what is the base's own beforehand."""
    plain = adapter(1, target_modules=["embed"])
    stored = replace(plain, parameters={"m.embed.weight": torch.zeros(9, 6)})
    for parts in ([("a", stored, 1.0), ("b", plain, 1.0)], [("b", plain, 1.0), ("a", stored, 1.0)]):
        with pytest.raises(AdapterRejected, match=r"'a' has its own m\.embed\.weight"):
            compose(parts)


def test_replaced_tokens_are_refused_whatever_else_there_is() -> None:
    rows = {"m.embed": TokenRows((4,), torch.zeros(1, 6))}
    with pytest.raises(AdapterRejected, match="trained tokens"):
        compose([("a", replace(adapter(1), tokens=rows), 1.0)])
