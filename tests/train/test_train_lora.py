"""LoRA's own forward and gradient, against the same as written and differentiated by torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorax_train.data.batches import Span
from lorax_train.model.frozen import product_of
from lorax_train.model.lora import FrozenProduct, lora_linear, lora_reference

IN, OUT, TOKENS = 12, 20, 24

SPANS = {
    "one": [Span(0, 0, 24)],
    "equal": [Span(0, 0, 6), Span(1, 6, 12), Span(2, 12, 18), Span(3, 18, 24)],
    "ragged": [Span(0, 0, 3), Span(1, 3, 17), Span(2, 17, 24)],
    "not all tokens": [Span(0, 2, 5), Span(1, 9, 20)],
    "equal but for the last token": [Span(0, 0, 4), Span(1, 4, 8), Span(2, 8, 12), Span(3, 12, 16)],
    "not all adapters": [Span(2, 0, 12), Span(0, 12, 24)],
    "one adapter twice": [Span(1, 0, 5), Span(0, 5, 9), Span(1, 9, 24)],
    "nothing": [],
}
ADAPTERS = {
    "one": 1,
    "equal": 4,
    "ragged": 3,
    "not all tokens": 2,
    "equal but for the last token": 4,
    "not all adapters": 3,
    "one adapter twice": 2,
    "nothing": 2,
}


def frozen(kind: str) -> FrozenProduct:
    module: nn.Module = nn.Linear(IN, OUT, bias=kind == "bias")
    if kind == "conv":
        module = Conv1D(OUT, IN)  # type: ignore[no-untyped-call]
        nn.init.normal_(module.bias)
    return product_of(module.requires_grad_(False))


def leaves(adapters: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, A and B; the second adapter's rank is padded with zeros."""
    x = torch.randn(2, TOKENS // 2, IN)
    a, b = torch.randn(adapters, 5, IN), torch.randn(adapters, OUT, 5)
    if adapters > 1:
        a[1, 3:], b[1, :, 3:] = 0, 0
    return x, a, b


@pytest.mark.parametrize("kind", ["plain", "bias", "conv"])
@pytest.mark.parametrize("dropping", [False, True])
@pytest.mark.parametrize("name", SPANS)
def test_output_and_all_gradients_are_those_of_the_reference(
    name: str, dropping: bool, kind: str
) -> None:
    torch.manual_seed(0)
    spans, adapters = SPANS[name], ADAPTERS[name]
    product, start = frozen(kind), leaves(adapters)
    kept = torch.rand(TOKENS, IN) > 0.4 if dropping else None
    scales = [0.5 + i for i in range(adapters)]
    wanted = torch.randn(2, TOKENS // 2, OUT)
    found: list[Any] = []
    for function in (lora_linear, lora_reference):
        x, a, b = (each.clone().requires_grad_() for each in start)
        y = function(x, product, a, b, scales, spans, kept)
        (y * wanted).sum().backward()  # type: ignore[no-untyped-call]
        zeros = [torch.zeros_like(each) for each in (x, a, b)]
        grads = [
            each.grad if each.grad is not None else zero
            for each, zero in zip((x, a, b), zeros, strict=True)
        ]
        found.append((y, *grads))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-5)


def test_padded_ranks_get_no_gradient_so_ranks_may_differ() -> None:
    torch.manual_seed(0)
    x, a, b = (each.requires_grad_() for each in leaves(2))
    spans = [Span(0, 0, 12), Span(1, 12, 24)]
    y = lora_linear(x, frozen("plain"), a, b, [1.0, 1.0], spans)
    y.square().sum().backward()  # type: ignore[no-untyped-call]
    assert a.grad is not None
    assert b.grad is not None
    assert not a.grad[1, 3:].any()
    assert not b.grad[1, :, 3:].any()
    assert a.grad[1, :3].all()


def test_what_it_keeps_for_the_gradient_is_x_and_the_small_products() -> None:
    x, a, b = (each.requires_grad_() for each in leaves(1))
    kept: list[tuple[int, ...]] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    product, spans = frozen("plain"), [Span(0, 0, TOKENS)]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        lora_linear(x, product, a, b, [1.0], spans)
    assert sorted(kept) == sorted([(TOKENS, IN), (1, 5, IN), (1, OUT, 5), (TOKENS, 5)])


def test_an_input_that_needs_no_gradient_gets_none() -> None:
    x, a, b = leaves(2)
    a.requires_grad_(), b.requires_grad_()
    spans = [Span(0, 0, 3), Span(1, 3, TOKENS)]
    y = lora_linear(x, frozen("bias"), a, b, [1.0, 2.0], spans)
    y.sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is None
    assert a.grad is not None
