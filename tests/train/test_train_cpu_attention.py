"""Attention of short rows on a CPU, against PyTorch's fused kernel in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lorax_train.model import cpu_attention
from lorax_train.model.cpu_attention import causal_attention

Tensors = list[torch.Tensor]


def drawn(shape: tuple[int, int, int, int, int], dtype: torch.dtype) -> Tensors:
    """Query, key, value and the output's gradient of ``(B, heads, kv_heads, L, d)``."""
    batch, heads, kv_heads, length, width = shape
    generator = torch.Generator().manual_seed(length)
    return [
        torch.randn(batch, n, length, width, generator=generator, dtype=torch.float64).to(dtype)
        for n in (heads, kv_heads, kv_heads, heads)
    ]


def computed(tensors: Tensors, *, fused: bool, scale: float | None = None) -> Tensors:
    """The output, and the gradients of query, key and value."""
    *inputs, dout = tensors
    q, k, v = (each.clone().requires_grad_() for each in inputs)
    if fused:
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    else:
        out = causal_attention(q, k, v, scale)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout)]


def off(found: Tensors, exact: Tensors) -> list[float]:
    """The relative error of each; of what is 0, as the gradient of a single key, the absolute."""
    pairs = zip(found, exact, strict=True)
    return [float((a.double() - b).norm() / (b.norm() or 1)) for a, b in pairs]


@pytest.mark.parametrize(
    "shape",
    [(1, 4, 4, 1, 8), (3, 4, 2, 7, 8), (2, 9, 3, 64, 16), (1, 6, 1, 65, 16), (2, 8, 2, 200, 32)],
)
def test_it_is_as_exact_as_the_fused_kernel(shape: tuple[int, int, int, int, int]) -> None:
    for dtype, most in ((torch.float32, 2e-6), (torch.bfloat16, 1e-2)):
        tensors = drawn(shape, dtype)
        exact = computed([each.double() for each in tensors], fused=True)
        ours = off(computed(tensors, fused=False), exact)
        theirs = off(computed(tensors, fused=True), exact)
        for a, b in zip(ours, theirs, strict=True):
            assert a <= max(1.5 * b, most)


def test_many_pieces_give_what_one_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = drawn((5, 4, 2, 130, 16), torch.float32)
    monkeypatch.setattr(cpu_attention, "_QUERIES", 1000)
    whole = computed(tensors, fused=False, scale=0.3)
    monkeypatch.setattr(cpu_attention, "_QUERIES", 48)
    monkeypatch.setattr(cpu_attention, "_SCORES", 3 * 2 * 48 * 130)  # not a divisor of all
    for found, expected in zip(computed(tensors, fused=False, scale=0.3), whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for found, expected in zip(computed(tensors, fused=True, scale=0.3), whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_of_the_scores_nothing_is_kept() -> None:
    q, k, v, _ = drawn((1, 4, 2, 96, 8), torch.float32)
    kept: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        causal_attention(q.requires_grad_(), k, v)
    assert sum(kept) == sum(each.untyped_storage().nbytes() for each in (q, k, v))
