"""Each test of a kernel runs in Triton's interpreter, or, with ``-m gpu``, on a CUDA device."""

from __future__ import annotations

import pytest
import torch

_INTERPRETER = pytest.mark.skipif(
    torch.cuda.is_available(), reason="Triton compiles for the GPU here: -m gpu"
)


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=_INTERPRETER),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ]
)
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device(request.param)


@pytest.fixture
def dtypes(device: torch.device) -> tuple[torch.dtype, ...]:
    """The interpreter's products of bfloat16 are wrong; float16 stands in for it."""
    if device.type == "cpu":
        return (torch.float32, torch.float16)
    return (torch.float32, torch.bfloat16)
