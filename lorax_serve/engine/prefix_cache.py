"""Which KV row begins with which tokens. Plain integers.

A row's tokens are indexed block by block under hashes that chain over all tokens before, salted
with the adapter's digest from the first position on that it acts on: keys and values depend on
both. Before an activated LoRA's invocation they are the base model's, and shared with it. Hashes
only point at rows. What is found was compared token by token, so that a collision can cost a hit,
but never give another's prefix.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from lorax_serve.core import NEVER, CacheKey

__all__ = ["PrefixIndex"]

# Rows that share a prefix differ in what follows; that many are looked at for the longest match.
_CANDIDATES = 4


@dataclass(slots=True)
class _Entry:
    key: CacheKey | None
    tokens: list[int]
    length: int = 0
    hashes: list[int] = field(default_factory=list)
    """One for each full block of ``tokens[:length]``."""


class PrefixIndex:
    """Rows by the tokens that they hold.

    Args:
        block_size: tokens hashed at a time, and the shortest prefix that is found.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._entries: dict[int, _Entry] = {}
        self._rows: dict[int, dict[int, None]] = {}
        """Hash to the rows that have it, in the order of their coming."""

    def extend(self, row: int, key: CacheKey | None, tokens: list[int], length: int) -> None:
        """Say that ``row`` now holds ``tokens[:length]``. The list is kept; it may only grow."""
        entry = self._entries.get(row)
        if entry is None:
            entry = self._entries[row] = _Entry(key, tokens)
        entry.length = length
        for block in range(len(entry.hashes), length // self._block_size):
            digest = self._hash(entry.hashes[-1] if block else 0, key, tokens, block)
            entry.hashes.append(digest)
            self._rows.setdefault(digest, {})[row] = None

    def find(self, key: CacheKey | None, tokens: list[int], limit: int) -> tuple[int, int]:
        """A row that begins with the most of ``tokens[:limit]``, and how many these are.

        Row -1 and 0 if there is none with a block of them.
        """
        rows: dict[int, None] = {}
        digest = 0
        for block in range(limit // self._block_size):
            digest = self._hash(digest, key, tokens, block)
            if digest not in self._rows:
                break
            rows = self._rows[digest]
        best = (-1, 0)
        for row in list(rows)[-_CANDIDATES:]:
            shared = self._shared(self._entries[row], key, tokens, limit)
            if shared >= max(best[1], self._block_size):
                best = (row, shared)
        return best

    def move(self, row: int, to: int) -> None:
        """The tokens of ``row`` are in row ``to`` now, which held none."""
        entry = self._entries.pop(row, None)
        if entry is not None:
            self._entries[to] = entry
            for digest in entry.hashes:
                rows = self._rows[digest]
                del rows[row]
                rows[to] = None

    def drop(self, row: int) -> None:
        """The row holds nothing any more."""
        entry = self._entries.pop(row, None)
        if entry is not None:
            for digest in entry.hashes:
                rows = self._rows[digest]
                del rows[row]
                if not rows:
                    del self._rows[digest]

    def problems(self) -> list[str]:
        """What is wrong in the accounting."""
        found = []
        for row, entry in self._entries.items():
            if not len(entry.hashes) == entry.length // self._block_size <= len(entry.tokens):
                found.append(f"row {row} has {entry.length} tokens in {len(entry.hashes)} blocks")
            if any(row not in self._rows.get(digest, ()) for digest in entry.hashes):
                found.append(f"row {row} is not found under its hashes")
        if sum(map(len, self._rows.values())) != sum(
            len(set(entry.hashes)) for entry in self._entries.values()
        ):
            found.append("the prefix index names rows that do not have the prefix")
        return found

    def _hash(self, before: int, key: CacheKey | None, tokens: list[int], block: int) -> int:
        start = block * self._block_size
        end = start + self._block_size
        salt = key if _start(key) < end else None
        return hash((before, salt, *tokens[start:end]))

    def _shared(self, entry: _Entry, key: CacheKey | None, tokens: list[int], limit: int) -> int:
        """Length of the common prefix."""
        limit = min(limit, entry.length)
        if entry.key != key:
            limit = min(limit, _start(entry.key), _start(key))
        if entry.tokens[:limit] == tokens[:limit]:
            return limit
        pairs = zip(entry.tokens, tokens, strict=False)
        return next(n for n, (mine, yours) in enumerate(pairs) if mine != yours)


def _start(key: CacheKey | None) -> int:
    """The first position that depends on the key."""
    return NEVER if key is None else key.start
