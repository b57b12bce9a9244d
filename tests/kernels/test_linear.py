"""The compiled linear against torch, in every mode and at ragged sizes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lorax_serve.kernels.cpu import ADD, GATED, WRITE, WRITE_FLOAT, load
from lorax_serve.kernels.packing import Arena, PackedLinear
from tests.helpers import each_instruction_set, needs_kernels

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


def reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    norm: torch.Tensor | None,
    mode: int,
    y: torch.Tensor,
) -> torch.Tensor:
    """In float64; x and the result of the norm are rounded to x's dtype, as the kernel has them."""
    h = x.double()
    if norm is not None:
        h = F.rms_norm(h, h.shape[-1:], norm.double(), 1e-5).to(x.dtype).double()
    out = F.linear(h, weight.double(), None if bias is None else bias.double())
    if mode == ADD:
        out = out + y.double()
    if mode == GATED:
        gate, up = out.chunk(2, dim=-1)
        out = F.silu(gate) * up
    return out


@each_instruction_set
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("mode", [WRITE, ADD, GATED, WRITE_FLOAT])
@pytest.mark.parametrize("rows", [1, 7, 8, 9, 31, 255, 256, 257, 600])
def test_equals_torch(rows: int, mode: int, dtype: torch.dtype, instruction_set: str) -> None:
    generator = torch.Generator().manual_seed(rows)
    # 7 panels: an odd number, so that one has no partner; a gated linear has an even number.
    in_features, out_features = 96, 128 if mode == GATED else 112

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    x, weight = random(rows, in_features), random(out_features, in_features)
    bias = random(out_features) if rows % 2 else None
    norm = random(in_features) if rows != 8 else None
    packed = PackedLinear.pack(weight, bias, Arena(), norm=norm, eps=1e-5, gated=mode == GATED)
    out_dtype = torch.float32 if mode == WRITE_FLOAT else dtype
    # Poison past the end: nothing but the output may be written, and all of it must be.
    room = torch.full((rows + 1, packed.columns), torch.nan, dtype=out_dtype)
    y = room[:rows]
    if mode == ADD:
        y.copy_(random(rows, packed.columns))
    want = reference(x, weight, bias, norm, mode, y)
    kernels = load(dtype, instruction_set)
    scratch = torch.empty(rows, kernels.linear_scratch(in_features), dtype=torch.uint8)
    kernels.linear(packed, mode, x.data_ptr(), rows, y.data_ptr(), scratch.data_ptr())
    error = (y.double() - want).abs().max() / want.abs().max()
    assert error < TOLERANCE[dtype]
    assert bool(room[rows].isnan().all())


@needs_kernels
def test_one_openmp_runtime_serves_torch_and_the_kernels() -> None:
    """Two would be two pools of threads that spin against each other."""
    load(torch.float32)
    with open("/proc/self/maps") as maps:
        runtimes = {line.split()[-1] for line in maps if "libgomp" in line or "libomp" in line}
    assert len(runtimes) == 1, runtimes
