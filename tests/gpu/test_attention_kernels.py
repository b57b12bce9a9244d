"""Attention of decoding rows over pages, by both kinds of the call."""

from __future__ import annotations

import math

import pytest
import torch

from lorax_serve.gpu.kernels import attention as kernels
from lorax_serve.gpu.ops import DecodeAttention
from lorax_serve.gpu.pages import LayerPages
from lorax_serve.gpu.reference import attention as reference
from tests.gpu.paged import fill, naive_attention, poisoned_pages

SPLIT = 256
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
KINDS = {"triton": kernels.decode_attention, "torch": reference.decode_attention}


@pytest.fixture(params=KINDS)
def attend(request: pytest.FixtureRequest) -> DecodeAttention:
    return KINDS[request.param]


def check(
    attend: DecodeAttention,
    lengths: list[int],
    group: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Rows of these lengths, in no order, with padding rows between, against plain attention."""
    pages = poisoned_pages(lengths, kv_heads, head_dim, dtype, device)
    stored = [fill(pages, slot, length) for slot, length in enumerate(lengths)]
    slots = [-1]
    for slot in torch.randperm(len(lengths)).tolist():
        slots += [slot, -1]
    positions = [lengths[slot] - 1 if slot >= 0 else 7 for slot in slots]
    heads = group * kv_heads
    # As a decoder has it: a view of rows that hold more.
    q = torch.randn(len(slots), heads + 2 * kv_heads, head_dim).to(device, dtype)[:, :heads]
    scale = 1 / math.sqrt(head_dim)
    out = attend(q, numbers(positions, device), numbers(slots, device), pages, scale)
    assert out.shape == q.shape
    assert out.dtype == dtype
    assert out.is_contiguous()
    for row, slot in enumerate(slots):
        if slot < 0:
            assert not out[row].any()
            continue
        expected = naive_attention(q[row : row + 1], *stored[slot], positions[row], scale)[0]
        worst = (out[row].double() - expected).abs().max().item()
        assert worst <= TOLERANCE[dtype] * max(1.0, expected.abs().max().item()), lengths[slot]


def numbers(values: list[int], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


@pytest.mark.parametrize("group", [1, 2, 3, 4, 7, 8])
def test_groups(
    attend: DecodeAttention, group: int, device: torch.device, dtypes: tuple[torch.dtype, ...]
) -> None:
    torch.manual_seed(group)
    for dtype in dtypes:
        check(attend, [1, 31, 100, SPLIT + 70], group, 2, 64, dtype, device)


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_head_dims(
    attend: DecodeAttention, head_dim: int, device: torch.device, dtypes: tuple[torch.dtype, ...]
) -> None:
    torch.manual_seed(head_dim)
    for dtype in dtypes:
        check(attend, [5, 64, SPLIT + 33], 3, 1, head_dim, dtype, device)


def test_lengths_about_pages_and_splits(
    attend: DecodeAttention, device: torch.device, dtypes: tuple[torch.dtype, ...]
) -> None:
    torch.manual_seed(0)
    edges = [1, 2, 32, 33, 64, SPLIT - 1, SPLIT, SPLIT + 1, 2 * SPLIT, 2 * SPLIT + 1, 900]
    for dtype in dtypes:
        check(attend, edges, 2, 1, 64, dtype, device)


def test_more_splits_than_are_combined_at_once(device: torch.device) -> None:
    torch.manual_seed(0)
    check(kernels.decode_attention, [17 * SPLIT + 5], 2, 1, 64, torch.float32, device)


def test_only_padding(attend: DecodeAttention, device: torch.device) -> None:
    pages = poisoned_pages([600], 1, 64, torch.float32, device)
    q = torch.full((3, 2, 64), math.nan, device=device)
    out = attend(q, numbers([0, 500, 9], device), numbers([-1] * 3, device), pages, 1.0)
    assert not out.any()


def test_no_rows(attend: DecodeAttention, device: torch.device) -> None:
    pages = poisoned_pages([5], 1, 64, torch.float32, device)
    q = torch.zeros(0, 2, 64, device=device)
    assert attend(q, numbers([], device), numbers([], device), pages, 1.0).shape == (0, 2, 64)


def test_every_element_is_written(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the memory that the kernels are given holds NaN."""
    plain = torch.empty

    def poisoned(*args: object, **kwargs: object) -> torch.Tensor:
        return plain(*args, **kwargs).fill_(math.nan)  # type: ignore[call-overload,no-any-return]

    monkeypatch.setattr(torch, "empty", poisoned)
    torch.manual_seed(0)
    check(kernels.decode_attention, [3, 300, 600], 3, 2, 96, torch.float32, device)


def test_a_row_s_bits_do_not_depend_on_the_batch(
    attend: DecodeAttention,
    device: torch.device,
    dtypes: tuple[torch.dtype, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    lengths = [2 * SPLIT + 40, 10, 4 * SPLIT, 200]
    for dtype in dtypes:
        pages = poisoned_pages(lengths, 2, 64, dtype, device)
        for slot, length in enumerate(lengths):
            fill(pages, slot, length)
        q = torch.randn(4, 6, 64).to(device, dtype)
        positions = numbers([length - 1 for length in lengths], device)
        slots = numbers([0, 1, 2, 3], device)
        together = attend(q, positions, slots, pages, 0.125)
        for row in range(4):
            one = slice(row, row + 1)
            assert torch.equal(
                attend(q[one], positions[one], slots[one], pages, 0.125)[0], together[row]
            )
        # Nor on how many programs share a row's splits, or on the width of the table.
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "_LEAST_PROGRAMS", 1)
            patch.setattr(kernels, "_PROGRAMS", 1)
            assert torch.equal(attend(q, positions, slots, pages, 0.125), together)
        padding = torch.full((4, 40), -1, dtype=torch.int32, device=device)
        wider = LayerPages(pages.keys, pages.values, torch.cat((pages.table, padding), dim=1))
        assert torch.equal(attend(q, positions, slots, wider, 0.125), together)
        view = LayerPages(pages.keys, pages.values, wider.table[:, : pages.table.shape[1]])
        assert torch.equal(attend(q, positions, slots, view, 0.125), together)


def test_a_row_with_nan_spoils_no_other(attend: DecodeAttention, device: torch.device) -> None:
    torch.manual_seed(0)
    pages = poisoned_pages([300, 300], 1, 64, torch.float32, device)
    fill(pages, 0, 300)
    fill(pages, 1, 300)
    pages.values[int(pages.table[1, 2]), :, 5] = math.nan
    q = torch.randn(2, 2, 64, device=device)
    out = attend(q, numbers([299, 299], device), numbers([0, 1], device), pages, 0.125)
    assert out[0].isfinite().all()
    assert out[1].isnan().any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_offsets_beyond_two_to_the_31() -> None:
    device = torch.device("cuda")
    torch.manual_seed(0)
    count = 2**31 // (2 * 32 * 128) + 8
    shape = (count, 2, 32, 128)
    caches = [torch.zeros(shape, dtype=torch.bfloat16, device=device) for _ in range(2)]
    table = numbers([count - 1, 0, count - 5], device)[None]
    pages = LayerPages(caches[0], caches[1], table)
    keys, values = fill(pages, 0, 80)
    q = torch.randn(1, 8, 128, device=device).bfloat16()
    out = kernels.decode_attention(q, numbers([79], device), numbers([0], device), pages, 0.1)
    expected = naive_attention(q, keys, values, 79, 0.1)
    assert (out.double() - expected).abs().max() < 8e-3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_in_a_graph() -> None:
    """What is launched does not depend on what the tensors hold."""
    device = torch.device("cuda")
    torch.manual_seed(0)
    lengths = [40, 700, 300]
    pages = poisoned_pages(lengths, 2, 128, torch.bfloat16, device)
    for slot, length in enumerate(lengths):
        fill(pages, slot, length)
    q = torch.randn(3, 8, 128, device=device).bfloat16()
    positions, slots = numbers([0, 0, 0], device), numbers([-1, -1, -1], device)
    kernels.decode_attention(q, positions, slots, pages, 0.1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kernels.decode_attention(q, positions, slots, pages, 0.1)
    for order in ([0, 1, 2], [2, -1, 1]):
        slots.copy_(numbers(order, device))
        positions.copy_(numbers([lengths[slot] - 1 if slot >= 0 else 0 for slot in order], device))
        graph.replay()
        assert torch.equal(out, kernels.decode_attention(q, positions, slots, pages, 0.1))
