"""The activation between an MLP's products."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = ["silu_mul"]

_BLOCK = 1024


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """See ``ops.SiluMul``."""
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    result = gate_up.new_empty(rows, size)
    if rows:
        # Blocks end with their row, so that none divides to find where it is.
        grid = (rows, triton.cdiv(size, _BLOCK))
        _silu_mul[grid](gate_up, gate_up.stride(0), result, size, BLOCK=_BLOCK)
    return result


@triton.jit
def _silu_mul(gate_up_ptr, stride, result_ptr, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    gate_ptr = gate_up_ptr + row * stride + column
    gate = tl.load(gate_ptr, mask=inside, other=0.0)
    up = tl.load(gate_ptr + size, mask=inside, other=0.0).to(tl.float32)
    wide = gate.to(tl.float32)
    decay = tl.exp(-tl.abs(wide))  # of either sign, so that it cannot overflow
    silu = wide * tl.where(wide >= 0, 1.0, decay) / (1.0 + decay)
    tl.store(result_ptr + row * size + column, (silu * up).to(gate.dtype), mask=inside)
