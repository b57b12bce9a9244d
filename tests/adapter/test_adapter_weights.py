"""``match_weights``: every tensor in its place, or a refusal that names it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from lorax_serve.adapter import (
    LoRAConfig,
    ModuleKind,
    ModuleShape,
    Role,
    match_tensors,
    match_weights,
    tensor_name,
)
from lorax_serve.errors import AdapterRejected, RejectReason

MODULES = {
    "layers.0.q": ModuleShape(6, 4),
    "layers.0.v": ModuleShape(6, 3),
    "layers.1.q": ModuleShape(6, 4),
    "lm_head": ModuleShape(6, 9, ModuleKind.OUTPUT),
}
CONFIG = LoRAConfig(r=2, lora_alpha=6, target_modules=("q",), rank_pattern={"layers.1.q": 1})
A0, B0 = (tensor_name("layers.0.q", role) for role in (Role.A, Role.B))
A1, B1 = (tensor_name("layers.1.q", role) for role in (Role.A, Role.B))


def tensors(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """What fits ``CONFIG``."""
    generator = torch.Generator().manual_seed(3)
    shapes = {A0: (2, 6), B0: (4, 2), A1: (1, 6), B1: (4, 1)}
    return {k: torch.randn(shape, generator=generator).to(dtype) for k, shape in shapes.items()}


def rejection(
    given: dict[str, torch.Tensor], config: LoRAConfig = CONFIG, modules: Any = MODULES
) -> AdapterRejected:
    with pytest.raises(AdapterRejected) as caught:
        match_weights(config, given, modules)
    return caught.value


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_pairs_have_their_own_rank_and_scale(dtype: torch.dtype) -> None:
    given = tensors(dtype)
    weights = match_weights(CONFIG, given, MODULES)
    assert list(weights.pairs) == ["layers.0.q", "layers.1.q"]
    first, second = weights.pairs.values()
    assert (first.rank, first.scale) == (2, 3.0)
    assert (second.rank, second.scale) == (1, 6.0)
    assert first.a is given[A0]
    assert second.b is given[B1]
    assert weights.max_rank == 2
    assert weights.nbytes == (12 + 8 + 6 + 4) * dtype.itemsize


def test_an_initialisation_that_changes_the_base_is_refused_without_a_probe() -> None:
    config = replace(CONFIG, init_lora_weights="pissa")
    error = rejection(tensors(), config)
    assert error.reason is RejectReason.UNSUPPORTED
    assert "init_lora_weights='pissa'" in str(error)
    assert match_weights(config, tensors(), MODULES, probed=True).pairs


def test_every_problem_is_told() -> None:
    given = tensors()
    del given[A0]
    given[tensor_name("layers.0.v", Role.A)] = torch.zeros(1)
    given[B1] = torch.zeros(4, 3)
    match = match_tensors(CONFIG, given, MODULES)
    assert [problem.reason for problem in match.problems] == [
        RejectReason.UNEXPECTED_TENSOR,
        RejectReason.MISSING_TENSOR,
        RejectReason.RANK_MISMATCH,
    ]
    assert match.missing == [A0]
    assert match.unmatched == [tensor_name("layers.0.v", Role.A)]
    assert match.weights is None


def test_names_without_the_prefix_are_applied_with_a_warning() -> None:
    given = {name.removeprefix("base_model.model."): t for name, t in tensors().items()}
    match = match_tensors(CONFIG, given, MODULES)
    assert match.weights is not None
    assert "lack PEFT's prefix" in match.warnings[0]


def test_dtypes_may_be_mixed() -> None:
    given = tensors()
    given[A0] = given[A0].half()
    given[B1] = given[B1].bfloat16()
    assert match_weights(CONFIG, given, MODULES).pairs["layers.0.q"].a.dtype == torch.float16


def test_no_tensors() -> None:
    assert rejection({}).reason is RejectReason.MISSING_TENSOR


def test_no_module_matches() -> None:
    error = rejection(tensors(), LoRAConfig(target_modules=("query",)))
    assert error.reason is RejectReason.NO_MATCH
    assert "query" in str(error)
    assert "lm_head, q, v" in str(error)


@pytest.mark.parametrize("name", [A0, B0, A1, B1])
def test_missing_tensor(name: str) -> None:
    given = tensors()
    del given[name]
    error = rejection(given)
    assert error.reason is RejectReason.MISSING_TENSOR
    assert name in str(error)
    assert "1 of 4" in str(error)


@pytest.mark.parametrize(
    ("name", "reason", "said"),
    [
        (tensor_name("layers.0.v", Role.A), RejectReason.UNEXPECTED_TENSOR, "target_modules"),
        (tensor_name("lm_head", Role.B), RejectReason.UNEXPECTED_TENSOR, "target_modules"),
        (tensor_name("layers.2.q", Role.A), RejectReason.NO_MATCH, "'layers.2.q'"),
        (tensor_name("h.0.c_attn", Role.A), RejectReason.NO_MATCH, "another model"),
        (
            A0.replace("lora_A.weight", "lora_embedding_A"),
            RejectReason.UNEXPECTED_TENSOR,
            "target_modules",
        ),
        (
            A0.replace("lora_A.", "lora_magnitude_vector."),
            RejectReason.UNEXPECTED_TENSOR,
            "use_dora is off",
        ),
        (B0.replace("weight", "bias"), RejectReason.UNEXPECTED_TENSOR, "lora_bias is off"),
        ("base_model.model.lm_head.weight", RejectReason.UNEXPECTED_TENSOR, "modules_to_save"),
        ("base_model.model.layers.0.q.bias", RejectReason.UNEXPECTED_TENSOR, "bias is 'none'"),
        (
            "base_model.model.lm_head.token_adapter.trainable_tokens_delta",
            RejectReason.UNEXPECTED_TENSOR,
            "trainable_token_indices",
        ),
        ("layers.0.q.lora_A.weight", RejectReason.UNEXPECTED_TENSOR, "target_modules"),
        (A0 + ".extra", RejectReason.UNSUPPORTED, "PEFT's naming"),
        (A0.replace("_A.", "_A.default."), RejectReason.UNSUPPORTED, "an adapter's name inside"),
    ],
)
def test_unexpected_tensor(name: str, reason: RejectReason, said: str) -> None:
    error = rejection({**tensors(), name: torch.zeros(2, 6)})
    assert error.reason is reason
    assert name in str(error)
    assert said in str(error)


@pytest.mark.parametrize(
    ("name", "shape", "reason", "said"),
    [
        (A0, (2, 5), RejectReason.SHAPE_MISMATCH, "[2, 5]"),
        (A0, (6, 2), RejectReason.SHAPE_MISMATCH, "needs [2, 6]"),
        (B0, (5, 2), RejectReason.SHAPE_MISMATCH, "needs [4, 2]"),
        (B0, (4,), RejectReason.SHAPE_MISMATCH, "[4]"),
        (A0, (2, 6, 1), RejectReason.SHAPE_MISMATCH, "[2, 6, 1]"),
        (A0, (), RejectReason.SHAPE_MISMATCH, "[]"),
        (A0, (3, 6), RejectReason.RANK_MISMATCH, "rank 3"),
        (B0, (4, 1), RejectReason.RANK_MISMATCH, "r=2"),
        (A1, (2, 6), RejectReason.RANK_MISMATCH, "r=1"),  # its own, from rank_pattern
        (A0, (0, 6), RejectReason.RANK_MISMATCH, "rank 0"),
    ],
)
def test_wrong_shape_or_rank(
    name: str, shape: tuple[int, ...], reason: RejectReason, said: str
) -> None:
    error = rejection({**tensors(), name: torch.zeros(shape)})
    assert error.reason is reason
    assert name in str(error)
    assert said in str(error)


@pytest.mark.parametrize("name", [A0, B1])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_not_finite(name: str, value: float, dtype: torch.dtype) -> None:
    given = tensors(dtype)
    given[name][0, -1] = value
    error = rejection(given)
    assert error.reason is RejectReason.NOT_FINITE
    assert name in str(error)


def test_largest_values_are_finite() -> None:
    given = {k: torch.full_like(t, 65504) for k, t in tensors(torch.float16).items()}
    assert match_weights(CONFIG, given, MODULES).pairs


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.float64, torch.bool])
def test_other_dtypes(dtype: torch.dtype) -> None:
    error = rejection({**tensors(), B0: torch.ones(4, 2).to(dtype)})
    assert error.reason is RejectReason.UNSUPPORTED
    assert B0 in str(error)
    assert str(dtype) in str(error)
