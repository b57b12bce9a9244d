"""The device's adapter slots with the kernels, against the same slots in plain torch on the CPU."""

from __future__ import annotations

import pytest
import torch

from lorax_serve.checkpoint.spec import Site, Slice
from lorax_serve.core import BASE
from lorax_serve.gpu.kernels import lora as kernels
from lorax_serve.gpu.reference import lora as reference
from lorax_serve.model.adapters.arena_lora import ArenaBatch, ArenaLoRA
from lorax_serve.model.adapters.folded import FoldedAdapter, SiteLoRA

SITES = [
    Site(160, 64, (Slice("q", 0, 32), Slice("k", 32, 16), Slice("v", 48, 16))),
    Site(32, 160, (Slice("o", 0, 160),)),
    Site(160, 20, (Slice("head", 0, 20),)),
]
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}
ROOM = 38_000
"""Elements that hold the first three adapters below, not many more."""


def adapter(rank: int, dtype: torch.dtype, *, gain: bool = False) -> FoldedAdapter:
    generator = torch.Generator().manual_seed(rank)
    found = []
    for site in SITES[:-1]:
        ranks = [rank + extra for extra in range(len(site.slices))]
        a = torch.randn(sum(ranks), site.in_features, generator=generator) / 12
        parts, first = [], 0
        for own, part in zip(ranks, site.slices, strict=True):
            b = torch.randn(own, part.length, generator=generator).to(dtype) / 4
            columns = slice(part.start, part.start + part.length)
            parts.append((slice(first, first + own), columns, b))
            first += own
        vector = torch.rand(site.out_features, generator=generator) + 0.5
        found.append(SiteLoRA(a.to(dtype), tuple(parts), vector if gain else None))
    return FoldedAdapter((*found, None))


def outputs(
    batch: ArenaBatch, total: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Of all sites, side by side, on the CPU."""
    generator, found = torch.Generator().manual_seed(total), []
    for index, site in enumerate(SITES[:-1]):
        x = torch.randn(total, site.in_features, generator=generator).to(device, dtype)
        y = torch.randn(total, site.out_features, generator=generator).to(device, dtype)
        batch.add(index, x, y, None)
        found.append(y.cpu())
    return torch.cat(found, 1)


@pytest.mark.parametrize("prompts", [[], [(7, 9, 0), (9, 12, BASE), (12, 80, 2)]])
def test_steps_through_loads_that_move_others(
    prompts: list[tuple[int, int, int]], device: torch.device, dtypes: tuple[torch.dtype, ...]
) -> None:
    for dtype in dtypes:
        cpu = torch.device("cpu")
        ours = ArenaLoRA(SITES, dtype, device, kernels, ROOM * dtype.itemsize)
        theirs = ArenaLoRA(SITES, dtype, cpu, reference, 1 << 22)
        begins = []
        # The second of slot 0 leaves a hole that the first of slot 3 does not fit into.
        for slot, rank in ((0, 9), (1, 16), (2, 21), (0, 3), (3, 6)):
            for lora in (ours, theirs):
                lora.put(slot, lora.prepare(adapter(rank, dtype, gain=slot == 1)))
            if rank in (9, 16):
                continue
            decodes = [slot, BASE, 1, 1, 0, slot, BASE]
            total = prompts[-1][1] if prompts else len(decodes)
            got, want = ours.batch(decodes, prompts), theirs.batch(decodes, prompts)
            assert got is not None
            assert want is not None
            torch.testing.assert_close(
                outputs(got, total, dtype, device),
                outputs(want, total, dtype, cpu),
                atol=TOLERANCE[dtype],
                rtol=TOLERANCE[dtype],
            )
            begins.append(ours.plan_arrays([1])[0])
        assert begins[0] == begins[1] != begins[2]


def test_a_plan_of_fixed_size(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> None:
    for dtype in dtypes:
        lora = ArenaLoRA(SITES, dtype, device, kernels, 1 << 20)
        for slot, rank in enumerate((4, 17)):
            lora.put(slot, lora.prepare(adapter(rank, dtype)))
        static = lora.static_batch(5, 5, 64)
        for slots in ([0, 1, BASE, 1, 0], [1, 0]):
            lora.fill(static, slots)
            batch = lora.batch([*slots, *[BASE] * (5 - len(slots))], [])
            assert batch is not None
            want = outputs(batch, 5, dtype, device)
            assert torch.equal(outputs(static, 5, dtype, device), want)
