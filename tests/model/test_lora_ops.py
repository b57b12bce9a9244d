"""The batched ways of adding LoRA against the row-by-row reference."""

from __future__ import annotations

import pytest
import torch

from lorax_serve.core import BASE
from lorax_serve.model.lora_ops import SiteLoRA, add_lora_reference, add_lora_segment
from lorax_serve.model.multi_lora import MultiLoRA
from lorax_serve.model.spec import Site, Slice

IN, Q, KV = 24, 16, 8
SITES = [
    Site(IN, Q + 2 * KV, (Slice("q", 0, Q), Slice("k", Q, KV), Slice("v", Q + KV, KV))),
    Site(Q, IN, (Slice("o", 0, IN),)),
]
RANKS = {0: 1, 1: 4, 2: 17, 3: 64}

# Punica's popularity shapes, over five rows or more.
MIXES = {
    "identical": [2] * 9,
    "distinct": [0, 1, 2, 3],
    "uniform": [0, 1, 0, 1, 2, 3, 2, 3],
    "skewed": [3, 3, 3, 3, 3, 0, 1],
    "with base": [BASE, 0, BASE, 1, 1, BASE],
    "base only": [BASE] * 4,
}


def random_adapter(site: Site, rank: int, seed: int, only: slice = slice(None)) -> SiteLoRA:
    """LoRA on the site's slices ``only``, each with its own rank."""
    generator = torch.Generator().manual_seed(seed)
    parts, first = [], 0
    for extra, part in enumerate(site.slices[only]):
        rows = slice(first, first + rank + extra)
        b = torch.randn(rank + extra, part.length, generator=generator)
        parts.append((rows, slice(part.start, part.start + part.length), b))
        first = rows.stop
    return SiteLoRA(torch.randn(first, site.in_features, generator=generator), tuple(parts))


@pytest.fixture
def adapters() -> dict[int, tuple[SiteLoRA | None, ...]]:
    found: dict[int, tuple[SiteLoRA | None, ...]] = {
        slot: (random_adapter(SITES[0], rank, slot), random_adapter(SITES[1], rank, 50 + slot))
        for slot, rank in RANKS.items()
    }
    # One targets only k and v, and nothing at the second site.
    found[1] = (random_adapter(SITES[0], RANKS[1], 9, slice(1, None)), None)
    return found


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("prompts", [[], [3], [BASE, 1, 2]], ids=["decode", "one prompt", "three"])
def test_batch_equals_reference(
    mix: str, prompts: list[int], adapters: dict[int, tuple[SiteLoRA | None, ...]]
) -> None:
    lora = MultiLoRA(SITES, torch.device("cpu"))
    for slot, adapter in adapters.items():
        lora.put(slot, adapter)
    decodes = MIXES[mix]
    slots, chunks = list(decodes), []
    for length, slot in enumerate(prompts, 2):
        chunks.append((len(slots), len(slots) + length, slot))
        slots += [slot] * length
    batch = lora.batch(decodes, chunks)
    for index, site in enumerate(SITES):
        x = torch.randn(len(slots), site.in_features, generator=torch.Generator().manual_seed(1))
        y = torch.randn(len(slots), site.out_features, generator=torch.Generator().manual_seed(2))
        want, got = y.clone(), y.clone()
        here = {slot: adapter[index] for slot, adapter in adapters.items()}
        present = {slot: adapter for slot, adapter in here.items() if adapter is not None}
        add_lora_reference(x, want, slots, present)
        if batch is not None:
            batch.add(index, x, got)
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-5)
        untouched = [row for row, slot in enumerate(slots) if slot not in present]
        assert torch.equal(got[untouched], y[untouched])
    assert (batch is None) == all(slot == BASE for slot in slots)


def test_segment_equals_reference(adapters: dict[int, tuple[SiteLoRA | None, ...]]) -> None:
    x, y = torch.randn(7, IN), torch.zeros(7, SITES[0].out_features)
    adapter = adapters[2][0]
    assert adapter is not None
    want = y.clone()
    add_lora_reference(x, want, [2] * 7, {2: adapter})
    add_lora_segment(x, y, adapter)
    torch.testing.assert_close(y, want, atol=1e-4, rtol=1e-5)


def test_a_slot_that_gets_another_adapter_is_stacked_anew(
    adapters: dict[int, tuple[SiteLoRA | None, ...]],
) -> None:
    lora = MultiLoRA(SITES, torch.device("cpu"))
    x = torch.randn(2, IN)
    for adapter in (adapters[0], adapters[3]):
        lora.put(5, adapter)
        batch = lora.batch([5, BASE], [])
        assert batch is not None
        y = torch.zeros(2, SITES[0].out_features)
        batch.add(0, x, y)
        want = torch.zeros_like(y)
        assert adapter[0] is not None
        add_lora_reference(x, want, [5, BASE], {5: adapter[0]})
        torch.testing.assert_close(y, want, atol=1e-4, rtol=1e-5)


def test_one_rows_overflow_stays_its_own(
    adapters: dict[int, tuple[SiteLoRA | None, ...]],
) -> None:
    lora = MultiLoRA(SITES, torch.device("cpu"))
    huge = adapters[0][0]
    assert huge is not None
    lora.put(0, (SiteLoRA(huge.a * 1e38, huge.parts), None))
    lora.put(2, adapters[2])
    batch = lora.batch([0, 2, BASE], [])
    assert batch is not None
    y = torch.zeros(3, SITES[0].out_features)
    batch.add(0, 10 * torch.ones(3, IN), y)
    assert not torch.isfinite(y[0]).all()
    assert torch.isfinite(y[1:]).all()
