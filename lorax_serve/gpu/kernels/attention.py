"""``ops.DecodeAttention`` as Triton kernels: the cache is read once, by many programs.

The positions of a sequence are split at multiples of ``_SPLIT``. A program attends with the query
heads that share a kv head over one split after another, and a second kernel weighs the results of
all splits against each other. A sequence of one split is done after the first.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from lorax_serve.gpu.pages import PAGE, LayerPages

__all__ = ["decode_attention"]

# One sequence of 4096 tokens with 8 kv heads is 128 programs, one for nearly each of an H100's 132
# multiprocessors. Each reads 256 keys and values, 128 KiB at 128 numbers of 16 bits; what 4 query
# heads leave for the second kernel is 2 KiB of it.
_SPLIT = 256

# Results of splits that the second kernel takes at once: all of 4096 tokens.
_COMBINED = 16

# Where rows may be very long, most programs would find nothing to do, and even these take time. So
# a sequence's programs share its splits: at least 16 of them, more while all sequences together
# leave an H100 less than 8 programs for each multiprocessor. Who does a split changes no bit of it.
_LEAST_PROGRAMS = 16
_PROGRAMS = 132 * 8


def decode_attention(
    q: torch.Tensor,
    positions: torch.Tensor,
    kv_slots: torch.Tensor,
    pages: LayerPages,
    scale: float,
) -> torch.Tensor:
    """See ``ops.DecodeAttention``. What is launched depends on shapes alone, so that it may be
    captured in a graph; ``pages.table``'s width bounds the splits."""
    rows, heads, head_dim = q.shape
    kv_heads = pages.keys.shape[1]
    out = torch.empty((rows, heads, head_dim), dtype=q.dtype, device=q.device)
    if not rows:
        return out
    splits = triton.cdiv(pages.table.shape[1] * PAGE, _SPLIT)
    programs = min(splits, max(_LEAST_PROGRAMS, triton.cdiv(_PROGRAMS, rows * kv_heads)))
    partial = torch.empty((rows, heads, splits, head_dim), dtype=torch.float32, device=q.device)
    log_sums = torch.empty((rows, heads, splits), dtype=torch.float32, device=q.device)
    width = max(16, triton.next_power_of_2(head_dim))  # the least that tensor cores sum over
    # What is read ahead lies in shared memory: 32 KiB of keys and values a step of the loop, where
    # a head has 256 bytes or more. One step ahead is enough: 3.35 TB/s are 18 KiB of each
    # multiprocessor on their way, at 700 ns. The page's number is read another step before (3
    # stages), but where a step is 64 KiB.
    row_bytes = width * q.element_size()
    _attend_splits[(programs, kv_heads, rows)](
        q,
        positions,
        kv_slots,
        pages.keys,
        pages.values,
        pages.table,
        out,
        partial,
        log_sums,
        scale * math.log2(math.e),
        q.stride(0),
        q.stride(1),
        pages.keys.stride(0),
        pages.values.stride(0),
        pages.table.stride(0),
        splits,
        KV_HEADS=kv_heads,
        GROUP=heads // kv_heads,
        # The least that tensor cores multiply.
        ROWS=max(16, triton.next_power_of_2(heads // kv_heads)),
        HEAD_DIM=head_dim,
        WIDTH=width,
        PAGE=PAGE,
        BLOCK=64 if row_bytes <= 256 else 32,
        SPLIT=_SPLIT,
        num_warps=4,
        num_stages=3 if row_bytes <= 512 else 2,
    )
    if splits > 1:
        _combine_splits[(heads, rows)](
            positions,
            kv_slots,
            partial,
            log_sums,
            out,
            splits,
            HEADS=heads,
            HEAD_DIM=head_dim,
            WIDTH=width,
            SPLIT=_SPLIT,
            COMBINED=_COMBINED,
            num_warps=4,
        )
    return out


# A page table's width, and where in an upload a row's numbers begin, change while a server runs: a
# kernel compiled for each of them would be a second's wait each time.
_varying = triton.jit(
    do_not_specialize=["splits", "table_stride"],
    do_not_specialize_on_alignment=["positions", "kv_slots"],
)


@_varying
def _attend_splits(
    q,
    positions,
    kv_slots,
    keys,
    values,
    table,
    out,
    partial,
    log_sums,
    log2_scale,
    q_row_stride,
    q_head_stride,
    key_page_stride,
    value_page_stride,
    table_stride,
    splits,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Programs (n, kv head, sequence): splits n, n + programs, and so on, BLOCK positions at a
    time. ROWS are the group's GROUP query heads and some that are none; WIDTH is HEAD_DIM, made a
    power of two, of 16 at least. Exponents are of 2.
    """
    program, kv_head = tl.program_id(0), tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    slot = tl.load(kv_slots + row)
    length = tl.load(positions + row) + 1
    lane = tl.arange(0, WIDTH)
    member = tl.arange(0, ROWS)
    head = kv_head * GROUP + member
    live = (member < GROUP)[:, None] & (lane < HEAD_DIM)
    # Heads of all rows, counted through.
    number = row * (KV_HEADS * GROUP) + head
    to = out + number[:, None] * HEAD_DIM + lane
    if slot < 0:
        if program == 0:
            tl.store(to, tl.zeros((ROWS, WIDTH), out.dtype.element_ty), mask=live)
        return
    used = tl.cdiv(length, SPLIT)
    if program >= used:
        return
    queries = tl.load(
        q + row * q_row_stride + head[:, None] * q_head_stride + lane, mask=live, other=0.0
    )
    table += slot.to(tl.int64) * table_stride
    keys += kv_head * (PAGE * HEAD_DIM)
    values += kv_head * (PAGE * HEAD_DIM)
    split = program
    while split < used:  # Triton's interpreter takes no range of a loaded number
        most = tl.full((ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        summed = tl.zeros((ROWS, WIDTH), tl.float32)
        # What a split has less than SPLIT is loaded from nowhere, and weighs nothing.
        for start in range(0, SPLIT, BLOCK):
            position = split * SPLIT + start + tl.arange(0, BLOCK)
            there = position < length
            page = tl.load(table + position // PAGE, mask=there, other=0).to(tl.int64)
            cell = (position % PAGE)[:, None] * HEAD_DIM + lane
            # Neither what no sequence has written nor what another left is ever read.
            wanted = there[:, None] & (lane < HEAD_DIM)
            k = tl.load(keys + page[:, None] * key_page_stride + cell, mask=wanted, other=0.0)
            scores = tl.dot(queries, tl.trans(k), input_precision="ieee") * log2_scale
            scores = tl.where(there, scores, float("-inf"))
            highest = tl.maximum(most, tl.max(scores, axis=1))
            weights = tl.exp2(scores - highest[:, None])
            faded = tl.exp2(most - highest)
            v = tl.load(values + page[:, None] * value_page_stride + cell, mask=wanted, other=0.0)
            total = total * faded + tl.sum(weights, axis=1)
            summed = tl.dot(weights.to(v.dtype), v, summed * faded[:, None], input_precision="ieee")
            most = highest
        mean = summed / total[:, None]
        if used == 1:
            tl.store(to, mean.to(out.dtype.element_ty), mask=live)
        else:
            at = number * splits + split
            tl.store(partial + at[:, None] * HEAD_DIM + lane, mean, mask=live)
            tl.store(log_sums + at, most + tl.log2(total), mask=member < GROUP)
        split += tl.num_programs(0)


@_varying
def _combine_splits(
    positions,
    kv_slots,
    partial,
    log_sums,
    out,
    splits,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLIT: tl.constexpr,
    COMBINED: tl.constexpr,
):
    """Programs (head, sequence): the splits' results, each as heavy as its sum of exponentials."""
    row = tl.program_id(1).to(tl.int64)
    length = tl.load(positions + row) + 1
    if (tl.load(kv_slots + row) < 0) | (length <= SPLIT):
        return
    used = tl.cdiv(length, SPLIT)
    number = row * HEADS + tl.program_id(0)
    lane = tl.arange(0, WIDTH)
    most = float("-inf")
    total = 0.0
    summed = tl.zeros((WIDTH,), tl.float32)
    start = 0
    while start < used:
        split = start + tl.arange(0, COMBINED)
        there = split < used
        at = number * splits + split
        log_sum = tl.load(log_sums + at, mask=there, other=float("-inf"))
        wanted = there[:, None] & (lane < HEAD_DIM)
        mean = tl.load(partial + at[:, None] * HEAD_DIM + lane, mask=wanted, other=0.0)
        highest = tl.maximum(most, tl.max(log_sum, axis=0))
        weights = tl.exp2(log_sum - highest)
        faded = tl.exp2(most - highest)
        total = total * faded + tl.sum(weights, axis=0)
        summed = summed * faded + tl.sum(weights[:, None] * mean, axis=0)
        most = highest
        start += COMBINED
    result = (summed / total).to(out.dtype.element_ty)
    tl.store(out + number * HEAD_DIM + lane, result, mask=lane < HEAD_DIM)
