"""``match_weights``: every tensor in its place, or a refusal that names it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lorax_serve.adapter import LinearShape, LoRAConfig, match_weights
from lorax_serve.adapter.weights import tensor_name
from lorax_serve.errors import AdapterRejected, RejectReason

MODULES = {
    "layers.0.q": LinearShape(6, 4),
    "layers.0.v": LinearShape(6, 3),
    "layers.1.q": LinearShape(6, 4),
    "lm_head": LinearShape(6, 9, is_output=True),
}
CONFIG = LoRAConfig(r=2, lora_alpha=6, target_modules=("q",), rank_pattern={"layers.1.q": 1})
A0, B0 = (tensor_name("layers.0.q", side) for side in "AB")
A1, B1 = (tensor_name("layers.1.q", side) for side in "AB")


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
        (tensor_name("layers.0.v", "A"), RejectReason.UNEXPECTED_TENSOR, "target_modules"),
        (tensor_name("lm_head", "B"), RejectReason.UNEXPECTED_TENSOR, "target_modules"),
        (tensor_name("layers.2.q", "A"), RejectReason.NO_MATCH, "'layers.2.q'"),
        (tensor_name("h.0.c_attn", "A"), RejectReason.NO_MATCH, "another model"),
        (A0.replace("lora_A.weight", "lora_embedding_A"), RejectReason.UNSUPPORTED, "embedding"),
        (A0.replace("lora_A.", "lora_magnitude_vector."), RejectReason.UNSUPPORTED, "DoRA"),
        (B0.replace("weight", "bias"), RejectReason.UNSUPPORTED, "bias on lora_B"),
        ("base_model.model.modules_to_save.w", RejectReason.UNSUPPORTED, "full copy"),
        ("base_model.model.token_adapter.w", RejectReason.UNSUPPORTED, "trainable tokens"),
        ("layers.0.q.lora_A.weight", RejectReason.UNSUPPORTED, "PEFT's naming"),
        (A0 + ".extra", RejectReason.UNSUPPORTED, "PEFT's naming"),
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
