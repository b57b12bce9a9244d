"""LoRA on a frozen linear layer, for several adapters at once: what it computes, and its gradient.

Rows of a batch lie one after another, each adapter's together. For the tokens of adapter i,

    y = W x + bias + s_i B_i A_i d(x)

with d the dropout, which keeps an element or makes it zero (its ``1 / (1 - p)`` is in s). The
gradient keeps x, A, B and the small ``h = s A d(x)``, and nothing else: the
frozen weight needs no gradient, so neither its product nor a cast of x is kept (arXiv:2106.09685;
the order of products is that of ``y + (x @ A.T) @ B.T``, which never builds ``B A``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from lorax_train.data.batches import Span

__all__ = ["FrozenProduct", "lora_linear", "lora_reference"]


class FrozenProduct(Protocol):
    """A frozen weight ``[out, in]``, however it is stored."""

    def forward_product(self, x: torch.Tensor) -> torch.Tensor:
        """``x @ W.T + bias``: ``[T, in]`` to a new ``[T, out]``."""

    def backward_product(self, dy: torch.Tensor) -> torch.Tensor:
        """``dy @ W``: ``[T, out]`` to a new ``[T, in]``."""

    def dense(self) -> torch.Tensor:
        """The weight itself."""


def lora_linear(
    x: torch.Tensor,
    base: FrozenProduct,
    a: torch.Tensor,
    b: torch.Tensor,
    scales: Sequence[float],
    spans: Sequence[Span],
    kept: torch.Tensor | None = None,
) -> torch.Tensor:
    """The layer's output, ``[..., out]`` in x's dtype.

    Args:
        x: ``[..., in]``, whose leading dimensions flatten to the batch's tokens.
        base: the frozen layer.
        a: ``[N, r, in]`` in x's dtype; smaller ranks are padded with zero rows.
        b: ``[N, out, r]`` in x's dtype; likewise with zero columns.
        scales: of each adapter.
        spans: the tokens of each adapter; tokens in none of them get the base alone.
        kept: bool ``[T, in]``, which elements of x the LoRA branch sees; None: all. The scales
            have dropout's ``1 / (1 - p)`` then.
    """
    function: Any = _LoRALinear
    y = function.apply(x.flatten(0, -2), a, b, base, scales, spans, kept)
    result: torch.Tensor = y.view(*x.shape[:-1], y.shape[-1])
    return result


def lora_reference(
    x: torch.Tensor,
    base: FrozenProduct,
    a: torch.Tensor,
    b: torch.Tensor,
    scales: Sequence[float],
    spans: Sequence[Span],
    kept: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same as ``lora_linear``, as written, for tests."""
    flat = x.flatten(0, -2)
    y = base.forward_product(flat)
    branch = flat if kept is None else flat * kept
    parts, end = [], 0
    for span in spans:
        at = slice(span.start, span.stop)
        change = F.linear(F.linear(branch[at], a[span.adapter]), b[span.adapter])
        parts += [y[end : span.start], y[at] + scales[span.adapter] * change]
        end = span.stop
    return torch.cat([*parts, y[end:]]).view(*x.shape[:-1], -1)


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        base: FrozenProduct,
        scales: Sequence[float],
        spans: Sequence[Span],
        kept: torch.Tensor | None,
    ) -> torch.Tensor:
        y = base.forward_product(x)
        branch = x if kept is None else x * kept
        h = x.new_empty(x.shape[0], a.shape[1])  # tokens in no span have none, and nothing reads it
        if size := _equal_parts(spans, len(a), len(x)):
            hs = torch.bmm(branch.view(len(a), size, -1), a.transpose(1, 2))
            hs.mul_(hs.new_tensor(scales)[:, None, None])
            y.view(len(a), size, -1).baddbmm_(hs, b.transpose(1, 2))
            h = hs.view(len(x), -1)
        else:
            for span in spans:
                at = slice(span.start, span.stop)
                torch.mm(branch[at], a[span.adapter].T, out=h[at])
                h[at].mul_(scales[span.adapter])
                y[at].addmm_(h[at], b[span.adapter].T)
        ctx.save_for_backward(x, a, b, h, kept)
        ctx.base, ctx.scales, ctx.spans = base, scales, spans
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
        x, a, b, h, kept = ctx.saved_tensors
        dy = dy.contiguous()
        branch = x if kept is None else x * kept
        dx = ctx.base.backward_product(dy) if ctx.needs_input_grad[0] else None
        # B's is computed as [N, r, out]: the wide side last is faster.
        da, db = torch.zeros_like(a), b.new_zeros(len(b), b.shape[2], b.shape[1])
        if size := _equal_parts(ctx.spans, len(a), len(x)):
            dys, hs = dy.view(len(a), size, -1), h.view(len(a), size, -1)
            torch.bmm(hs.transpose(1, 2), dys, out=db)
            dh = torch.bmm(dys, b).mul_(dys.new_tensor(ctx.scales)[:, None, None])
            torch.bmm(dh.transpose(1, 2), branch.view(len(a), size, -1), out=da)
            if dx is not None and kept is None:
                dx.view(len(a), size, -1).baddbmm_(dh, a)
            elif dx is not None:
                dx += torch.bmm(dh, a).view(len(x), -1) * kept
            return dx, da, db.transpose(1, 2), None, None, None, None
        for span in ctx.spans:
            i, at = span.adapter, slice(span.start, span.stop)
            db[i].addmm_(h[at].T, dy[at])
            dh = (dy[at] @ b[i]).mul_(ctx.scales[i])
            da[i].addmm_(dh.T, branch[at])
            if dx is None:
                continue
            if kept is None:
                dx[at].addmm_(dh, a[i])
            else:
                dx[at] += (dh @ a[i]) * kept[at]
        return dx, da, db.transpose(1, 2), None, None, None, None


def _equal_parts(spans: Sequence[Span], adapters: int, tokens: int) -> int:
    """The number of tokens that each adapter has, if they lie in order and have equally many; 0
    otherwise."""
    size = tokens // adapters
    equal = size * adapters == tokens and len(spans) == adapters
    equal = equal and all(
        (span.adapter, span.start, span.stop) == (i, i * size, (i + 1) * size)
        for i, span in enumerate(spans)
    )
    return size if equal else 0
