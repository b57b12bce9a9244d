"""Cross-entropy through a frozen output head, in pieces, whose gradient is computed on the way.

The head is frozen, so all that its gradient is needed for is the hidden state's. It is computed in
the forward, where the logits are at hand: they are never kept, and exist for a few tokens at a
time.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

__all__ = ["head_loss", "head_loss_reference", "piece"]

PIECE = 4 << 20
"""So many logits exist at a time: 16 MiB in float32. Half as many take 1 % longer a step."""


def piece(vocabulary: int) -> int:
    """How many targets' logits exist at a time."""
    return max(16, PIECE // vocabulary)


def head_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    weights: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The weighted sum of the targets' cross-entropies.

    Args:
        hidden: ``[n, d]``, the last hidden state before each target.
        weight: ``[vocabulary, d]`` of the head, frozen, in hidden's dtype.
        labels: ``[n]`` int64.
        weights: ``[n]`` float32, of each target in the sum.
        bias: ``[vocabulary]`` of the head, or None.

    Returns:
        The sum, a float32 scalar in nats, and each target's own loss ``[n]``, without a gradient.
    """
    function: Any = _HeadLoss
    total, losses = function.apply(hidden, weight, labels, weights, bias)
    return total, losses


def head_loss_reference(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    weights: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same as written, all logits at once, for tests."""
    losses = F.cross_entropy(F.linear(hidden, weight, bias).float(), labels, reduction="none")
    return (losses * weights).sum(), losses.detach()


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        weights: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        n = len(hidden)
        size = piece(len(weight))
        losses = torch.empty(n, dtype=torch.float32, device=hidden.device)
        wanted = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden) if wanted else None
        for start in range(0, n, size):
            at = slice(start, start + size)
            logits = F.linear(hidden[at], weight, bias).float()
            norm = logits.logsumexp(-1, keepdim=True)
            losses[at] = (norm - logits.gather(-1, labels[at, None])).squeeze(-1)
            if gradient is None:
                continue
            logits.sub_(norm).exp_()
            logits[torch.arange(len(logits), device=logits.device), labels[at]] -= 1
            logits.mul_(weights[at, None])
            gradient[at] = logits.to(hidden.dtype) @ weight
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(losses)
        return (losses * weights).sum(), losses

    @staticmethod
    def backward(ctx: Any, total: torch.Tensor, _: torch.Tensor) -> tuple[Any, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * total.to(gradient.dtype), None, None, None, None
