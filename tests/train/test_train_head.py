"""The cross-entropy that computes its gradient on the way, against the one as written."""

from __future__ import annotations

import pytest
import torch

from lorax_train.model import head
from lorax_train.model.head import head_loss, head_loss_reference

VOCABULARY, WIDTH, TARGETS = 50, 16, 70


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("piece", [1, 33 * VOCABULARY, 1 << 20])
def test_losses_and_gradient_are_those_of_the_reference(
    piece: int, biased: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "PIECE", piece)
    assert head.piece(VOCABULARY) == {1: 16, 33 * VOCABULARY: 33}.get(piece, (1 << 20) // 50)
    torch.manual_seed(0)
    weight = torch.randn(VOCABULARY, WIDTH).to(dtype)
    bias = torch.randn(VOCABULARY).to(dtype) if biased else None
    labels = torch.randint(VOCABULARY, (TARGETS,))
    weights = torch.rand(TARGETS)
    start = torch.randn(TARGETS, WIDTH).to(dtype)
    found = []
    for function in (head_loss, head_loss_reference):
        hidden = start.clone().requires_grad_()
        total, losses = function(hidden, weight, labels, weights, bias)
        (3 * total).backward()  # type: ignore[no-untyped-call]
        assert not losses.requires_grad
        assert hidden.grad is not None
        found.append((total, losses, hidden.grad))
    for ours, theirs in zip(found[0][:2], found[1][:2], strict=True):
        assert ours.dtype is torch.float32
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    # The gradient of bfloat16 logits is rounded once in either, at different places.
    off = (found[0][2] - found[1][2]).float().norm() / found[1][2].float().norm()
    assert off < (1e-5 if dtype is torch.float32 else 1e-2)


def test_nothing_is_kept_where_no_gradient_is_wanted() -> None:
    hidden, weight = torch.randn(4, WIDTH), torch.randn(VOCABULARY, WIDTH)
    labels, weights = torch.arange(4), torch.ones(4)
    total, losses = head_loss(hidden, weight, labels, weights)
    assert not total.requires_grad
    torch.testing.assert_close(losses, head_loss_reference(hidden, weight, labels, weights)[1])
