"""The LoRA kernels against plain torch, and both against dense matrices made apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from lorax_serve.gpu.kernels import lora as kernels
from lorax_serve.gpu.lora import ALIGNMENT, HEADER, MAX_SLICES, LoRAPlan, SiteShape
from lorax_serve.gpu.ops import LoRAExpand, LoRAShrink
from lorax_serve.gpu.reference import lora as reference

BASE = -1
NAN = float("nan")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}

Kind = tuple[LoRAShrink, LoRAExpand]
KERNELS: Kind = (kernels.lora_shrink, kernels.lora_expand)
REFERENCE: Kind = (reference.lora_shrink, reference.lora_expand)

# The adapter of each row.
MIXES = {
    "identical": [0] * 19,
    "distinct": [0, 1, 2, 3, 4],
    "uniform": [0, 1, 2, 3, 0, 1, 2, 3, 4],
    "skewed": [2] * 17 + [3, 4, 0],
    "base rows between": [BASE, 1, BASE, BASE, 3, 1, BASE],
    "one": [3],
    "base only": [BASE] * 3,
    "empty": [],
}


@dataclass(frozen=True)
class Adapter:
    """At one site: A and B of each slice, None where it has no LoRA; float32 on the CPU."""

    a: Sequence[torch.Tensor | None]
    b: Sequence[torch.Tensor | None]
    gain: torch.Tensor | None = None
    shift: torch.Tensor | None = None


def random_adapter(
    site: SiteShape, ranks: Sequence[int], seed: int, *, gain: bool = False, shift: bool = False
) -> Adapter:
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator)

    out = sum(site.widths)
    return Adapter(
        [normal(r, site.in_features) / site.in_features**0.5 if r else None for r in ranks],
        [
            normal(r, width) / r**0.5 if r else None
            for r, width in zip(ranks, site.widths, strict=True)
        ],
        1 + 0.3 * normal(out) if gain else None,
        normal(out) if shift else None,
    )


def write_arena(
    adapters: Sequence[Adapter], site: SiteShape, dtype: torch.dtype
) -> tuple[torch.Tensor, list[int]]:
    """All adapters one after the other, NaN wherever none has anything, and where each begins."""
    per, ints = ALIGNMENT // dtype.itemsize, dtype.itemsize / 4
    arena = torch.full((1 << 21,), NAN, dtype=dtype)
    header_view, float_view = arena.view(torch.int32), arena.view(torch.float32)
    begins, used = [], per
    for adapter in adapters:
        begin = used
        used += -(-int((site.index + 1) * HEADER / ints) // per) * per

        def put(tensor: torch.Tensor, itemsize: int, begin: int = begin) -> int:
            nonlocal used
            at, size = used, tensor.numel()
            if itemsize == 4:
                first = int(at * ints)
                float_view[first : first + size] = tensor.flatten()
            else:
                arena[at : at + size] = tensor.flatten().to(dtype)
            used += -(-size * itemsize // ALIGNMENT) * per
            return at - begin

        numbers = [0] * HEADER
        for index, (a, b) in enumerate(zip(adapter.a, adapter.b, strict=True)):
            if a is not None and b is not None:
                numbers[index] = len(a)
                numbers[MAX_SLICES + index] = put(a, dtype.itemsize)
                numbers[2 * MAX_SLICES + index] = put(b, dtype.itemsize)
        for place, vector in enumerate((adapter.gain, adapter.shift), 3 * MAX_SLICES):
            if vector is not None:
                numbers[place] = put(vector, 4)
        first = int(begin * ints) + site.index * HEADER
        header_view[first : first + HEADER] = torch.tensor(numbers, dtype=torch.int32)
        begins.append(begin)
        used += per  # NaN between them
    assert used <= len(arena)
    return arena, begins


def plan_for(
    owners: Sequence[int], begins: Sequence[int], ranks: int, chunk: int = 16, spare: int = 0
) -> LoRAPlan:
    """Rows by adapter, the last chunk of each partly full, then ``spare`` chunks of none."""
    blobs, rows = [], []
    for adapter in sorted({owner for owner in owners if owner != BASE}):
        own = [row for row, owner in enumerate(owners) if owner == adapter]
        for first in range(0, len(own), chunk):
            part = own[first : first + chunk]
            blobs.append(begins[adapter])
            rows.append(part + [-1] * (chunk - len(part)))
    blobs += [-1] * spare
    rows += [[-1] * chunk] * spare
    return LoRAPlan(
        torch.tensor(blobs, dtype=torch.int64),
        torch.tensor(rows, dtype=torch.int32).view(-1, chunk),
        chunk,
        max(16, 1 << (ranks - 1).bit_length()),
    )


def to(plan: LoRAPlan, device: torch.device) -> LoRAPlan:
    return replace(plan, blobs=plan.blobs.to(device), rows=plan.rows.to(device))


def dense(
    x: torch.Tensor,
    y: torch.Tensor,
    owners: Sequence[int],
    adapters: Sequence[Adapter],
    site: SiteShape,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """With each adapter's whole matrix, in float64, from the weights as the arena rounds them."""
    result = y.double()
    base = torch.zeros(sum(site.widths)) if bias is None else bias
    for row, owner in enumerate(owners):
        if owner == BASE:
            continue
        adapter, first = adapters[owner], 0
        for a, b, width in zip(adapter.a, adapter.b, site.widths, strict=True):
            if a is not None and b is not None:
                matrix = a.to(y.dtype).double().T @ b.to(y.dtype).double()
                result[row, first : first + width] += x[row].double() @ matrix
            first += width
        gain = torch.ones(()) if adapter.gain is None else adapter.gain
        shift = torch.zeros(()) if adapter.shift is None else adapter.shift
        result[row] = (result[row] - base.double()) * gain + base + shift
    return result


def run(
    kind: Kind,
    x: torch.Tensor,
    y: torch.Tensor,
    arena: torch.Tensor,
    plan: LoRAPlan,
    site: SiteShape,
    bias: torch.Tensor | None = None,
    device: torch.device | None = None,
) -> torch.Tensor:
    """What ``y`` becomes, on the CPU."""
    device = device or torch.device("cpu")
    shrink, expand = kind
    x, y, arena, plan = x.to(device), y.clone().to(device), arena.to(device), to(plan, device)
    h = shrink(x, arena, plan, site)
    assert h.shape[1:] == (len(site.widths), len(x), plan.max_rank)
    assert h.dtype == torch.float32
    expand(h, y, arena, plan, site, None if bias is None else bias.to(device))
    return y.cpu()


def check(
    owners: Sequence[int],
    adapters: Sequence[Adapter],
    site: SiteShape,
    dtype: torch.dtype,
    device: torch.device,
    *,
    biased: bool = False,
    chunk: int = 16,
    spare: int = 0,
) -> None:
    """Kernels and reference against dense matrices; the base's rows keep their bits."""
    generator = torch.Generator().manual_seed(len(owners))
    out = sum(site.widths)
    x = torch.randn(len(owners), site.in_features, generator=generator).to(dtype)
    y = torch.randn(len(owners), out, generator=generator).to(dtype)
    bias = torch.randn(out, generator=generator).to(dtype) if biased else None
    most = max(
        len(a) for adapter in adapters for a in (*adapter.a, torch.empty(1)) if a is not None
    )
    arena, begins = write_arena(adapters, site, dtype)
    plan = plan_for(owners, begins, most, chunk, spare)
    # What no adapter of the plan may read or write.
    mine = torch.tensor([owner != BASE for owner in owners], dtype=torch.bool)
    want = dense(x, y, owners, adapters, site, bias)
    x[~mine] = NAN
    y[~mine] = NAN
    for kind in (KERNELS, REFERENCE):
        on = device if kind is KERNELS else torch.device("cpu")
        got = run(kind, x, y, arena, plan, site, bias, on)
        tolerance = TOLERANCE[dtype]
        torch.testing.assert_close(got[mine].double(), want[mine], atol=tolerance, rtol=tolerance)
        assert got[~mine].isnan().all()


@pytest.mark.parametrize("mix", MIXES)
def test_mixes(mix: str, device: torch.device, dtypes: tuple[torch.dtype, ...]) -> None:
    site = SiteShape(3, 160, (80, 48, 16))
    ranks = ((8, 8, 8), (3, 0, 17), (16, 16, 16), (0, 5, 0), (33, 1, 64))
    adapters = [random_adapter(site, own, seed) for seed, own in enumerate(ranks)]
    for dtype in dtypes:
        check(MIXES[mix], adapters, site, dtype, device, spare=2)


@pytest.mark.parametrize("rank", [1, 3, 8, 15, 16, 17, 64, 100, 128, 130])
def test_ranks(rank: int, device: torch.device, dtypes: tuple[torch.dtype, ...]) -> None:
    site = SiteShape(0, 144, (72,))
    adapters = [random_adapter(site, (rank,), 1), random_adapter(site, (1,), 2)]
    for dtype in dtypes:
        for chunk in (16, 64):
            check([0, 1, BASE, 0], adapters, site, dtype, device, chunk=chunk)


@pytest.mark.parametrize(
    ("in_features", "widths"),
    [
        (16, (16,)),
        (33, (7, 65)),
        (128, (64, 64)),
        (257, (129, 1, 63)),
        (4096 + 128 + 5, (20,)),  # parts of more than one block of in_features, the last ragged
    ],
)
def test_sizes(
    in_features: int,
    widths: tuple[int, ...],
    device: torch.device,
    dtypes: tuple[torch.dtype, ...],
) -> None:
    site = SiteShape(1, in_features, widths)
    ranks = [(5,) * len(widths), tuple(range(len(widths)))]
    adapters = [random_adapter(site, own, seed) for seed, own in enumerate(ranks)]
    for dtype in dtypes:
        check([1, 0, BASE, 0], adapters, site, dtype, device)
        check([1, 0, BASE, 0], adapters, site, dtype, device, chunk=32)


@pytest.mark.parametrize("biased", [False, True], ids=["bare", "biased"])
def test_gain_and_shift(
    biased: bool, device: torch.device, dtypes: tuple[torch.dtype, ...]
) -> None:
    site = SiteShape(2, 48, (80, 16))
    adapters = [
        random_adapter(site, (4, 4), 1, gain=True),
        random_adapter(site, (4, 0), 2, shift=True),
        random_adapter(site, (0, 17), 3, gain=True, shift=True),
        random_adapter(site, (0, 0), 4, shift=True),
        random_adapter(site, (0, 0), 5),
        random_adapter(site, (2, 2), 6),
        random_adapter(site, (0, 3), 7, gain=True),
    ]
    for dtype in dtypes:
        check([0, 1, 2, 3, 4, 5, 6, BASE, 2], adapters, site, dtype, device, biased=biased)


def test_prompts(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> None:
    site = SiteShape(0, 300, (96, 40))
    adapters = [random_adapter(site, (20, 3), 1), random_adapter(site, (0, 65), 2)]
    owners = [0] * 70 + [BASE] * 3 + [1] * 5 + [0] * 2
    for dtype in dtypes:
        check(owners, adapters, site, dtype, device, chunk=64)


def test_nothing_else_is_written(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> None:
    site = SiteShape(0, 40, (24, 24))
    adapters = [random_adapter(site, (3, 0), 1)]
    for dtype in dtypes:
        arena, begins = write_arena(adapters, site, dtype)
        plan = to(plan_for([BASE, 0, BASE], begins, 3, spare=1), device)
        x = torch.randn(3, 40).to(device, dtype)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "new_empty", filled_with_seven)
            h = kernels.lora_shrink(x, arena.to(device), plan, site)
        written = torch.zeros_like(h, dtype=torch.bool)
        written[:, 0, 1, :3] = True
        assert (h[written] != 7).all()
        assert (h[~written] == 7).all()
        # Rows of a wider buffer, whose other columns are not y's.
        wide = torch.full((3, 64), 7.0, device=device, dtype=dtype)
        kernels.lora_expand(h, wide[:, :48], arena.to(device), plan, site, None)
        changed = torch.zeros(3, 64, dtype=torch.bool)
        changed[1, :24] = True
        assert (wide.cpu()[~changed] == 7).all()
        assert (wide.cpu()[changed] != 7).any()


def filled_with_seven(tensor: torch.Tensor, *size: int, **options: Any) -> torch.Tensor:
    return tensor.new_full(size, 7.0, **options)


@pytest.mark.parametrize("chunk", [16, 64])
def test_a_rows_bits_do_not_depend_on_its_neighbours(
    chunk: int, device: torch.device, dtypes: tuple[torch.dtype, ...]
) -> None:
    site = SiteShape(0, 300, (80, 16))
    adapters = [random_adapter(site, (17, 3), 1), random_adapter(site, (64, 64), 2)]
    owners = [BASE, *[1] * 3, *[0] * 20]
    for dtype in dtypes:
        arena, begins = write_arena(adapters, site, dtype)
        x, y = torch.randn(len(owners), 300).to(dtype), torch.randn(len(owners), 96).to(dtype)
        plan = plan_for(owners, begins, 64, chunk)
        together = run(KERNELS, x, y, arena, plan, site, None, device)
        for row in (4, 20, 23):
            alone = plan_for([0], begins, 17, chunk)
            rows = slice(row, row + 1)
            got = run(KERNELS, x[rows], y[rows], arena, alone, site, None, device)
            assert torch.equal(got, together[rows])


@pytest.mark.gpu
def test_a_graph_follows_what_is_copied_into_its_plan() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    device, dtype, site = torch.device("cuda"), torch.bfloat16, SiteShape(0, 256, (128, 64))
    adapters = [random_adapter(site, (16, 16), 1), random_adapter(site, (8, 40), 2)]
    arena, begins = write_arena(adapters, site, dtype)
    on_device, x = arena.to(device), torch.randn(4, 256, device=device).to(dtype)
    before = torch.randn(4, 192, device=device).to(dtype)
    y = before.clone()
    plan = to(plan_for([], begins, 64, spare=4), device)

    def step() -> None:
        kernels.lora_expand(
            kernels.lora_shrink(x, on_device, plan, site), y, on_device, plan, site, None
        )

    step()  # compiles
    assert torch.equal(y, before)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for owners in ([0, 1, BASE, 0], [BASE] * 4, [1, 1, 1, 0]):
        used = {owner for owner in owners if owner != BASE}
        now = plan_for(owners, begins, 64, spare=4 - len(used))
        plan.blobs.copy_(now.blobs)
        plan.rows.copy_(now.rows)
        y.copy_(before)
        graph.replay()
        want = dense(x.cpu(), before.cpu(), owners, adapters, site, None)
        torch.testing.assert_close(y.cpu().double(), want, atol=3e-2, rtol=3e-2)
