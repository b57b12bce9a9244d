"""Which adapter is in which device slot: pins, and eviction of the least recently used.

Plain integers; the weights follow what is decided here.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

__all__ = ["AdapterSlots", "Pinned"]


class Pinned(NamedTuple):
    """A slot, and whether the adapter's weights must be brought into it first."""

    slot: int
    is_new: bool


class AdapterSlots:
    """``capacity`` slots. A pinned slot is never given to another adapter."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._free = list(range(capacity - 1, -1, -1))
        self._slot_of: OrderedDict[int, int] = OrderedDict()
        """Version to slot, the least recently pinned first."""
        self._pins: dict[int, int] = {}
        """Version to number of pins, where there are any."""

    def __len__(self) -> int:
        return len(self._slot_of)

    def pin(self, version: int) -> Pinned | None:
        """Pin a version's slot, assigning one if need be; None if all others are pinned."""
        is_new = version not in self._slot_of
        if is_new:
            slot = self._take_slot()
            if slot is None:
                return None
            self._slot_of[version] = slot
        self._slot_of.move_to_end(version)
        self._pins[version] = self._pins.get(version, 0) + 1
        return Pinned(self._slot_of[version], is_new)

    def unpin(self, version: int) -> None:
        """Undo one ``pin``; the adapter stays in its slot until that is needed."""
        self._pins[version] -= 1
        if not self._pins[version]:
            del self._pins[version]

    def drop(self, version: int) -> int | None:
        """Forget an unpinned version; returns the slot that it leaves, if it had one."""
        assert version not in self._pins, f"adapter version {version} is still in use"
        slot = self._slot_of.pop(version, None)
        if slot is not None:
            self._free.append(slot)
        return slot

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
        return found

    def _take_slot(self) -> int | None:
        if self._free:
            return self._free.pop()
        victim = next((v for v in self._slot_of if v not in self._pins), None)
        return None if victim is None else self._slot_of.pop(victim)
