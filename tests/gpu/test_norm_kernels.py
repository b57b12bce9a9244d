"""RMS norms: the kernels, the reference and torch's own give the same."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.nn import functional

from lorax_serve.gpu.kernels import norm as kernels
from lorax_serve.gpu.reference import norm as plain
from tests.gpu.poison import poisoned

EPS = 1e-5
SIZES = [1, 7, 64, 576, 4096, 5120, 16384]


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    with poisoned():
        yield


def inputs(rows: int, size: int, dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(size + rows)
    x, y = 3 * torch.randn(2, rows, size, generator=generator)
    weight = 1 + 0.3 * torch.randn(size, generator=generator)
    return [tensor.to(device, dtype) for tensor in (x, y, weight)]


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    """Equal but for one rounding to the dtype."""
    assert got.dtype == want.dtype
    assert got.is_contiguous()
    step = torch.finfo(got.dtype).eps if got.dtype != torch.float32 else 4e-6
    torch.testing.assert_close(got, want, rtol=step, atol=step * 1e-2)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_rms_norm(
    rows: int, size: int, device: torch.device, dtypes: tuple[torch.dtype, ...]
) -> None:
    for dtype in dtypes:
        x, _, weight = inputs(rows, size, dtype, device)
        before = x.clone()
        got = kernels.rms_norm(x, weight, EPS)
        close(got, plain.rms_norm(x, weight, EPS))
        torchs = functional.rms_norm(x.double(), (size,), weight.double(), EPS)
        close(got, torchs.to(dtype))
        assert torch.equal(x, before)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_add_rms_norm(
    rows: int, size: int, device: torch.device, dtypes: tuple[torch.dtype, ...]
) -> None:
    for dtype in dtypes:
        x, y, weight = inputs(rows, size, dtype, device)
        theirs, y_before = x.clone(), y.clone()
        want = plain.add_rms_norm(theirs, y, weight, EPS)
        got = kernels.add_rms_norm(x, y, weight, EPS)
        assert torch.equal(x, theirs)
        assert torch.equal(y, y_before)
        close(got, want)


def test_rows_of_a_wider_tensor(device: torch.device) -> None:
    wide, y, _ = inputs(4, 300, torch.float32, device)
    weight = torch.ones(100, device=device)
    part = wide[:, 100:200]
    close(kernels.rms_norm(part, weight, EPS), plain.rms_norm(part, weight, EPS))
    want_sum = part + y[:, 50:150]
    left, right = wide[:, :100].clone(), wide[:, 200:].clone()
    got = kernels.add_rms_norm(part, y[:, 50:150], weight, EPS)
    assert torch.equal(wide, torch.cat([left, want_sum, right], dim=1))
    close(got, plain.rms_norm(want_sum, weight, EPS))


def test_a_rows_bits_do_not_depend_on_the_others(device: torch.device) -> None:
    x, _, weight = inputs(6, 576, torch.float32, device)
    together = kernels.rms_norm(x, weight, EPS)
    x[[0, 1, 3, 4, 5]] = torch.nan
    assert torch.equal(kernels.rms_norm(x, weight, EPS)[2], together[2])
    assert torch.equal(kernels.rms_norm(x[2:3], weight, EPS)[0], together[2])


def test_zeros_and_large_numbers(device: torch.device) -> None:
    x = torch.tensor([[0.0] * 50, [1e15] * 50, [-1e-30] * 50], device=device)
    weight = torch.ones(50, device=device)
    close(kernels.rms_norm(x, weight, EPS), plain.rms_norm(x, weight, EPS))
