"""Adapters applied from the arena against ``MultiLoRA``: sites alone, then whole models."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from lorax_serve.checkpoint.spec import Site, Slice
from lorax_serve.checkpoint.weights import Norm
from lorax_serve.config import EngineConfig
from lorax_serve.core import BASE, Batch, SamplingParams, Sequence
from lorax_serve.errors import Overloaded
from lorax_serve.gpu.reference import lora as reference
from lorax_serve.model.adapters.arena_lora import DECODE_CHUNK, ArenaBatch, ArenaLoRA
from lorax_serve.model.adapters.folded import FoldedAdapter, SiteLoRA
from lorax_serve.model.adapters.multi_lora import LoRABatch, MultiLoRA
from tests.fidelity.variants import VARIANTS, write_variant
from tests.model.logits_runner import LogitsRunner, load

CPU = torch.device("cpu")
IN, Q, KV = 48, 32, 16
SITES = [
    Site(IN, Q + 2 * KV, (Slice("q", 0, Q), Slice("k", Q, KV), Slice("v", Q + KV, KV))),
    Site(Q, IN, (Slice("o", 0, IN),)),
    Site(IN, 20, (Slice("head", 0, 20),)),
]
ARENA_BYTES = 1 << 20
TOLERANCE = 1e-4

MIXES = {
    "identical": [2] * 19,
    "distinct": [0, 1, 2, 3],
    "skewed": [3] * 17 + [0, 1],
    "with base": [BASE, 0, BASE, 1, 1, 4, BASE],
    "base only": [BASE] * 4,
    "none": [],
}
PROMPTS = {
    "decode": [],
    "one prompt": [(70, 3)],
    "several": [(2, BASE), (3, 1), (0, 2), (66, 0), (5, 1), (4, 4)],
}


def random_site(site: Site, ranks: tuple[int, ...], seed: int, *, more: bool = False) -> SiteLoRA:
    """LoRA of these ranks on the site's slices, 0 for none; ``more`` is a gain and a shift."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator)

    parts, first = [], 0
    for rank, part in zip(ranks, site.slices, strict=True):
        if rank:
            columns = slice(part.start, part.start + part.length)
            parts.append((slice(first, first + rank), columns, normal(rank, part.length) / rank))
            first += rank
    a = normal(first, site.in_features) / site.in_features**0.5
    extra = (normal(site.out_features) + 2, normal(site.out_features)) if more else (None, None)
    return SiteLoRA(a, tuple(parts), *extra)


def adapters() -> dict[int, FoldedAdapter]:
    qkv, o, _ = SITES
    norm = SiteLoRA(torch.empty(0, IN), norm=Norm(torch.rand(IN)))
    return {
        0: FoldedAdapter((random_site(qkv, (1, 2, 3), 0), random_site(o, (1,), 1), None)),
        1: FoldedAdapter((random_site(qkv, (0, 4, 17), 2, more=True), None, None)),
        2: FoldedAdapter((None, random_site(o, (16,), 3, more=True), None)),
        3: FoldedAdapter((random_site(qkv, (64, 0, 33), 4), random_site(o, (100,), 5), None)),
        4: FoldedAdapter((norm, None, None)),
    }


def arena_lora(capacity: int = ARENA_BYTES) -> ArenaLoRA:
    return ArenaLoRA(SITES, torch.float32, CPU, reference, capacity)


def filled() -> tuple[ArenaLoRA, MultiLoRA]:
    ours, theirs = arena_lora(), MultiLoRA(SITES, CPU)
    for slot, folded in adapters().items():
        ours.put(slot, ours.prepare(folded))
        theirs.put(slot, theirs.prepare(folded))
    return ours, theirs


def same_at_all_sites(ours: ArenaBatch, theirs: LoRABatch, total: int) -> None:
    for index, site in enumerate(SITES[:-1]):
        x, y = torch.randn(total, site.in_features), torch.randn(total, site.out_features)
        bias = torch.randn(site.out_features)
        want, got = y.clone(), y.clone()
        theirs.add(index, x, want, bias)
        ours.add(index, x, got, bias)
        torch.testing.assert_close(got, want, atol=TOLERANCE, rtol=TOLERANCE)
        untouched = (want == y).all(1)
        assert torch.equal(got[untouched], y[untouched])


@pytest.mark.parametrize("prompts", PROMPTS)
@pytest.mark.parametrize("mix", MIXES)
def test_batch_equals_the_torch_decoders(mix: str, prompts: str) -> None:
    ours, theirs = filled()
    slots, end = MIXES[mix], len(MIXES[mix])
    chunks = []
    for length, slot in PROMPTS[prompts]:
        chunks.append((end, end + length, slot))
        end += length
    got, want = ours.batch(slots, chunks), theirs.batch(slots, chunks)
    if want is None:
        assert got is None
        return
    assert got is not None
    same_at_all_sites(got, want, end)
    assert got.plain == (4 not in slots and (4, 4) not in PROMPTS[prompts])


def test_a_batch_is_kept_until_a_slot_changes() -> None:
    ours, _ = filled()
    first = ours.batch([0, 1], [])
    assert ours.batch([0, 1], []) is first
    assert ours.batch([0, BASE], []) is not first
    assert ours.batch([BASE], []) is None
    kept = ours.batch([0, 1], [])
    ours.clear(3)
    assert ours.batch([0, 1], []) is not kept


def test_slots_that_come_and_go_in_a_narrow_arena() -> None:
    """Loads that move others' blobs, and one that is refused."""
    ours, theirs = arena_lora(60_000), MultiLoRA(SITES, CPU)
    choose, held, refused = random.Random(1), set[int](), 0
    for step in range(60):
        slot, ranks = choose.randrange(12), (choose.randint(1, 40), 0, choose.randint(1, 9))
        folded = FoldedAdapter((random_site(SITES[0], ranks, step), None, None))
        try:
            ours.put(slot, ours.prepare(folded))
            theirs.put(slot, theirs.prepare(folded))
            held.add(slot)
        except Overloaded:
            refused += 1
            theirs.clear(slot)
            held.discard(slot)
            for leaving in choose.sample(sorted(held), 2):
                ours.clear(leaving)
                theirs.clear(leaving)
                held.discard(leaving)
        slots = [*choose.choices(sorted(held), k=5), BASE]
        got, want = ours.batch(slots, []), theirs.batch(slots, [])
        assert got is not None
        assert want is not None
        same_at_all_sites(got, want, len(slots))
    assert 5 < refused < 30


def test_a_plan_of_fixed_size_is_filled_in_place() -> None:
    ours, theirs = filled()
    batch = ours.static_batch(20, 20, 100)
    plan = batch.planned[0].plan
    where = plan.blobs.data_ptr(), plan.rows.data_ptr()
    assert plan.max_rank == 128
    for slots in ([0, 1, BASE, 3], [2] * 20, [BASE] * 20, [3]):
        ours.fill(batch, slots)
        assert (plan.blobs.data_ptr(), plan.rows.data_ptr()) == where
        want = theirs.batch([*slots, *[BASE] * (20 - len(slots))], [])
        if want is None:
            assert (plan.blobs == -1).all()
        else:
            same_at_all_sites(batch, want, 20)
    with pytest.raises(AssertionError):
        ours.fill(ours.static_batch(4, 1, 100), [0, 1])
    with pytest.raises(AssertionError):
        ours.fill(ours.static_batch(4, 4, 64), [3])


def test_plan_arrays_have_as_many_chunks_as_needed() -> None:
    ours, _ = filled()
    blobs, rows = ours.plan_arrays([3, BASE, *[0] * 17, 4])
    assert [len(own) for own in rows] == [DECODE_CHUNK] * 3
    assert rows[0] == [0, *[-1] * 15]
    assert [row for own in rows[1:] for row in own if row >= 0] == list(range(2, 19))
    assert blobs[0] != blobs[1] == blobs[2]
    assert (ours.max_rank([3, BASE, 0]), ours.max_rank([0]), ours.max_rank([BASE])) == (100, 3, 0)
    assert ours.plain([0, 1, 2, 3, BASE])
    assert not ours.plain([0, 4])


KINDS = (
    "patterns",
    "dora",
    "bias all, dora",
    "lora_bias on lm_head",
    "embedding, dora",
    "modules_to_save embedding and norms, dora",
    "modules_to_save lm_head",
    "modules_to_save norms",
    "trainable_token_indices",
)


# What PEFT says of the adapters that it writes.
@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize(("base", "kind"), [("tiny_model", "llama"), ("tiny_gpt2", "gpt2")])
def test_whole_models(base: str, kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Prompts and decoding steps of everything that an adapter can be, in one batch."""
    model = request.getfixturevalue(base)
    config = EngineConfig(
        model=str(model), dtype="float32", kernels="torch", max_batch_size=len(KINDS) + 1
    )
    theirs, ours = LogitsRunner(config), LogitsRunner(config)
    decoder = ours._decoder
    sites = [*decoder.spec.sites(), decoder.spec.output_site()]
    slots = ArenaLoRA(sites, torch.float32, CPU, reference, 1 << 24)
    decoder.lora = slots
    for slot, name in enumerate(KINDS):
        write_variant(VARIANTS[name], model, kind, tmp_path / str(slot), slot)
        for runner in (theirs, ours):
            load(runner, slot, tmp_path / str(slot))
    assert not slots.plain(range(len(KINDS)))
    assert slots.plain([0, 1])
    runs = []
    for runner in (theirs, ours):
        generator = torch.Generator().manual_seed(0)
        sequences: list[Sequence] = []
        for slot in (*range(len(KINDS)), BASE):
            prompt = torch.randint(3, 100, (4 + 3 * slot,), generator=generator).tolist()
            version = None if slot == BASE else slot
            sequences.append(
                Sequence(
                    slot, prompt, len(prompt), version, SamplingParams(), 99, 0, frozenset(),
                    kv_slot=len(sequences), adapter_slot=slot,
                )
            )  # fmt: skip
        first, others = sequences[:6], sequences[6:]
        runner.step(Batch(prefills=[(s, len(s.tokens)) for s in first]))
        seen = [dict(runner.logits)]
        runner.step(Batch(decodes=first, prefills=[(s, len(s.tokens)) for s in others]))
        seen.append(dict(runner.logits))
        for _ in range(3):
            runner.step(Batch(decodes=sequences))
            seen.append(dict(runner.logits))
        runs.append(seen)
    for got, want in zip(runs[1], runs[0], strict=True):
        assert got.keys() == want.keys()
        for request_id, logits in want.items():
            torch.testing.assert_close(got[request_id], logits, atol=TOLERANCE, rtol=TOLERANCE)
