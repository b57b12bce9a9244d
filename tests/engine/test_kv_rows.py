"""Rows, blocks and cached prefixes, without a scheduler; and the memory that follows them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorax_serve.core import CacheKey, RowCopy, Sequence
from lorax_serve.engine.kv_rows import BLOCK, KVRows
from lorax_serve.engine.prefix_cache import PrefixIndex
from lorax_serve.model.decoders.kv_cache import KVCache, affordable_tokens
from tests.engine.simulation import Simulation, sequence

TEXT = list(range(500))


def run_through(rows: KVRows, chosen: Sequence, *, keep: bool = True) -> int:
    """Take, compute and release; returns how many tokens were found."""
    rows.take(chosen)
    hit = chosen.computed
    chosen.computed = len(chosen.tokens)
    rows.release(chosen, keep=keep)
    assert rows.problems([]) == []
    return hit


def test_a_prefix_is_found_to_its_last_token() -> None:
    rows = KVRows(4, 100)
    assert run_through(rows, sequence(1, [*TEXT[:300], -1])) == 0
    assert run_through(rows, sequence(2, [*TEXT[:300], -2])) == 300
    assert (rows.queries, rows.hits) == (602, 300)


def test_the_last_token_is_always_computed() -> None:
    rows = KVRows(4, 100)
    run_through(rows, sequence(1, TEXT[:64]))
    assert run_through(rows, sequence(2, TEXT[:64])) == 63


def test_another_adapter_never_hits() -> None:
    rows = KVRows(8, 100)
    run_through(rows, sequence(1, TEXT[:100], adapter=1))
    assert run_through(rows, sequence(2, TEXT[:100], adapter=2)) == 0
    assert run_through(rows, sequence(3, TEXT[:100])) == 0
    assert run_through(rows, sequence(4, TEXT[:100], adapter=1)) == 99


def test_the_key_is_the_content_not_the_version() -> None:
    rows = KVRows(8, 100)
    run_through(rows, sequence(1, TEXT[:100], adapter=1))
    again = sequence(2, TEXT[:100], adapter=7)
    again.cache_key = CacheKey("digest of 1")
    assert run_through(rows, again) == 99


def test_a_running_sequence_s_prefix_is_found() -> None:
    simulation = Simulation(2, 512, 1)
    simulation.add(TEXT[:200], new=50)
    simulation.step()
    simulation.step()
    second = simulation.add(TEXT[:150], new=5)
    batch = simulation.step()
    assert batch.copies == [RowCopy(0, second.kv_slot, 149)]
    simulation.run()


def test_a_conversation_goes_on_in_its_row() -> None:
    rows = KVRows(4, 100)
    run_through(rows, sequence(1, TEXT[:100]))
    rows.take_copies()
    second = sequence(2, TEXT[:150])
    rows.take(second)
    assert (second.kv_slot, second.computed, rows.take_copies()) == (0, 100, [])


def test_failed_sequences_are_not_kept() -> None:
    rows = KVRows(4, 100)
    run_through(rows, sequence(1, TEXT[:100]), keep=False)
    assert rows.cached_tokens == 0
    assert rows.take_copies() == [RowCopy(0, 0, 0)]
    assert run_through(rows, sequence(2, TEXT[:100])) == 0


def test_the_least_recently_used_prefix_goes_first() -> None:
    rows = KVRows(3, 100)
    for n in range(3):
        run_through(rows, sequence(n, [-n] * 40 + TEXT[:10]))
    assert run_through(rows, sequence(3, [0] * 40 + TEXT[:5])) == 44  # 0 is in use again
    assert run_through(rows, sequence(4, [-1] * 40)) == 0
    assert run_through(rows, sequence(5, [0] * 40)) == 39


def test_without_prefix_caching_nothing_is_kept() -> None:
    rows = KVRows(4, 100, prefix_caching=False)
    run_through(rows, sequence(1, TEXT[:100]))
    assert (rows.cached_tokens, run_through(rows, sequence(2, TEXT[:100]))) == (0, 0)


def test_a_hash_that_lies_gives_no_hit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PrefixIndex, "_hash", lambda self, before, key, tokens, block: block)
    rows = KVRows(8, 100)
    run_through(rows, sequence(1, TEXT[:100], adapter=1))
    assert run_through(rows, sequence(2, TEXT[:100], adapter=2)) == 0
    assert run_through(rows, sequence(3, TEXT[1:101], adapter=1)) == 0
    assert run_through(rows, sequence(4, TEXT[:40] + TEXT[:60], adapter=1)) == 40


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    prompts=st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 200), st.integers(1, 20), st.integers(0, 2)),
        max_size=40,
    )
)
def test_hits_are_what_a_plain_search_finds(prompts: list[tuple[int, int, int, int]]) -> None:
    rows = KVRows(50, 1000)
    kept: list[Sequence] = []
    for n, (family, shared, own, adapter) in enumerate(prompts):
        tokens = [family * 1000 + i for i in range(shared)] + [-n - 1] * own
        chosen = sequence(n, tokens, adapter=adapter or None)
        most = 0
        for other in kept:
            same = 0
            while same < min(len(tokens) - 1, len(other.tokens)):
                if tokens[same] != other.tokens[same]:
                    break
                same += 1
            if other.cache_key == chosen.cache_key and same >= BLOCK:
                most = max(most, same)
        hit = run_through(rows, chosen)
        # Of many rows with one block, the last few are looked at: less than a block is lost.
        assert most - BLOCK < hit <= most
        kept.append(chosen)


def cache_of(slots: int, max_length: int = 256, head_dim: int = 16) -> KVCache:
    return KVCache(2, slots, 3, max_length, head_dim, torch.float32, torch.device("cpu"))


def resident_kib() -> int:
    with open("/proc/self/smaps_rollup") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("Rss"))


def test_copies_are_exact_and_leave_the_rest_alone() -> None:
    cache = cache_of(3)
    for layer in (*cache.keys, *cache.values):
        layer.copy_(torch.randn(layer.shape))
    before = [layer.clone() for layer in (*cache.keys, *cache.values)]
    cache.copy([RowCopy(0, 2, 100)])
    for layer, old in zip((*cache.keys, *cache.values), before, strict=True):
        assert torch.equal(layer[2, :, :100], old[0, :, :100])
        assert torch.equal(layer[2, :, 100:], old[2, :, 100:])
        assert torch.equal(layer[:2], old[:2])


@pytest.mark.parametrize("length", [0, 1, 100, 256, 300])
@pytest.mark.parametrize("max_length", [256, 250])
def test_freeing_keeps_the_beginning_and_other_rows(length: int, max_length: int) -> None:
    cache = cache_of(3, max_length, 64)
    for layer in (*cache.keys, *cache.values):
        layer.fill_(1.5)
    cache.copy([RowCopy(1, 1, length)])
    for layer in (*cache.keys, *cache.values):
        assert (layer[0] == 1.5).all()
        assert (layer[2] == 1.5).all()
        assert (layer[1, :, :length] == 1.5).all()
        freed = layer[1, :, length:]
        assert ((freed == 0) | (freed == 1.5)).all()
        assert length or (freed == 0).all()
        assert length >= 100 or (freed == 0).float().mean() > 0.9 - length / max_length


def test_freed_memory_goes_back_to_the_system() -> None:
    cache = cache_of(4, 4096, 64)
    for layer in (*cache.keys, *cache.values):
        layer[2].fill_(1.0)
    full = resident_kib()
    cache.copy([RowCopy(2, 2, 0)])
    assert full - resident_kib() > 0.9 * cache.bytes_per_token * 4096 / 1024


def test_a_third_of_the_free_memory() -> None:
    assert 0 < affordable_tokens(1 << 20) < (1 << 40) // 3
