"""The batched ways of adding LoRA against the row-by-row reference."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import pytest
import torch

from lorax_serve.checkpoint.spec import Site, Slice
from lorax_serve.core import BASE
from lorax_serve.kernels.cpu import ADD
from lorax_serve.kernels.cpu import load as load_kernels
from lorax_serve.kernels.packing import Arena, PackedLinear
from lorax_serve.model.adapters.folded import FoldedAdapter, SiteLoRA
from lorax_serve.model.adapters.lora_ops import add_lora_reference, add_lora_segment
from lorax_serve.model.adapters.multi_lora import MultiLoRA
from lorax_serve.model.adapters.packed_lora import PackedLoRA
from tests.helpers import needs_kernels

IN, Q, KV = 48, 32, 16
SITES = [
    Site(IN, Q + 2 * KV, (Slice("q", 0, Q), Slice("k", Q, KV), Slice("v", Q + KV, KV))),
    Site(Q, IN, (Slice("o", 0, IN),)),
]
OUTPUT = Site(IN, 20, (Slice("head", 0, 20),))
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


Adapters = dict[int, tuple[SiteLoRA | None, ...]]
Step = Callable[[int, torch.Tensor, torch.Tensor], None]
"""Adds a step's LoRA at a site: x, and y that is changed in place."""


@pytest.fixture
def adapters() -> Adapters:
    found: Adapters = {
        slot: (random_adapter(SITES[0], rank, slot), random_adapter(SITES[1], rank, 50 + slot))
        for slot, rank in RANKS.items()
    }
    # One targets only k and v, and nothing at the second site.
    found[1] = (random_adapter(SITES[0], RANKS[1], 9, slice(1, None)), None)
    return found


class TorchSlots:
    """The slots of the torch decoder."""

    def __init__(self) -> None:
        self.slots = MultiLoRA([*SITES, OUTPUT], torch.device("cpu"))

    def put(self, slot: int, adapter: tuple[SiteLoRA | None, ...]) -> None:
        self.slots.put(slot, self.slots.prepare(FoldedAdapter((*adapter, None))))

    def step(self, decodes: list[int], prompts: list[tuple[int, int, int]]) -> Step | None:
        batch = self.slots.batch(decodes, prompts)
        if batch is None:
            return None
        return lambda site, x, y: batch.add(site, x, y, None)


class CompiledSlots:
    """The slots of the compiled decoder, applied by a linear whose own weights are zero."""

    def __init__(self) -> None:
        head = PackedLinear.pack(torch.zeros(20, IN), None, Arena())
        self.slots = PackedLoRA([*SITES, OUTPUT], torch.float32, head)
        self.linears = [
            PackedLinear.pack(torch.zeros(site.out_features, site.in_features), None, Arena())
            for site in SITES
        ]

    def put(self, slot: int, adapter: tuple[SiteLoRA | None, ...]) -> None:
        self.slots.put(slot, self.slots.prepare(FoldedAdapter((*adapter, None))))

    def step(self, decodes: list[int], prompts: list[tuple[int, int, int]]) -> Step | None:
        batch = self.slots.batch(decodes, prompts)
        if batch is None:
            return None
        kernels, lora = load_kernels(torch.float32), ctypes.addressof(batch.args)

        def add(site: int, x: torch.Tensor, y: torch.Tensor) -> None:
            linear = self.linears[site]
            scratch = torch.empty(len(x), kernels.linear_scratch(x.shape[1]), dtype=torch.uint8)
            at = scratch.data_ptr()
            kernels.linear(linear, ADD, x.data_ptr(), len(x), y.data_ptr(), at, lora, site)

        return add


every_kind = pytest.mark.parametrize(
    "kind",
    [
        pytest.param(TorchSlots, id="torch"),
        pytest.param(CompiledSlots, id="compiled", marks=needs_kernels),
    ],
)
Kind = type[TorchSlots | CompiledSlots]


@every_kind
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("prompts", [[], [3], [BASE, 1, 2]], ids=["decode", "one prompt", "three"])
def test_batch_equals_reference(
    kind: Kind, mix: str, prompts: list[int], adapters: Adapters
) -> None:
    lora = kind()
    for slot, adapter in adapters.items():
        lora.put(slot, adapter)
    decodes = MIXES[mix]
    slots, chunks = list(decodes), []
    for length, slot in enumerate(prompts, 2):
        chunks.append((len(slots), len(slots) + length, slot))
        slots += [slot] * length
    add = lora.step(decodes, chunks)
    for index, site in enumerate(SITES):
        x = torch.randn(len(slots), site.in_features, generator=torch.Generator().manual_seed(1))
        y = torch.randn(len(slots), site.out_features, generator=torch.Generator().manual_seed(2))
        want, got = y.clone(), y.clone()
        here = {slot: adapter[index] for slot, adapter in adapters.items()}
        present = {slot: adapter for slot, adapter in here.items() if adapter is not None}
        add_lora_reference(x, want, slots, present)
        if add is not None:
            add(index, x, got)
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-5)
        untouched = [row for row, slot in enumerate(slots) if slot not in present]
        assert torch.equal(got[untouched], y[untouched])
    assert (add is None) == all(slot == BASE for slot in slots)


def test_segment_equals_reference(adapters: Adapters) -> None:
    x, y = torch.randn(7, IN), torch.zeros(7, SITES[0].out_features)
    adapter = adapters[2][0]
    assert adapter is not None
    want = y.clone()
    add_lora_reference(x, want, [2] * 7, {2: adapter})
    add_lora_segment(x, y, adapter)
    torch.testing.assert_close(y, want, atol=1e-4, rtol=1e-5)


@every_kind
def test_a_slot_that_gets_another_adapter_forgets_the_first(kind: Kind, adapters: Adapters) -> None:
    lora = kind()
    x = torch.randn(2, IN)
    for adapter in (adapters[0], adapters[3]):
        lora.put(5, adapter)
        add = lora.step([5, BASE], [])
        assert add is not None
        y = torch.zeros(2, SITES[0].out_features)
        add(0, x, y)
        want = torch.zeros_like(y)
        assert adapter[0] is not None
        add_lora_reference(x, want, [5, BASE], {5: adapter[0]})
        torch.testing.assert_close(y, want, atol=1e-4, rtol=1e-5)


@every_kind
def test_one_rows_overflow_stays_its_own(kind: Kind, adapters: Adapters) -> None:
    lora = kind()
    huge = adapters[0][0]
    assert huge is not None
    lora.put(0, (SiteLoRA(huge.a * 1e38, huge.parts), None))
    lora.put(2, adapters[2])
    add = lora.step([0, 2, BASE], [])
    assert add is not None
    y = torch.zeros(3, SITES[0].out_features)
    add(0, 10 * torch.ones(3, IN), y)
    assert not torch.isfinite(y[0]).all()
    assert torch.isfinite(y[1:]).all()
