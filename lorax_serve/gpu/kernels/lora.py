"""LoRA as two Triton kernels; see ``gpu.ops``.

Nothing is read back to the host: how many programs are launched follows from shapes alone, and each
finds its adapter, and that adapter's true ranks, on the device. So both run in CUDA graphs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lorax_serve.gpu.lora import (
    A_OFFSETS,
    B_OFFSETS,
    GAIN,
    HEADER,
    MAX_SLICES,
    RANKS,
    SHIFT,
    LoRAPlan,
    SiteShape,
)

__all__ = ["lora_expand", "lora_shrink"]

_RANKS = tl.constexpr(RANKS)
_A_OFFSETS = tl.constexpr(A_OFFSETS)
_B_OFFSETS = tl.constexpr(B_OFFSETS)
_GAIN = tl.constexpr(GAIN)
_SHIFT = tl.constexpr(SHIFT)

_DECODE_CHUNK = 16
"""Larger chunks are prompts', whose rows make programs enough."""


_varying = triton.jit(
    do_not_specialize=["header_at", "total"],
    do_not_specialize_on_alignment=["blobs", "rows"],
)
"""Of kernels that are compiled once for all sites and steps of the same sizes."""


def lora_shrink(
    x: torch.Tensor, arena: torch.Tensor, plan: LoRAPlan, site: SiteShape
) -> torch.Tensor:
    """See ``ops.LoRAShrink``."""
    chunks, slices = len(plan.blobs), len(site.widths)
    few = plan.chunk <= _DECODE_CHUNK
    # One row of one adapter must keep the GPU busy: A is read in up to 32 parts at once. Prompts
    # have more rows than parts are worth, whose sums are all written and read again.
    most, block_k, block_r = (32, 128, 16) if few else (4, 64, 64)
    part = block_k * triton.cdiv(triton.cdiv(site.in_features, most), block_k)
    parts = triton.cdiv(site.in_features, part)
    h = x.new_empty(parts, slices, len(x), plan.max_rank, dtype=torch.float32)
    if chunks:
        _shrink[(chunks, slices, parts)](
            x,
            arena,
            plan.blobs,
            plan.rows,
            h,
            site.index * HEADER,
            site.in_features,
            len(x),
            plan.max_rank,
            x.stride(0),
            CHUNK=plan.chunk,
            PART=part,
            BLOCK_K=block_k,
            BLOCK_R=block_r,
            num_warps=2 if few else 4,
        )
    return h


def lora_expand(
    h: torch.Tensor,
    y: torch.Tensor,
    arena: torch.Tensor,
    plan: LoRAPlan,
    site: SiteShape,
    bias: torch.Tensor | None,
) -> None:
    """See ``ops.LoRAExpand``."""
    chunks = len(plan.blobs)
    block_n = 64 if plan.chunk <= _DECODE_CHUNK else 128
    widths = (*site.widths, *[0] * (MAX_SLICES - len(site.widths)))
    blocks = sum(triton.cdiv(width, block_n) for width in widths)
    if chunks:
        _expand[(chunks, blocks)](
            h,
            y,
            arena,
            plan.blobs,
            plan.rows,
            bias,
            site.index * HEADER,
            len(y),
            plan.max_rank,
            y.stride(0),
            WIDTH_0=widths[0],
            WIDTH_1=widths[1],
            WIDTH_2=widths[2],
            SLICES=len(site.widths),
            PARTS=len(h),
            CHUNK=plan.chunk,
            BLOCK_N=block_n,
            BLOCK_R=16,
            num_warps=4,
        )


@_varying
def _shrink(
    x,
    arena,
    blobs,
    rows,
    h,
    header_at,
    in_features,
    total,
    max_rank,
    x_stride,
    CHUNK: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One chunk, one slice, one part of ``in_features``."""
    blob = tl.load(blobs + tl.program_id(0))
    if blob < 0:
        return
    which = tl.program_id(1)
    adapter = arena + tl.multiple_of(blob, 16)
    header = adapter.to(tl.pointer_type(tl.int32)) + header_at
    rank = tl.load(header + _RANKS + which)
    if rank == 0:
        return
    a = adapter + tl.multiple_of(tl.load(header + _A_OFFSETS + which), 16)
    row = tl.load(rows + tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)).to(tl.int64)
    real = row >= 0
    row = tl.where(real, row, 0)
    part = tl.program_id(2)
    to = h + ((part.to(tl.int64) * tl.num_programs(1) + which) * total + row) * max_rank
    first = 0
    while first < rank:  # as in _expand; the interpreter takes no range of a loaded number
        r = first + tl.arange(0, BLOCK_R)
        mine = r < rank  # never beyond: what is there is not this adapter's, and may be NaN
        acc = tl.zeros((CHUNK, BLOCK_R), tl.float32)
        for k0 in range(0, PART, BLOCK_K):
            k = part * PART + k0 + tl.arange(0, BLOCK_K)
            inside = k < in_features
            xs = tl.load(
                x + (row * x_stride)[:, None] + k[None, :],
                mask=real[:, None] & inside[None, :],
                other=0.0,
            )
            weights = tl.load(
                a + (r * in_features)[None, :] + k[:, None],
                mask=inside[:, None] & mine[None, :],
                other=0.0,
            )
            acc = tl.dot(xs, weights, acc, input_precision="ieee")
        tl.store(to[:, None] + r[None, :], acc, mask=real[:, None] & mine[None, :])
        first += BLOCK_R


@_varying
def _expand(
    h,
    y,
    arena,
    blobs,
    rows,
    bias,
    header_at,
    total,
    max_rank,
    y_stride,
    WIDTH_0: tl.constexpr,
    WIDTH_1: tl.constexpr,
    WIDTH_2: tl.constexpr,
    SLICES: tl.constexpr,
    PARTS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One chunk, one block of columns of one slice."""
    blob = tl.load(blobs + tl.program_id(0))
    if blob < 0:
        return
    blocks_0: tl.constexpr = (WIDTH_0 + BLOCK_N - 1) // BLOCK_N
    blocks_1: tl.constexpr = (WIDTH_1 + BLOCK_N - 1) // BLOCK_N
    block = tl.program_id(1)
    which = (block >= blocks_0).to(tl.int32) + (block >= blocks_0 + blocks_1).to(tl.int32)
    block -= tl.where(which > 0, blocks_0, 0) + tl.where(which > 1, blocks_1, 0)
    start = tl.where(which > 0, WIDTH_0, 0) + tl.where(which > 1, WIDTH_1, 0)
    width = tl.where(which == 0, WIDTH_0, tl.where(which == 1, WIDTH_1, WIDTH_2))

    adapter = arena + tl.multiple_of(blob, 16)
    header = adapter.to(tl.pointer_type(tl.int32)) + header_at
    rank = tl.load(header + _RANKS + which)
    gain_at = tl.load(header + _GAIN)
    shift_at = tl.load(header + _SHIFT)
    if (rank == 0) & (gain_at == 0) & (shift_at == 0):
        return
    row = tl.load(rows + tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)).to(tl.int64)
    real = row >= 0
    row = tl.where(real, row, 0)
    column = block * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = column < width
    both = real[:, None] & inside[None, :]
    at = y + (row * y_stride)[:, None] + (start + column)[None, :]

    b = adapter + tl.multiple_of(tl.load(header + _B_OFFSETS + which), 16)
    summands = h + (which.to(tl.int64) * total + row) * max_rank
    part_size = total.to(tl.int64) * SLICES * max_rank
    acc = tl.zeros((CHUNK, BLOCK_N), tl.float32)
    first = 0
    while first < rank:
        r = first + tl.arange(0, BLOCK_R)
        mine = r < rank  # never beyond: h was not written there, and B is another's
        summed = tl.zeros((CHUNK, BLOCK_R), tl.float32)
        for part in tl.static_range(PARTS):
            summed += tl.load(
                summands[:, None] + (part * part_size + r)[None, :],
                mask=real[:, None] & mine[None, :],
                other=0.0,
            )
        weights = tl.load(
            b + (r * width)[:, None] + column[None, :],
            mask=mine[:, None] & inside[None, :],
            other=0.0,
        )
        acc = tl.dot(summed.to(weights.dtype), weights, acc, input_precision="ieee")
        first += BLOCK_R
    result = tl.load(at, mask=both, other=0.0).to(tl.float32) + acc
    floats = adapter.to(tl.pointer_type(tl.float32))
    if gain_at != 0:
        base = tl.zeros((BLOCK_N,), tl.float32)
        if bias is not None:
            base = tl.load(bias + start + column, mask=inside, other=0.0).to(tl.float32)
        gain = tl.load(floats + _floats_at(gain_at, arena) + start + column, mask=inside, other=0.0)
        result = (result - base[None, :]) * gain[None, :] + base[None, :]
    if shift_at != 0:
        shift = tl.load(
            floats + _floats_at(shift_at, arena) + start + column, mask=inside, other=0.0
        )
        result += shift[None, :]
    tl.store(at, result.to(y.dtype.element_ty), mask=both)


@triton.jit
def _floats_at(offset, arena):
    """An offset in elements of the arena's dtype as one in float32."""
    return offset * arena.dtype.element_ty.primitive_bitwidth // 32
