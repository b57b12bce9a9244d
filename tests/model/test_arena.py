"""The arena: who has which memory, what moves, and an adapter's way into it and back."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorax_serve.checkpoint.spec import Site, Slice
from lorax_serve.checkpoint.weights import Norm
from lorax_serve.errors import Overloaded
from lorax_serve.gpu.lora import A_OFFSETS, ALIGNMENT, B_OFFSETS, GAIN, HEADER, RANKS, SHIFT
from lorax_serve.model.adapters import arena as arena_module
from lorax_serve.model.adapters.arena import Arena, ArenaAdapter
from lorax_serve.model.adapters.extents import Extent, Extents
from lorax_serve.model.adapters.folded import EmbeddingChange, FoldedAdapter, OutputChange, SiteLoRA
from lorax_serve.model.copies import HostCopies, to_device

CPU = torch.device("cpu")
PER = ALIGNMENT // 4
"""Float32 elements of one aligned piece."""

SITES = [
    Site(24, 32, (Slice("q", 0, 16), Slice("k", 16, 8), Slice("v", 24, 8)), norm_path="norm"),
    Site(16, 24, (Slice("o", 0, 24),)),
    Site(24, 20, (Slice("head", 0, 20),)),
]


def test_holes_are_joined_and_the_smallest_that_fits_is_taken() -> None:
    extents = Extents(100)
    for owner, size in enumerate((10, 20, 30, 15)):
        extents.take(owner, size)
    assert extents.take(9, 26) is None
    extents.release(1)
    extents.release(2)
    assert extents.take(4, 24) == Extent(75, 24)
    assert extents.take(5, 50) == Extent(10, 50)
    assert extents.used == 99


def test_compaction_ends_when_there_is_room() -> None:
    extents = Extents(60)
    for owner in range(6):
        extents.take(owner, 10)
    for owner in (0, 2, 4):
        extents.release(owner)
    moves = extents.compact(20)
    assert moves == [(10, 0, 10)]
    assert extents.take(7, 20) == Extent(10, 20)


@settings(max_examples=150, deadline=None)
@given(
    capacity=st.integers(1, 40),
    # The size of what comes, or which of those there is to leave.
    events=st.lists(st.tuples(st.booleans(), st.integers(0, 1000)), max_size=30),
)
def test_extents_against_a_model(capacity: int, events: list[tuple[bool, int]]) -> None:
    """Owners keep what is theirs through takes, releases and moves made one after the other."""
    extents, memory = Extents(capacity), [-1] * capacity
    sizes: dict[int, int] = {}
    for owner, (leaves, number) in enumerate(events):
        if sizes and leaves:
            leaving = sorted(sizes)[number % len(sizes)]
            extents.release(leaving)
            del sizes[leaving]
            continue
        size = 1 + number % capacity
        extent = extents.take(owner, size)
        free = capacity - sum(sizes.values())
        if extent is None and size <= free:
            for move in extents.compact(size):
                assert move.to < move.begin
                moved = memory[move.begin : move.begin + move.size]
                memory[move.to : move.to + move.size] = moved
            extent = extents.take(owner, size)
        assert (extent is not None) == (size <= free)
        if extent is not None:
            sizes[owner] = size
            memory[extent.begin : extent.begin + size] = [owner] * size
        assert extents.used == sum(sizes.values())
        for each, its in sizes.items():
            begin, length = extents[each]
            assert length == its
            assert memory[begin : begin + its] == [each] * its


@pytest.mark.parametrize("move_bytes", [ALIGNMENT, 1 << 25])
def test_blobs_survive_all_moves(move_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena_module, "_MOVE_BYTES", move_bytes)
    arena, choose = Arena(64 * ALIGNMENT, torch.float32, CPU), random.Random(0)
    address, held = arena.weights.data_ptr(), {}
    refused = 0
    for slot in range(300):
        blob = torch.randn(PER * choose.randint(1, 20))
        try:
            arena.copies.wait(arena.load(slot, blob))
            held[slot] = blob
        except Overloaded:
            refused += 1
            for leaving in choose.sample(sorted(held), 2):
                arena.free(leaving)
                del held[leaving]
        for each, want in held.items():
            begin = arena.begin(each)
            assert begin % PER == 0
            assert torch.equal(arena.weights[begin : begin + len(want)], want)
    assert 20 < refused < 200
    assert arena.weights.data_ptr() == address


def test_a_full_arena_says_what_to_raise() -> None:
    arena = Arena(3 * ALIGNMENT + 5, torch.float32, CPU)
    arena.load(0, torch.zeros(2 * PER))
    with pytest.raises(Overloaded, match=r"256 bytes .* 128 of the 384 .*max-device-adapter-bytes"):
        arena.load(1, torch.zeros(2 * PER))
    arena.free(0)
    arena.free(7)
    arena.load(1, torch.zeros(3 * PER))


def adapter(dtype: torch.dtype = torch.float32) -> FoldedAdapter:
    """LoRA on q and v, and on o, with everything else there is."""
    torch.manual_seed(0)
    q, v = torch.randn(3, 16, dtype=dtype), torch.randn(5, 8, dtype=dtype)
    parts = ((slice(0, 3), slice(0, 16), q), (slice(3, 8), slice(24, 32), v))
    norm = Norm(torch.randn(24, dtype=dtype))
    o = SiteLoRA(
        torch.empty(0, 16, dtype=dtype), (), torch.randn(24), torch.randn(24)
    )  # a trained bias
    head = SiteLoRA(torch.randn(2, 24, dtype=dtype), ((slice(0, 2), slice(0, 20), q),))
    return FoldedAdapter(
        (SiteLoRA(torch.randn(8, 24, dtype=dtype), parts, norm=norm), o, head),
        EmbeddingChange(table=torch.randn(20, 24, dtype=dtype)),
        OutputChange(weight=torch.randn(20, 24, dtype=dtype)),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_blob_has_what_was_packed(dtype: torch.dtype) -> None:
    folded = adapter(dtype)
    packed = ArenaAdapter.pack(folded, SITES, dtype, pinned=False)
    blob = packed.blob
    header = blob.view(torch.int32)[: 2 * HEADER].view(2, HEADER)
    assert header[0, RANKS:A_OFFSETS].tolist() == [3, 0, 5]
    assert header[1, RANKS:A_OFFSETS].tolist() == [0, 0, 0]
    assert packed.max_rank == 5
    assert packed.sites == {0, 1}
    lora = folded.sites[0]
    assert lora is not None
    for which, (rows, _, b) in zip((0, 2), lora.parts, strict=True):
        for offsets, tensor in ((A_OFFSETS, lora.a[rows]), (B_OFFSETS, b)):
            at = int(header[0, offsets + which])
            assert at * dtype.itemsize % ALIGNMENT == 0
            assert torch.equal(blob[at : at + tensor.numel()], tensor.flatten())
    assert header[0, [GAIN, SHIFT]].tolist() == [0, 0]
    o = folded.sites[1]
    assert o is not None
    for number, vector in ((GAIN, o.gain), (SHIFT, o.shift)):
        assert vector is not None
        at = int(header[1, number]) * dtype.itemsize // 4
        assert torch.equal(blob.view(torch.float32)[at : at + 24], vector)


def test_what_the_kernels_do_not_do_stays_beside_the_blob() -> None:
    folded = adapter()
    packed = ArenaAdapter.pack(folded, SITES, torch.float32, pinned=False)
    rest, lora = packed.rest, folded.sites[0]
    assert rest is not None
    assert rest.sites[0] is not None
    assert lora is not None
    assert rest.sites[0].norm is lora.norm
    assert rest.sites[1] is None
    assert rest.sites[2] is folded.sites[2]
    assert (rest.embedding, rest.output) == (folded.embedding, folded.output)
    assert packed.nbytes == packed.blob.nbytes + rest.nbytes
    assert packed.blob.nbytes % ALIGNMENT == 0
    # Four matrices and two vectors, and the header, each with less than one alignment to fill.
    assert folded.nbytes <= packed.nbytes < folded.nbytes + 2 * HEADER * 4 + 7 * ALIGNMENT


def test_an_adapter_of_other_kinds_alone_has_no_blob() -> None:
    norm = SiteLoRA(torch.empty(0, 24), norm=Norm(torch.ones(24)))
    packed = ArenaAdapter.pack(
        FoldedAdapter((norm, None, None)), SITES, torch.float32, pinned=False
    )
    assert len(packed.blob) == packed.max_rank == len(packed.sites) == 0
    assert packed.nbytes == 24 * 4


def test_copies_on_a_cpu_are_made_at_once() -> None:
    copies, target, source = HostCopies(CPU), torch.zeros(4), torch.arange(4.0)
    copies.freed()
    copied = copies.start(target, source)
    assert torch.equal(target, source)
    copies.wait(copied)
    copies.wait_for_all()
    assert to_device(source, CPU) is source


@pytest.mark.gpu
def test_copies_beside_a_long_step_wait_for_what_they_must() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    device, size = torch.device("cuda"), 1 << 22
    copies = HostCopies(device)
    memory, seen = torch.ones(size, device=device), torch.zeros(2, device=device)
    source = torch.full((size,), 2.0).pin_memory()
    _sleep(100_000_000)
    seen[0] = memory.sum()  # a step that uses what is freed then
    copies.freed()
    copied = copies.start(memory, source)
    copies.wait(copied)
    seen[1] = memory.sum()
    assert seen.tolist() == [size, 2 * size]
    # Free memory is copied to while a step computes that was queued before it was asked for.
    copies.freed()
    _sleep(1_000_000_000)
    beside = copies.start(memory, source.fill_(3.0))
    assert beside is not None
    beside.synchronize()
    assert not torch.cuda.current_stream().query()
    torch.cuda.synchronize()


def _sleep(cycles: int) -> None:
    torch.cuda._sleep(cycles)  # type: ignore[no-untyped-call]
