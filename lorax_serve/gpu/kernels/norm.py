"""RMS norms, one program a row: the row stays in registers between its sum and its scaling."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = ["add_rms_norm", "rms_norm"]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See ``ops.RmsNorm``."""
    result = x.new_empty(x.shape)
    _launch(x, None, weight, eps, result)
    return result


def add_rms_norm(
    x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """See ``ops.AddRmsNorm``."""
    result = x.new_empty(x.shape)
    _launch(x, y, weight, eps, result)
    return result


def _launch(
    x: torch.Tensor,
    y: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    result: torch.Tensor,
) -> None:
    rows, size = x.shape
    if not rows:
        return
    block = triton.next_power_of_2(size)
    _norm[(rows,)](
        x,
        x.stride(0),
        y,
        0 if y is None else y.stride(0),
        weight,
        result,
        size,
        eps,
        BLOCK=block,
        # About 16 numbers a thread, which several programs of a processor leave registers for.
        num_warps=min(16, max(1, block // 512)),
    )


@triton.jit
def _norm(x_ptr, x_stride, y_ptr, y_stride, weight_ptr, result_ptr, size, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < size
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0)
    if y_ptr is not None:
        y = tl.load(y_ptr + row * y_stride + column, mask=inside, other=0.0)
        x = (x.to(tl.float32) + y.to(tl.float32)).to(x.dtype)
        tl.store(x_ptr + row * x_stride + column, x, mask=inside)
    wide = x.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(wide * wide) / size + eps)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    normed = wide * scale * weight
    tl.store(result_ptr + row * size + column, normed.to(x.dtype), mask=inside)
