"""Which adapters are in host memory: what to read from disk next, and what to evict for it.

Plain integers; the weights follow what is decided here.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable
from typing import NamedTuple

__all__ = ["HostCache", "Plan"]

# The order of reading is decided anew each step, so few are given away ahead. The loading thread
# must have the next one at hand when it ends one.
_MAX_READING = 4


class Plan(NamedTuple):
    """What to do now: first evict, then start reading.

    ``short``: those in use and earlier ones leave no room for a wanted version. ``settled``: all
    others are resident or being read.
    """

    evict: list[int]
    read: list[int]
    short: bool
    settled: bool


class HostCache:
    """Known adapters, some of them resident within ``max_bytes``, the others on disk only.

    The bytes of an adapter are reserved when its reading starts.

    Attributes:
        nbytes: of the resident adapters and those that are being read.
        evictions: how many adapters have been sent back to disk.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.nbytes = 0
        self.evictions = 0
        self._bytes_of: dict[int, int] = {}
        """Every known version."""
        self._resident: OrderedDict[int, None] = OrderedDict()
        """The least recently used first."""
        self._reading: dict[int, None] = {}
        self._pinned: dict[int, None] = {}

    def __len__(self) -> int:
        return len(self._resident)

    def __contains__(self, version: int) -> bool:
        """Whether the version is resident."""
        return version in self._resident

    @property
    def known(self) -> int:
        """Number of known versions."""
        return len(self._bytes_of)

    @property
    def reading(self) -> int:
        """Number of versions that are being read."""
        return len(self._reading)

    def use(self, version: int) -> int | None:
        """A resident version's bytes, None if it is not resident; it is now the last to go."""
        if version not in self._resident:
            return None
        self._resident.move_to_end(version)
        return self._bytes_of[version]

    @property
    def pinned_bytes(self) -> int:
        """Bytes of the pinned versions, wherever they are."""
        return self._sum(self._pinned)

    @property
    def missing(self) -> list[int]:
        """Pinned versions that are to be read: not resident, and not being read."""
        return [v for v in self._pinned if v not in self._resident and v not in self._reading]

    def pin(self, version: int, instead_of: int | None = None) -> int | None:
        """Keep a version from being evicted.

        Every other version must still find room beside the pinned ones: else it would wait for
        ever.

        Args:
            version: a known one, resident or not.
            instead_of: a version that is about to be unpinned.

        Returns:
            None, or the bytes that are too many.
        """
        pinned = {version, *self._pinned} - {instead_of}
        others = (size for other, size in self._bytes_of.items() if other not in pinned)
        excess = self._sum(pinned) + max(others, default=0) - self.max_bytes
        if excess > 0:
            return excess
        self._pinned[version] = None
        return None

    def unpin(self, version: int) -> None:
        """Let a version be evicted again."""
        self._pinned.pop(version, None)

    def add(self, version: int, nbytes: int, in_use: Collection[int]) -> list[int]:
        """Know a new version whose weights are at hand; returns the versions that it evicts.

        It is resident then, or on disk only if the others are in use or being read.
        """
        assert nbytes + self.pinned_bytes <= self.max_bytes, "it does not fit beside the pinned"
        self._bytes_of[version] = nbytes
        keep = self._keep(in_use)
        if self._sum(keep) + nbytes > self.max_bytes:
            return []
        evicted = self._evict(nbytes, keep)
        self._resident[version] = None
        self.nbytes += nbytes
        return evicted

    def plan(self, wanted: Iterable[int], in_use: Collection[int]) -> Plan:
        """Choose what to read of what waiting requests want.

        The versions that are pinned or in use, those being read, and the first of the wanted ones
        as far as the budget goes are the working set: what is missing of it is read in order, and
        only versions outside of it are evicted. So the first wanted version always gets in once
        those in use leave it room, however many are wanted.

        Args:
            wanted: versions in the order in which they should be served.
            in_use: versions that must not leave host memory now.
        """
        keep = self._keep(in_use)
        size = self._sum(keep)
        evict: list[int] = []
        read: list[int] = []
        short, settled = False, True
        for version in wanted:
            if version in keep:
                continue
            size += self._bytes_of[version]
            if size > self.max_bytes:
                # Nothing behind it may pass, or a large adapter would wait for ever.
                short = True
                break
            keep.add(version)
            if version not in self._resident:
                if len(self._reading) + len(read) < _MAX_READING:
                    read.append(version)
                else:
                    settled = False
        for version in read:
            evict += self._evict(self._bytes_of[version], keep)
            self._reading[version] = None
            self.nbytes += self._bytes_of[version]
        return Plan(evict, read, short, settled)

    def arrived(self, version: int) -> bool:
        """A version's weights have been read; whether they are still wanted (not dropped)."""
        if version not in self._reading:
            return False
        del self._reading[version]
        self._resident[version] = None
        return True

    def lost(self, version: int) -> bool:
        """A version's weights could not be read; whether it is still known."""
        if version not in self._reading:
            return False
        del self._reading[version]
        self.nbytes -= self._bytes_of[version]
        return True

    def drop(self, version: int) -> int:
        """Forget a version; returns the bytes that this frees, 0 if it was on disk only."""
        nbytes = self._bytes_of.pop(version)
        self.unpin(version)
        if version in self._resident:
            del self._resident[version]
        elif version in self._reading:
            del self._reading[version]
        else:
            return 0
        self.nbytes -= nbytes
        return nbytes

    def problems(self) -> list[str]:
        """What is wrong in the accounting; empty when all is well."""
        found = []
        both = self._resident.keys() & self._reading.keys()
        if both:
            found.append(f"adapter versions {sorted(both)} are resident and being read")
        held = self._resident.keys() | self._reading.keys() | self._pinned.keys()
        strange = held - self._bytes_of.keys()
        if strange:
            found.append(f"adapter versions {sorted(strange)} are in memory, but unknown")
        total = self._sum({*self._resident, *self._reading} - strange)
        if total != self.nbytes:
            found.append(f"adapter bytes are {self.nbytes}, not {total}")
        if self.nbytes > self.max_bytes:
            found.append(f"adapters take {self.nbytes} of {self.max_bytes} host bytes")
        return found

    def _keep(self, in_use: Collection[int]) -> set[int]:
        """What is in memory, or about to be, and must stay."""
        stays = {*in_use, *self._pinned}
        return {version for version in stays if version in self._resident} | self._reading.keys()

    def _sum(self, versions: Iterable[int]) -> int:
        return sum(self._bytes_of[version] for version in versions)

    def _evict(self, nbytes: int, keep: Collection[int]) -> list[int]:
        evicted: list[int] = []
        candidates = (version for version in self._resident if version not in keep)
        size = self.nbytes
        while size + nbytes > self.max_bytes:
            victim = next(candidates)
            size -= self._bytes_of[victim]
            evicted.append(victim)
        for victim in evicted:
            del self._resident[victim]
        self.nbytes = size
        self.evictions += len(evicted)
        return evicted
