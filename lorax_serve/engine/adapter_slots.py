"""Which adapter is in which device slot: pins, bytes, and eviction of the least recently used.

Plain integers; the weights follow what is decided here.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, KeysView
from typing import NamedTuple

__all__ = ["AdapterSlots", "Pinned"]


class Pinned(NamedTuple):
    """A slot, and whether the adapter's weights must be brought into it first."""

    slot: int
    is_new: bool


class AdapterSlots:
    """The device tier. A pinned slot is never given to another adapter.

    Args:
        capacity: number of slots.
        max_bytes: of all adapters in slots together; None: only the slots are counted.
        weigh: an adapter's true bytes, None while its weights are not in host memory.

    Attributes:
        nbytes: of the adapters in slots.
        evictions: how many adapters have lost their slot to another.
        short: an adapter found no room beside the pinned ones. Whoever makes pins end for it
            (the scheduler) resets it; it is set again while that lasts.
    """

    def __init__(
        self,
        capacity: int,
        max_bytes: int | None = None,
        weigh: Callable[[int], int | None] = lambda version: 0,
    ) -> None:
        self.capacity = capacity
        self.max_bytes = max_bytes
        self.nbytes = 0
        self.evictions = 0
        self.short = False
        self._weigh = weigh
        self._free = list(range(capacity - 1, -1, -1))
        self._slot_of: OrderedDict[int, int] = OrderedDict()
        """Version to slot, the least recently pinned first."""
        self._bytes_of: dict[int, int] = {}
        self._pins: dict[int, int] = {}
        """Version to number of pins, where there are any."""
        self._pinned_bytes = 0
        self._refused: dict[int, None] = {}
        self._emptied: list[int] = []

    def __len__(self) -> int:
        return len(self._slot_of)

    def __contains__(self, version: int) -> bool:
        return version in self._slot_of

    def __iter__(self) -> Iterator[int]:
        return iter(self._slot_of)

    @property
    def pinned(self) -> KeysView[int]:
        """The versions that are pinned."""
        return self._pins.keys()

    def pin(self, version: int) -> Pinned | None:
        """Pin a version's slot, assigning one if need be.

        None if its weights are not in host memory yet, or if there is no slot or not enough
        device memory beside the pinned ones; ``take_refused`` will name it then.
        """
        slot = self._slot_of.get(version)
        is_new = slot is None
        if slot is None:
            slot = self._assign(version)
            if slot is None:
                self._refused[version] = None
                return None
        self._slot_of.move_to_end(version)
        pins = self._pins.get(version, 0)
        if not pins:
            self._pinned_bytes += self._bytes_of[version]
        self._pins[version] = pins + 1
        return Pinned(slot, is_new)

    def is_loaded(self, version: int) -> bool:
        """Whether its weights are at hand: if not, ``pin`` waits for these, not for a slot."""
        return version in self._slot_of or self._weigh(version) is not None

    def unpin(self, version: int) -> None:
        """Undo one ``pin``; the adapter stays in its slot until that is needed."""
        self._pins[version] -= 1
        if not self._pins[version]:
            del self._pins[version]
            self._pinned_bytes -= self._bytes_of[version]

    def drop(self, version: int) -> int | None:
        """Forget an unpinned version; returns the slot that it leaves, if it had one."""
        assert version not in self._pins, f"adapter version {version} is still in use"
        if version not in self._slot_of:
            return None
        return self._empty(version)

    def take_refused(self) -> list[int]:
        """The versions that ``pin`` refused since the last call, in the order of asking."""
        refused, self._refused = list(self._refused), {}
        return refused

    def take_emptied(self) -> list[int]:
        """The slots that evicted adapters have left since the last call.

        Their memory is to be freed before new adapters are brought in.
        """
        emptied, self._emptied = self._emptied, []
        return emptied

    def problems(self, pins: dict[int, int]) -> list[str]:
        """What is wrong, given how often each version should be pinned."""
        found = []
        if self._pins != pins:
            found.append(f"adapter pins are {self._pins}, the running sequences hold {pins}")
        slots = sorted([*self._slot_of.values(), *self._free])
        if slots != list(range(self.capacity)):
            found.append(f"adapter slots are lost or doubled: {slots}")
        unplaced = self._pins.keys() - self._slot_of.keys()
        if unplaced:
            found.append(f"adapter versions {sorted(unplaced)} are pinned without a slot")
        if self._bytes_of.keys() != self._slot_of.keys():
            found.append("adapter bytes are counted for others than those in slots")
        pinned_bytes = sum(self._bytes_of.get(version, 0) for version in self._pins)
        if (self.nbytes, self._pinned_bytes) != (sum(self._bytes_of.values()), pinned_bytes):
            found.append(
                f"device bytes are {self.nbytes}, {self._pinned_bytes} of them pinned, not "
                f"{sum(self._bytes_of.values())} and {pinned_bytes}"
            )
        if self.max_bytes is not None and self.nbytes > self.max_bytes:
            found.append(f"adapters take {self.nbytes} of {self.max_bytes} device bytes")
        return found

    def _assign(self, version: int) -> int | None:
        nbytes = self._weigh(version)
        if nbytes is None:
            return None
        if not self._can_hold(nbytes):
            self.short = True
            return None
        while not self._free or self._exceeds(self.nbytes + nbytes):
            victim = next(v for v in self._slot_of if v not in self._pins)
            self._emptied.append(self._empty(victim))
            self.evictions += 1
        slot = self._free.pop()
        self._slot_of[version] = slot
        self._bytes_of[version] = nbytes
        self.nbytes += nbytes
        return slot

    def _can_hold(self, nbytes: int) -> bool:
        """Whether there would be a slot and the bytes if all unpinned adapters left."""
        return len(self._pins) < self.capacity and not self._exceeds(self._pinned_bytes + nbytes)

    def _exceeds(self, nbytes: int) -> bool:
        return self.max_bytes is not None and nbytes > self.max_bytes

    def _empty(self, version: int) -> int:
        slot = self._slot_of.pop(version)
        self._free.append(slot)
        self.nbytes -= self._bytes_of.pop(version)
        return slot
