"""Pages behind the rows that the engine counts: contents, sharing, and that the pool suffices."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorax_serve.core import Batch, RowCopy, Sequence
from lorax_serve.engine.kv_rows import BLOCK, KVRows
from lorax_serve.gpu.pages import PAGE
from lorax_serve.model.decoders.kv_cache import KVCache
from lorax_serve.model.decoders.paged_cache import PagedKVCache, bytes_per_token
from tests.engine.simulation import Simulation, cell, sequence

CPU = torch.device("cpu")
POISON = -7


def cache_of(slots: int, pages: int, max_length: int = 256) -> PagedKVCache:
    """Two layers of one integer a position, so that contents are compared exactly."""
    cache = PagedKVCache(2, slots, 1, max_length, 1, torch.int64, CPU, pages)
    cache._storage.fill_(POISON)
    return cache


def write(cache: PagedKVCache, slot: int, begin: int, numbers: list[int]) -> None:
    """What a step does after ``flush``: through the device's table, in all layers."""
    for index in range(2):
        layer = cache.layer(index)
        for position, number in enumerate(numbers, begin):
            page = int(layer.table[slot, position // PAGE])
            assert page >= 0
            layer.keys[page, 0, position % PAGE] = number
            layer.values[page, 0, position % PAGE] = ~number


def read(cache: PagedKVCache, slot: int, length: int) -> list[int]:
    """A row's first positions, the same in all layers."""
    found = []
    for index in range(2):
        keys, values = cache.layer(index).gather(slot, length)
        assert torch.equal(values, ~keys)
        found.append(keys.flatten().tolist())
    assert found[0] == found[1]
    return found[0]


def put(cache: PagedKVCache, slot: int, begin: int, numbers: list[int]) -> None:
    cache.reserve(slot, begin, begin + len(numbers))
    cache.flush()
    write(cache, slot, begin, numbers)


def check(cache: PagedKVCache) -> None:
    """The accounting; and that the device's table is the host's."""
    held = [page for row in cache._rows for page in row]
    assert [held.count(page) for page in range(len(cache._references))] == cache._references
    assert sorted([*cache._free, *set(held)]) == list(range(len(cache._references)))
    if not cache._entries:
        for row, entries in zip(cache._rows, cache.table.tolist(), strict=True):
            assert entries == row + [-1] * (len(entries) - len(row))


def numbers_of(seed: int, count: int) -> list[int]:
    return [seed * 1000 + n for n in range(count)]


def test_pages_come_as_positions_are_used() -> None:
    cache = cache_of(2, 8)
    assert cache.free_pages == 8
    put(cache, 1, 0, numbers_of(1, 40))
    assert cache.free_pages == 6
    put(cache, 1, 40, numbers_of(2, 24))
    assert cache.free_pages == 6
    put(cache, 1, 64, [5])
    assert cache.free_pages == 5
    assert read(cache, 1, 65) == [*numbers_of(1, 40), *numbers_of(2, 24), 5]
    check(cache)


def test_what_a_page_holds_no_more_is_freed() -> None:
    cache = cache_of(1, 8)
    put(cache, 0, 0, numbers_of(1, 200))
    cache.copy([RowCopy(0, 0, 65)])
    cache.flush()
    assert cache.free_pages == 5
    assert read(cache, 0, 65) == numbers_of(1, 65)
    cache.free(0, 300)
    assert cache.free_pages == 5
    cache.copy([RowCopy(0, 0, 0)])
    cache.flush()
    assert cache.free_pages == 8
    check(cache)


@pytest.mark.parametrize("length", [1, 32, 33, 64, 100])
def test_a_prefix_is_shared_but_for_its_last_part(length: int) -> None:
    cache = cache_of(2, 8)
    put(cache, 0, 0, numbers_of(1, 100))
    cache.copy([RowCopy(0, 1, length)])
    assert cache.free_pages == 4 - bool(length % PAGE)
    put(cache, 1, length, numbers_of(2, 5))
    put(cache, 0, 100, numbers_of(3, 5))
    assert read(cache, 1, length + 5) == numbers_of(1, length) + numbers_of(2, 5)
    assert read(cache, 0, 105) == numbers_of(1, 100) + numbers_of(3, 5)
    cache.copy([RowCopy(0, 0, 0)])
    cache.flush()
    assert read(cache, 1, length + 5) == numbers_of(1, length) + numbers_of(2, 5)
    check(cache)


@pytest.mark.parametrize("begin", [0, 10, 32, 40, 64, 95])
def test_who_writes_into_a_shared_page_gets_its_own(begin: int) -> None:
    cache = cache_of(2, 8)
    put(cache, 0, 0, numbers_of(1, 100))
    cache.copy([RowCopy(0, 1, 96)])
    put(cache, 0, begin, numbers_of(2, 40))
    assert read(cache, 0, begin + 40) == numbers_of(1, begin) + numbers_of(2, 40)
    assert read(cache, 1, 96) == numbers_of(1, 96)
    check(cache)


def test_copies_of_copies_before_one_step() -> None:
    cache = cache_of(4, 10)
    put(cache, 0, 0, numbers_of(1, 60))
    put(cache, 3, 0, numbers_of(3, 40))
    # The page of 0 that 1 needs a part of is freed, and is to be filled from 3, before 2 needs it
    # for want of what 1 does not have yet.
    copies = [RowCopy(0, 1, 50), RowCopy(0, 0, 0), RowCopy(3, 0, 39), RowCopy(1, 2, 45)]
    cache.copy([*copies, RowCopy(1, 1, 0)])
    cache.flush()
    assert read(cache, 2, 45) == numbers_of(1, 45)
    assert read(cache, 0, 39) == numbers_of(3, 39)
    assert read(cache, 3, 40) == numbers_of(3, 40)
    check(cache)


def test_a_row_is_replaced_by_a_prefix_of_another() -> None:
    cache = cache_of(2, 6)
    put(cache, 0, 0, numbers_of(1, 70))
    put(cache, 1, 0, numbers_of(2, 90))
    cache.copy([RowCopy(0, 1, 40)])
    cache.flush()
    assert read(cache, 1, 40) == numbers_of(1, 40)
    assert cache.free_pages == 2
    check(cache)


def test_nothing_to_do_moves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = cache_of(2, 6)
    put(cache, 0, 0, numbers_of(1, 33))
    monkeypatch.setattr(torch, "tensor", None)
    cache.reserve(0, 33, 34)
    cache.flush()


def test_a_step_that_failed_before_it_moved_anything() -> None:
    cache = cache_of(3, 6)
    put(cache, 0, 0, numbers_of(1, 40))
    cache.copy([RowCopy(0, 1, 39)])
    cache.copy([RowCopy(1, 1, 0), RowCopy(0, 2, 38)])
    put(cache, 2, 38, numbers_of(2, 1))
    assert read(cache, 2, 39) == numbers_of(1, 38) + numbers_of(2, 1)
    check(cache)


def test_what_cannot_be() -> None:
    cache = cache_of(2, 2, max_length=100)
    with pytest.raises(ValueError, match="ends at 100"):
        cache.reserve(0, 90, 101)
    with pytest.raises(RuntimeError, match="no free page"):
        cache.reserve(0, 0, 65)
    check(cache)


def test_sizes() -> None:
    cache = PagedKVCache(3, 2, 5, 100, 16, torch.bfloat16, CPU, 7)
    plain = KVCache(3, 2, 5, 100, 16, torch.bfloat16, CPU)
    assert (
        cache.bytes_per_token
        == plain.bytes_per_token
        == bytes_per_token(3, 5, 16, plain.keys[0].dtype)
    )
    assert cache.nbytes == 7 * PAGE * cache.bytes_per_token + cache.table.nbytes
    assert cache.table.shape == (2, 4)
    layer = cache.layer(2)
    assert layer.keys.shape == layer.values.shape == (7, 5, PAGE, 16)
    assert layer.keys.is_contiguous()
    assert layer.table is cache.table
    assert PAGE == BLOCK


def test_a_cached_prefix_goes_on_from_its_middle() -> None:
    """In its own row, there being no other, while a running sequence has its pages too."""
    rows, cache = KVRows(2, 20), cache_of(2, 20)
    text = numbers_of(1, 100)
    first, second = sequence(1, text), sequence(2, [*text[:97], -2])
    third = sequence(3, [*text[:40], *numbers_of(3, 50)])
    for chosen, hit in ((first, 0), (second, 97), (third, 40)):
        rows.take(chosen)
        assert chosen.computed == hit
        cache.copy(rows.take_copies())
        put(cache, chosen.kv_slot, hit, chosen.tokens[hit:])
        chosen.computed = len(chosen.tokens)
        rows.commit(chosen)
        if chosen is second:
            rows.release(second, keep=True)
    assert (first.kv_slot, third.kv_slot) == (0, 1)
    assert read(cache, 0, 100) == first.tokens
    assert read(cache, 1, 90) == third.tokens
    assert cache._rows[0][0] == cache._rows[1][0]
    assert cache._rows[0][1] != cache._rows[1][1]
    check(cache)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_device_far_behind_the_host() -> None:
    """Each step's changes reach it in their turn, though nobody waits."""
    cache = PagedKVCache(2, 3, 1, 2048, 1, torch.int64, torch.device("cuda"), 140)
    cache._storage.zero_()
    seen, expected = [], []
    torch.cuda._sleep(200_000_000)  # type: ignore[no-untyped-call]
    for n in range(60):
        cache.reserve(0, n * PAGE, (n + 1) * PAGE)
        cache.flush()
        cache.layer(1).keys[:, :, 3] += cache.table[0, n]
        cache.copy([RowCopy(0, 1, n * PAGE + 5)])
        cache.flush()
        seen.append((cache.table.clone(), cache.layer(1).gather(1, n * PAGE + 4)[0]))
        expected.append([list(row) for row in cache._rows])
    for (table, keys), rows in zip(seen, expected, strict=True):
        for entries, row in zip(table.tolist(), rows, strict=True):
            assert entries == row + [-1] * (len(entries) - len(row))
        assert keys[0, -1].item() >= rows[0][-1]
    check(cache)


class Rows:
    """``KVRows`` and its pages, driven at random; every position's content is known."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        rows = self.random.randint(1, 6)
        blocks = self.random.randint(8, 30)
        self.kv = KVRows(rows, blocks)
        self.cache = cache_of(rows, blocks)
        self.running: list[Sequence] = []
        self.texts: list[list[int]] = [[]]
        self.started = 0

    def text(self) -> list[int]:
        """A new one, or an old one's beginning, cut anywhere, that goes on otherwise."""
        old = self.random.choice(self.texts)
        cut = self.random.choice([len(old), self.random.randint(0, len(old))])
        self.started += 1
        text = (old[:cut] + numbers_of(self.started, self.random.randint(1, 60)))[:130]
        self.texts = [*self.texts[-4:], text]
        return text

    def step(self) -> None:
        """One of the engine, as the scheduler orders it."""
        for chosen in list(self.running):
            if self.random.random() < 0.15:
                self.release(chosen, keep=self.random.random() < 0.9)
        for chosen in self.running:
            self.kv.commit(chosen)
        for chosen in list(self.running):
            while chosen in self.running and not self.kv.reserve(chosen):
                self.release(self.running[-1], keep=False)
        while self.random.random() < 0.6:
            chosen = sequence(self.started, self.text())
            if not self.kv.fits(chosen):
                break
            self.kv.take(chosen)
            self.running.append(chosen)
        self.cache.copy(self.kv.take_copies())
        for pages, taken in zip(self.cache._rows, self.kv._taken, strict=True):
            assert len(pages) <= taken
        work = []
        for chosen in self.running:
            if self.random.random() < 0.8:
                count = self.random.randint(1, min(60, len(chosen.tokens) - chosen.computed))
                self.cache.reserve(chosen.kv_slot, chosen.computed, chosen.computed + count)
                work.append((chosen, count))
        check(self.cache)
        self.cache.flush()
        check(self.cache)
        self.compare()
        if self.random.random() < 0.03:  # the step fails
            for chosen, _ in work:
                self.release(chosen, keep=False)
            self.kv.forget()
            return
        self.cache._storage[:, :, self.cache._free] = POISON
        for chosen, count in work:
            begin = chosen.computed
            write(self.cache, chosen.kv_slot, begin, chosen.tokens[begin : begin + count])
            chosen.computed += count
        self.compare()
        for chosen, _ in work:
            if chosen.computed == len(chosen.tokens):
                chosen.tokens.append(self.random.randint(0, 5))
                if len(chosen.tokens) > 160:
                    self.release(chosen, keep=True)

    def release(self, chosen: Sequence, *, keep: bool) -> None:
        self.running.remove(chosen)
        self.kv.release(chosen, keep=keep)

    def compare(self) -> None:
        """All that running sequences and cached prefixes have, position by position."""
        held = [(s.kv_slot, s.tokens, s.computed) for s in self.running]
        for row, idle in self.kv._idle.items():
            held.append((row, self.kv._index._entries[row].tokens, idle.length))
        for row, tokens, length in held:
            assert read(self.cache, row, length) == tokens[:length]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1 << 32))
def test_rows_at_random(seed: int) -> None:
    rows = Rows(seed)
    for _ in range(30):
        rows.step()
        assert rows.kv.problems(rows.running) == []


class PagedSimulation(Simulation):
    """The scheduler's own order of things, with pages instead of rows."""

    def __init__(self, rows: int, budget: int, *, spare_rows: int, blocks: int) -> None:
        super().__init__(rows, budget, 2, spare_rows=spare_rows, blocks=blocks)
        self.cache = cache_of(rows + spare_rows, blocks, 1024)

    def move(self, batch: Batch) -> None:
        super().move(batch)
        self.cache.copy(batch.copies)
        for chosen, length in [*((s, 1) for s in batch.decodes), *batch.prefills]:
            self.cache.reserve(chosen.kv_slot, chosen.computed, chosen.computed + length)
        self.cache.flush()
        self.cache._storage[:, :, self.cache._free] = POISON
        check(self.cache)

    def compute(self, chosen: Sequence, length: int) -> None:
        begin = chosen.computed
        super().compute(chosen, length)
        numbers = [cell(chosen, n) for n in range(begin, begin + length)]
        write(self.cache, chosen.kv_slot, begin, numbers)

    def check(self, batch: Batch) -> None:
        super().check(batch)
        for s in self.running.values():
            assert read(self.cache, s.kv_slot, s.computed) == self.cells[s.kv_slot][: s.computed]


@settings(max_examples=15, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1 << 32))
def test_a_scheduler_at_random(seed: int) -> None:
    chance = random.Random(seed)
    rows, blocks = chance.randint(1, 5), chance.randint(10, 20)
    simulation = PagedSimulation(
        rows, chance.choice([16, 64, 500]), spare_rows=chance.randint(0, 4), blocks=blocks
    )
    for _ in range(60):
        if chance.random() < 0.3 and len(simulation.waiting) < 8:
            family = chance.randint(1, 3) * 1000
            prompt = numbers_of(family, chance.randint(0, 90))
            prompt += numbers_of(simulation._ids, chance.randint(1, 40))
            adapter = chance.choice([None, 1, 2, 3])
            simulation.add(prompt, chance.randint(1, 60), adapter)
        if chance.random() < 0.05 and simulation.running:
            simulation.abort(chance.choice(list(simulation.running)))
        simulation.step()
        simulation.check_state()
