"""Rows of the KV cache: who has which, how much memory they take, and what idle ones keep.

Plain integers; ``KVCache`` follows what is decided here. A row is a contiguous range of positions
for one sequence; memory is taken in blocks as it fills. An ended sequence's row stays as a cached
prefix, idle, until its memory or its place is needed: the least recently used goes first.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lorax_serve.core import RowCopy, Sequence
from lorax_serve.engine.prefix_cache import PrefixIndex

__all__ = ["BLOCK", "KVRows", "blocks_of"]

BLOCK = 32
"""Tokens in a block: with 64 numbers of 16 bits a head, a page of 4 KiB of each head."""


def blocks_of(tokens: int) -> int:
    """Blocks that hold so many tokens."""
    return -(-tokens // BLOCK)


@dataclass(slots=True)
class _Idle:
    length: int
    used: int
    """When it was last of use, on the clock of ``KVRows``."""


class KVRows:
    """``rows`` rows with ``blocks`` blocks of memory between them.

    Attributes:
        queries: tokens of all prompts that a prefix was looked up for.
        hits: those of them that were found.
    """

    def __init__(self, rows: int, blocks: int, *, prefix_caching: bool = True) -> None:
        self._rows = rows
        self._blocks = blocks
        self._caching = prefix_caching
        self._free = set(range(rows))
        self._running: dict[int, Sequence] = {}
        self._idle: dict[int, _Idle] = {}
        self._taken = [0] * rows
        """Blocks of each row."""
        self._unused = blocks
        self._idle_blocks = 0
        self._index = PrefixIndex(BLOCK)
        self._copies: list[RowCopy] = []
        self._clock = 0
        self.queries = 0
        self.hits = 0

    @property
    def cached_tokens(self) -> int:
        """Tokens in idle rows."""
        return sum(idle.length for idle in self._idle.values())

    def fits(self, sequence: Sequence) -> bool:
        """Whether a row and memory for all of a sequence's tokens can be had, and a block more for
        each that runs: or it would soon be taken from one of them."""
        need = blocks_of(len(sequence.tokens)) + len(self._running)
        return len(self._running) < self._rows and need <= self._obtainable()

    def take(self, sequence: Sequence) -> None:
        """Give a row to a sequence that ``fits``; sets ``kv_slot``, and ``computed`` to what a
        cached prefix spares it. At least one token is left to compute."""
        tokens = sequence.tokens
        need = blocks_of(len(tokens))
        source, hit = -1, 0
        if self._caching:
            source, hit = self._index.find(sequence.cache_key, tokens, len(tokens) - 1)
            idle = self._idle.get(source)
            if idle and idle.length != hit and need > self._obtainable() - self._taken[source]:
                source, hit = -1, 0  # there is no room for both
        if not sequence.generated:
            self.queries += len(tokens)
            self.hits += hit
        row = self._place(source, hit)
        self._resize(row, need, spare=source)
        if hit and row != source:
            self._copies.append(RowCopy(source, row, hit))
        self._running[row] = sequence
        sequence.kv_slot, sequence.computed = row, hit
        self.commit(sequence)

    def reserve(self, sequence: Sequence) -> bool:
        """Memory for the token that a running sequence computes next; whether it could be had."""
        row = sequence.kv_slot
        if sequence.computed < self._taken[row] * BLOCK:
            return True
        if not (self._unused or self._idle):
            return False
        self._resize(row, self._taken[row] + 1)
        return True

    def has_room(self) -> bool:
        """Whether every running sequence could have another block."""
        return len(self._running) <= self._obtainable()

    def commit(self, sequence: Sequence) -> None:
        """Let others find what a running sequence has computed."""
        if self._caching and sequence.computed >= BLOCK:
            key = sequence.cache_key
            self._index.extend(sequence.kv_slot, key, sequence.tokens, sequence.computed)

    def release(self, sequence: Sequence, *, keep: bool) -> None:
        """Take a sequence's row back; with ``keep`` what it computed stays as a cached prefix."""
        row, length = sequence.kv_slot, sequence.computed
        del self._running[row]
        if keep and self._caching and length >= BLOCK:
            self._index.extend(row, sequence.cache_key, sequence.tokens, length)
            self._resize(row, blocks_of(length))
            self._idle[row] = _Idle(length, self._tick())
            self._idle_blocks += self._taken[row]
        else:
            self._clear(row)

    def forget(self) -> None:
        """Free all idle rows: what they hold is not certain any more."""
        for row in list(self._idle):
            self._evict(row)

    def take_copies(self) -> list[RowCopy]:
        """What ``KVCache`` has to do before the next step."""
        copies, self._copies = self._copies, []
        return copies

    def problems(self, running: Iterable[Sequence]) -> list[str]:
        """What is wrong, given the sequences that should have a row."""
        found = self._index.problems()
        holders = {id(sequence): sequence.kv_slot for sequence in running}
        if holders != {id(sequence): row for row, sequence in self._running.items()}:
            found.append(f"KV rows are {sorted(self._running)}, not {sorted(holders.values())}")
        rows = sorted([*self._free, *self._running, *self._idle])
        if rows != list(range(self._rows)):
            found.append(f"KV rows are lost or doubled: {rows}")
        if self._unused < 0 or self._unused + sum(self._taken) != self._blocks:
            found.append(f"KV blocks: {self._taken} taken, {self._unused} of {self._blocks} left")
        if self._idle_blocks != sum(self._taken[row] for row in self._idle):
            found.append(f"idle KV rows take other than {self._idle_blocks} blocks")
        if any(self._taken[row] for row in self._free):
            found.append("a free KV row takes memory")
        for row, sequence in self._running.items():
            if sequence.computed > self._taken[row] * BLOCK:
                found.append(f"KV row {row} has more tokens than memory")
        for row, idle in self._idle.items():
            if blocks_of(idle.length) != self._taken[row]:
                found.append(f"idle KV row {row} takes {self._taken[row]} blocks")
        return found

    def _obtainable(self) -> int:
        return self._unused + self._idle_blocks

    def _tick(self) -> int:
        self._clock += 1
        return self._clock

    def _place(self, source: int, hit: int) -> int:
        """A row for a new sequence: ``source`` if nothing of it is lost, or a free one (a low one:
        attention without a kernel of its own runs over all rows up to the last that decodes), or
        the least recently used."""
        idle = self._idle.get(source)
        if idle is not None:
            idle.used = self._tick()
        if idle is not None and idle.length == hit:
            row = source
        elif self._free:
            row = min(self._free)
            self._free.remove(row)
            return row
        else:
            row = self._least_used(spare=source) if len(self._idle) > 1 else next(iter(self._idle))
        self._wake(row)
        self._index.drop(row)
        return row

    def _resize(self, row: int, blocks: int, spare: int = -1) -> None:
        """Let a row have so many blocks. What it has of them already, it keeps."""
        if blocks < self._taken[row]:
            self._copies.append(RowCopy(row, row, blocks * BLOCK))
        while self._unused + self._taken[row] < blocks:
            self._evict(self._least_used(spare))
        self._unused += self._taken[row] - blocks
        self._taken[row] = blocks

    def _least_used(self, spare: int = -1) -> int:
        return min((row for row in self._idle if row != spare), key=lambda r: self._idle[r].used)

    def _evict(self, row: int) -> None:
        self._wake(row)
        self._clear(row)

    def _wake(self, row: int) -> None:
        del self._idle[row]
        self._idle_blocks -= self._taken[row]

    def _clear(self, row: int) -> None:
        self._index.drop(row)
        self._resize(row, 0)
        self._free.add(row)
