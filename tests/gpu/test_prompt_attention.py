"""Attention of prompt chunks over pages."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

from lorax_serve.gpu.prompt_attention import prompt_attention
from tests.gpu.paged import fill, naive_attention, poisoned_pages

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@pytest.mark.parametrize("group", [1, 2, 3, 4, 7, 8])
@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_chunks_of_a_prompt(
    group: int, head_dim: int, device: torch.device, dtypes: tuple[torch.dtype, ...]
) -> None:
    """However it is cut, each row sees what is before it; NaN after it, and in others' pages, is
    not seen."""
    torch.manual_seed(group)
    kv_heads, length, scale = 2, 150, 1 / math.sqrt(head_dim)
    heads = group * kv_heads
    for dtype in dtypes:
        pages = poisoned_pages([40, length, 70], kv_heads, head_dim, dtype, device)
        qkv = torch.randn(length, heads + 2 * kv_heads, head_dim).to(device, dtype)
        for cut in (150, 1, 31, 33, 64):
            pages.keys.fill_(math.nan)
            pages.values.fill_(math.nan)
            parts, begin = [], 0
            while begin < length:
                end = min(begin + cut, length)
                # What rotate_and_store does; the positions after the chunk are NaN yet.
                k, v = qkv[:, heads : heads + kv_heads], qkv[:, heads + kv_heads :]
                for position in range(begin, end):
                    page, offset = int(pages.table[1, position // 32]), position % 32
                    pages.keys[page, :, offset] = k[position]
                    pages.values[page, :, offset] = v[position]
                rows = slice(begin, end)
                out = prompt_attention(qkv[rows, :heads], k[rows], v[rows], 1, end, pages, scale)
                assert out.shape == (end - begin, heads, head_dim)
                parts.append(out)
                begin = end
                if cut == 1 and begin > 70:
                    break
            result = torch.cat(parts)
            expected = naive_attention(
                qkv[: len(result), :heads],
                k[: len(result)].transpose(0, 1),
                v[: len(result)].transpose(0, 1),
                0,
                scale,
            )
            assert (result.double() - expected).abs().max().item() <= 4 * TOLERANCE[dtype]


def test_a_cached_prefix(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> None:
    torch.manual_seed(0)
    for dtype in dtypes:
        pages = poisoned_pages([90, 33], 2, 64, dtype, device)
        keys, values = fill(pages, 0, 90)
        q = torch.randn(20, 6, 64).to(device, dtype)
        k, v = (x[:, 70:].transpose(0, 1) for x in (keys, values))
        out = prompt_attention(q, k, v, 0, 90, pages, 0.125)
        expected = naive_attention(q, keys, values, 70, 0.125)
        assert (out.double() - expected).abs().max().item() <= 4 * TOLERANCE[dtype]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("group", "begin"), [(1, 0), (1, 70), (4, 0), (4, 70)])
def test_flash_attention_computes_it(group: int, begin: int) -> None:
    """With no other of torch's kernels allowed, in the compute types."""
    device = torch.device("cuda")
    torch.manual_seed(0)
    for dtype in (torch.bfloat16, torch.float16):
        pages = poisoned_pages([90], 2, 128, dtype, device)
        keys, values = fill(pages, 0, 90)
        q = torch.randn(90 - begin, 2 * group, 128, device=device).to(dtype)
        k, v = (x[:, begin:].transpose(0, 1) for x in (keys, values))
        with (
            warnings.catch_warnings(action="ignore"),
            torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION),
            torch.profiler.profile() as profile,
        ):
            out = prompt_attention(q, k, v, 0, 90, pages, 0.1)
        names = [event.key for event in profile.key_averages()]
        assert any("_flash_attention_forward" in name for name in names)
        expected = naive_attention(q, keys, values, begin, 0.1)
        assert (out.double() - expected).abs().max().item() <= 4 * TOLERANCE[dtype]
