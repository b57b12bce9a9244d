"""``ops.RotateAndStore`` as a Triton kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lorax_serve.gpu.pages import PAGE, LayerPages, Rope

__all__ = ["rotate_and_store"]

# Heads of a program: with 128 numbers of 16 bits each it reads 2 KiB, enough that a long prompt's
# programs are not all start and end, and few enough that one row has several.
_MOST_HEADS = 8


def rotate_and_store(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    kv_slots: torch.Tensor,
    pages: LayerPages,
    rope: Rope,
) -> None:
    """See ``ops.RotateAndStore``. qkv may have any stride between rows."""
    rows, kv_heads, head_dim = qkv.shape[0], pages.keys.shape[1], qkv.shape[2]
    if not rows:
        return
    heads = qkv.shape[1] - 2 * kv_heads
    tile = min(_MOST_HEADS, triton.next_power_of_2(kv_heads))
    tiles = triton.cdiv(heads, tile) + 2 * triton.cdiv(kv_heads, tile)
    _rotate_and_store[(rows, tiles)](
        qkv,
        positions,
        kv_slots,
        pages.keys,
        pages.values,
        pages.table,
        rope.cos,
        rope.sin,
        rope.q_norm,
        rope.k_norm,
        rope.eps,
        qkv.stride(0),
        pages.keys.stride(0),
        pages.values.stride(0),
        pages.table.stride(0),
        HEADS=heads,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        PAGE=PAGE,
        TILE=tile,
        HALF=triton.next_power_of_2(head_dim // 2),
        num_warps=4,
    )


# What changes while a server runs: see attention.
@triton.jit(
    do_not_specialize=["table_stride"],
    do_not_specialize_on_alignment=["positions", "kv_slots"],
)
def _rotate_and_store(
    qkv,
    positions,
    kv_slots,
    keys,
    values,
    table,
    cos,
    sin,
    q_norm,
    k_norm,
    eps,
    row_stride,
    key_page_stride,
    value_page_stride,
    table_stride,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    HALF: tl.constexpr,
):
    """A program for each row and TILE heads of q, of k or of v. A head is two halves, each HALF
    lanes, of which HEAD_DIM / 2 are used."""
    Q_TILES: tl.constexpr = (HEADS + TILE - 1) // TILE
    KV_TILES: tl.constexpr = (KV_HEADS + TILE - 1) // TILE
    row, tile = tl.program_id(0), tl.program_id(1)
    slot = tl.load(kv_slots + row)
    if slot < 0:
        return
    position = tl.load(positions + row)
    qkv += row.to(tl.int64) * row_stride
    lane = tl.arange(0, HALF)
    if tile < Q_TILES:
        head = tile * TILE + tl.arange(0, TILE)
        at = head[:, None] * HEAD_DIM + lane
        live = (head < HEADS)[:, None] & (lane < HEAD_DIM // 2)
        _turn(qkv + at, live, lane, position, cos, sin, q_norm, eps, HEAD_DIM)
        return
    page = tl.load(table + slot.to(tl.int64) * table_stride + position // PAGE).to(tl.int64)
    head = (tile - Q_TILES) % KV_TILES * TILE + tl.arange(0, TILE)
    live = (head < KV_HEADS)[:, None] & (lane < HEAD_DIM // 2)
    stored = (head * PAGE + position % PAGE)[:, None] * HEAD_DIM + lane
    if tile < Q_TILES + KV_TILES:
        at = (HEADS + head)[:, None] * HEAD_DIM + lane
        first, second = _turn(qkv + at, live, lane, position, cos, sin, k_norm, eps, HEAD_DIM)
        to = keys + page * key_page_stride + stored
        tl.store(to, first, mask=live)
        tl.store(to + HEAD_DIM // 2, second, mask=live)
    else:
        at = (HEADS + KV_HEADS + head)[:, None] * HEAD_DIM + lane
        to = values + page * value_page_stride + stored
        tl.store(to, tl.load(qkv + at, mask=live), mask=live)
        second = tl.load(qkv + at + HEAD_DIM // 2, mask=live)
        tl.store(to + HEAD_DIM // 2, second, mask=live)


@triton.jit
def _turn(at, live, lane, position, cos, sin, norm, eps, HEAD_DIM: tl.constexpr):
    """Norm and rotate heads in place; both halves of the result, rounded."""
    used = lane < HEAD_DIM // 2
    first = tl.load(at, mask=live, other=0.0).to(tl.float32)
    second = tl.load(at + HEAD_DIM // 2, mask=live, other=0.0).to(tl.float32)
    if norm is not None:
        squares = tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)
        factor = 1.0 / tl.sqrt(squares / HEAD_DIM + eps)
        first_weight = tl.load(norm + lane, mask=used, other=0.0).to(tl.float32)
        second_weight = tl.load(norm + HEAD_DIM // 2 + lane, mask=used, other=0.0).to(tl.float32)
        first = first * factor[:, None] * first_weight
        second = second * factor[:, None] * second_weight
    if cos is not None:
        angle = position.to(tl.int64) * (HEAD_DIM // 2) + lane
        c = tl.load(cos + angle, mask=used, other=0.0)
        s = tl.load(sin + angle, mask=used, other=0.0)
        turned = first * c - second * s
        second = second * c + first * s
        first = turned
    first = first.to(at.dtype.element_ty)
    second = second.to(at.dtype.element_ty)
    tl.store(at, first, mask=live)
    tl.store(at + HEAD_DIM // 2, second, mask=live)
    return first, second
