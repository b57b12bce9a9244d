"""Attention of short rows on a CPU, against PyTorch's fused kernel in float64."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import pytest
import torch
import torch.nn.functional as F

from lorax_train.model import cpu_attention
from lorax_train.model.attention import attend_to_rows
from lorax_train.model.cpu_attention import causal_attention

Tensors = list[torch.Tensor]
LENGTHS = [[1], [7, 7, 7], [64, 130, 3, 65, 1, 129, 200], [5, 300, 128, 31]]


def drawn(lengths: Sequence[int], heads: int, kv_heads: int, dtype: torch.dtype) -> Tensors:
    """Query, key and value ``[h, T, 16]``, and the output's gradient ``[T, heads, 16]``."""
    generator = torch.Generator().manual_seed(len(lengths))
    tokens = sum(lengths)
    shapes = [(heads, tokens), (kv_heads, tokens), (kv_heads, tokens), (tokens, heads)]
    return [
        torch.randn(*shape, 16, generator=generator, dtype=torch.float64).to(dtype)
        for shape in shapes
    ]


def computed(
    tensors: Tensors, lengths: Sequence[int], *, fused: bool, scale: float | None = None
) -> Tensors:
    """The output, and the gradients of query, key and value."""
    *inputs, dout = tensors
    q, k, v = (each.clone().requires_grad_() for each in inputs)
    bounds = [0, *accumulate(lengths)]
    if fused:
        rows: Tensors = []
        for start, stop in pairwise(bounds):
            row_q, row_k, row_v = (each[None, :, start:stop] for each in (q, k, v))
            grouped = len(q) != len(k)
            rows += F.scaled_dot_product_attention(
                row_q, row_k, row_v, is_causal=True, scale=scale, enable_gqa=grouped
            )
        out = torch.cat(rows, dim=1).transpose(0, 1)
    else:
        out = causal_attention(q, k, v, bounds, scale)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout)]


def off(found: Tensors, exact: Tensors) -> list[float]:
    """The relative error of each; of what is 0, as the gradient of a single key, the absolute."""
    pairs = zip(found, exact, strict=True)
    return [float((a.double() - b).norm() / (b.norm() or 1)) for a, b in pairs]


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (9, 3), (6, 1)])
def test_it_is_as_exact_as_the_fused_kernel(heads: int, kv_heads: int, lengths: list[int]) -> None:
    for dtype, most in ((torch.float32, 2e-6), (torch.bfloat16, 1e-2)):
        tensors = drawn(lengths, heads, kv_heads, dtype)
        before = [each.clone() for each in tensors]
        exact = computed([each.double() for each in tensors], lengths, fused=True)
        ours = off(computed(tensors, lengths, fused=False), exact)
        theirs = off(computed(tensors, lengths, fused=True), exact)
        for a, b in zip(ours, theirs, strict=True):
            assert a <= max(1.5 * b, most)
        assert all(map(torch.equal, tensors, before))


def test_many_pieces_give_what_one_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [130, 129, 131, 128, 3]
    tensors = drawn(lengths, 4, 2, torch.float32)
    monkeypatch.setattr(cpu_attention, "_WHOLE", 1000)
    whole = computed(tensors, lengths, fused=False, scale=0.3)
    monkeypatch.setattr(cpu_attention, "_WHOLE", 1)
    monkeypatch.setattr(cpu_attention, "_QUERIES", 48)
    monkeypatch.setattr(cpu_attention, "_SCORES", 3 * 2 * 48 * 131)  # not a divisor of all
    pieces = computed(tensors, lengths, fused=False, scale=0.3)
    for found, expected in zip(pieces, whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for found, expected in zip(
        computed(tensors, lengths, fused=True, scale=0.3), whole, strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_values_of_another_width_are_left_to_the_fused_kernel() -> None:
    q, k, v, _ = (each[None] for each in drawn([20, 9], 4, 2, torch.bfloat16))
    found, _ = attend_to_rows(None, q, k, v[..., :8], row_bounds=(0, 20, 29))
    whole, _ = attend_to_rows(None, q, k, v, row_bounds=(0, 20, 29))
    torch.testing.assert_close(found, whole[..., :8], rtol=2e-2, atol=2e-2)


def test_of_the_scores_nothing_is_kept() -> None:
    q, k, v, _ = drawn([96, 20], 4, 2, torch.float32)
    kept: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        causal_attention(q.requires_grad_(), k, v, [0, 96, 116])
    assert sum(kept) == sum(each.untyped_storage().nbytes() for each in (q, k, v))


@pytest.mark.parametrize(
    ("dtype", "window", "expected"),
    [
        (torch.bfloat16, None, 1),
        (torch.bfloat16, 20, 1),
        (torch.bfloat16, 19, 0),
        (torch.float32, None, 0),
    ],
)
def test_it_is_taken_where_it_is_faster_and_the_rows_are_seen_whole(
    dtype: torch.dtype, window: int | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def spy(*args: object) -> torch.Tensor:
        calls.append(args)
        return causal_attention(*args)  # type: ignore[arg-type]

    monkeypatch.setattr("lorax_train.model.attention.causal_attention", spy)
    q, k, v, _ = (each[None] for each in drawn([20, 9], 4, 2, dtype))
    found, _ = attend_to_rows(None, q, k, v, row_bounds=(0, 20, 29), sliding_window=window)
    assert len(calls) == expected
    monkeypatch.setattr("lorax_train.model.attention.LONGEST", 0)
    plain, _ = attend_to_rows(None, q, k, v, row_bounds=(0, 20, 29), sliding_window=window)
    assert len(calls) == expected
    assert found.shape == plain.shape
    torch.testing.assert_close(found, plain, rtol=2e-2, atol=2e-2)
