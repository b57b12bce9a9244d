"""silu_mul: the kernel, the reference and torch's own give the same."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.nn import functional

from lorax_serve.gpu.kernels import activation as kernels
from lorax_serve.gpu.reference import activation as plain
from tests.gpu.poison import poisoned


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    with poisoned():
        yield


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    """Equal but for one rounding to the dtype."""
    assert got.dtype == want.dtype
    assert got.is_contiguous()
    step = torch.finfo(got.dtype).eps if got.dtype != torch.float32 else 4e-6
    torch.testing.assert_close(got, want, rtol=step, atol=step * 1e-3)


@pytest.mark.parametrize("size", [1, 33, 1024, 1536, 2053])
@pytest.mark.parametrize("rows", [0, 1, 6])
def test_silu_mul(
    rows: int, size: int, device: torch.device, dtypes: tuple[torch.dtype, ...]
) -> None:
    for dtype in dtypes:
        generator = torch.Generator().manual_seed(size)
        x = (4 * torch.randn(rows, 2 * size, generator=generator)).to(device, dtype)
        before = x.clone()
        got = kernels.silu_mul(x)
        close(got, plain.silu_mul(x))
        gate, up = x.double().chunk(2, dim=-1)
        close(got, (functional.silu(gate) * up).to(dtype))
        assert torch.equal(x, before)


def test_rows_of_a_wider_tensor(device: torch.device) -> None:
    wide = torch.randn(5, 900, generator=torch.Generator().manual_seed(1)).to(device)
    part = wide[:, 100:700]
    close(kernels.silu_mul(part), plain.silu_mul(part.contiguous()))


def test_extreme_gates(device: torch.device) -> None:
    gate = torch.tensor([[-1e4, -100.0, -20.0, 0.0, 20.0, 100.0, 1e4]], device=device)
    got = kernels.silu_mul(torch.cat([gate, torch.full_like(gate, 2.0)], dim=1))
    close(got, functional.silu(gate) * 2)


def test_a_rows_bits_do_not_depend_on_the_others(device: torch.device) -> None:
    x = torch.randn(6, 600, generator=torch.Generator().manual_seed(2)).to(device)
    together = kernels.silu_mul(x)
    x[[0, 1, 3, 4, 5]] = torch.nan
    assert torch.equal(kernels.silu_mul(x)[2], together[2])
    assert torch.equal(kernels.silu_mul(x[2:3])[0], together[2])
