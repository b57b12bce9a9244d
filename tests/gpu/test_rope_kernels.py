"""Norm, rotation and storing of queries, keys and values, by both kinds of the call."""

from __future__ import annotations

import math

import pytest
import torch

from lorax_serve.gpu.kernels import rope as kernels
from lorax_serve.gpu.ops import RotateAndStore
from lorax_serve.gpu.pages import PAGE, LayerPages, Rope
from lorax_serve.gpu.reference import rope as reference
from tests.gpu.paged import poisoned_pages

# Of a number's size: rounding once is half a unit in the last place, at most half of these.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}
KINDS = {"triton": kernels.rotate_and_store, "torch": reference.rotate_and_store}


@pytest.fixture(params=KINDS)
def store(request: pytest.FixtureRequest) -> RotateAndStore:
    return KINDS[request.param]


def numbers(values: list[int], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def rope_of(
    head_dim: int, dtype: torch.dtype, device: torch.device, *, rotates: bool, norms: bool
) -> Rope:
    angles = torch.arange(200.0)[:, None] * 0.1 ** torch.linspace(0, 3, head_dim // 2)
    q_norm, k_norm = ((1 + torch.randn(head_dim) / 4).to(device, dtype) for _ in range(2))
    return Rope(
        angles.cos().to(device) if rotates else None,
        angles.sin().to(device) if rotates else None,
        q_norm if norms else None,
        k_norm if norms else None,
        eps=1e-5,
    )


def turned(x: torch.Tensor, norm: torch.Tensor | None, position: int, rope: Rope) -> torch.Tensor:
    """What becomes of heads ``[heads, head_dim]`` of one row, in float64."""
    y = x.double()
    if norm is not None:
        y = y / (y.square().mean(-1, keepdim=True) + rope.eps).sqrt() * norm.double()
    if rope.cos is not None and rope.sin is not None:
        pairs = torch.complex(*y.chunk(2, dim=-1))
        pairs *= torch.complex(rope.cos[position].double(), rope.sin[position].double())
        y = torch.cat((pairs.real, pairs.imag), dim=-1)
    return y


def close(x: torch.Tensor, expected: torch.Tensor) -> bool:
    wrong = (x.double() - expected).abs() / expected.abs().clamp(min=1)
    return wrong.max().item() <= TOLERANCE[x.dtype]


@pytest.mark.parametrize("rotates", [True, False])
@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (9, 3), (7, 1), (20, 10)])
@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_rows(
    store: RotateAndStore,
    heads: int,
    kv_heads: int,
    head_dim: int,
    norms: bool,
    rotates: bool,
    device: torch.device,
    dtypes: tuple[torch.dtype, ...],
) -> None:
    torch.manual_seed(heads)
    # A prompt's rows over the border of two pages, decoding rows, and padding.
    slots = numbers([2, 2, 2, 0, -1, 1, -1], device)
    positions = numbers([31, 32, 33, 0, 5, 127, 0], device)
    for dtype in dtypes:
        rope = rope_of(head_dim, dtype, device, rotates=rotates, norms=norms)
        pages = poisoned_pages([1, 130, 60], kv_heads, head_dim, dtype, device, width=7)
        qkv = torch.randn(7, heads + 2 * kv_heads, head_dim).clamp(-2, 2).to(device, dtype)
        before = qkv.clone()
        expected = LayerPages(pages.keys.clone(), pages.values.clone(), pages.table)
        store(qkv, positions, slots, pages, rope)
        for row, (slot, position) in enumerate(
            zip(slots.tolist(), positions.tolist(), strict=True)
        ):
            if slot < 0:
                assert torch.equal(qkv[row], before[row])
                continue
            q, k, v = torch.split(before[row], [heads, kv_heads, kv_heads])
            assert close(qkv[row, :heads], turned(q, rope.q_norm, position, rope))
            expected_k = turned(k, rope.k_norm, position, rope)
            k = qkv[row, heads : heads + kv_heads]
            assert close(k, expected_k)
            assert torch.equal(qkv[row, heads + kv_heads :], v)
            page, offset = int(pages.table[slot, position // PAGE]), position % PAGE
            expected.keys[page, :, offset] = k
            expected.values[page, :, offset] = v
        # And nothing else was written.
        assert torch.equal(bits(pages.keys), bits(expected.keys))
        assert torch.equal(bits(pages.values), bits(expected.values))


def bits(x: torch.Tensor) -> torch.Tensor:
    """NaN is not equal to itself, but its bits are."""
    return x.view(torch.int32 if x.dtype == torch.float32 else torch.int16)


def test_rounded_once(
    store: RotateAndStore, device: torch.device, dtypes: tuple[torch.dtype, ...]
) -> None:
    """What is normed is not rounded before it is rotated."""
    torch.manual_seed(0)
    dtype = dtypes[-1]
    rope = rope_of(64, dtype, device, rotates=True, norms=True)
    pages = poisoned_pages([200], 1, 64, dtype, device)
    qkv = torch.randn(100, 3, 64).to(device, dtype)
    before = qkv.clone()
    positions = torch.arange(100, dtype=torch.int32, device=device)
    store(qkv, positions, torch.zeros_like(positions), pages, rope)
    exact = torch.stack([turned(before[row, :1], rope.q_norm, row, rope) for row in range(100)])
    wrong = (qkv[:, :1] != exact.to(dtype)).float().mean().item()
    assert wrong < 0.01  # float32's own error, where a number lies between two of the dtype


def test_no_rows_and_only_padding(store: RotateAndStore, device: torch.device) -> None:
    rope = rope_of(64, torch.float32, device, rotates=True, norms=False)
    pages = poisoned_pages([5], 1, 64, torch.float32, device)
    none = numbers([], device)
    store(torch.zeros(0, 4, 64, device=device), none, none, pages, rope)
    qkv = torch.full((2, 4, 64), math.nan, device=device)
    store(qkv, numbers([0, 9], device), numbers([-1, -1], device), pages, rope)
    assert pages.keys.isnan().all()
    assert pages.values.isnan().all()


def test_rows_of_a_view(device: torch.device) -> None:
    torch.manual_seed(0)
    rope = rope_of(64, torch.float32, device, rotates=True, norms=True)
    wide = torch.randn(3, 8, 64, device=device)
    plain = wide[:, 1:7].clone()
    slots, positions = numbers([0, 0, 0], device), numbers([3, 4, 5], device)
    pages = poisoned_pages([6], 1, 64, torch.float32, device)
    kernels.rotate_and_store(wide[:, 1:7], positions, slots, pages, rope)
    kernels.rotate_and_store(plain, positions, slots, pages, rope)
    assert torch.equal(wide[:, 1:7], plain)
