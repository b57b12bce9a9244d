"""Who has which part of a piece of memory: plain integers, the memory follows what is decided."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Extent", "Extents", "Move"]


class Extent(NamedTuple):
    """Units ``[begin, begin + size)``."""

    begin: int
    size: int


class Move(NamedTuple):
    """``size`` units go from ``begin`` down to ``to``; the two may overlap."""

    begin: int
    to: int
    size: int


class Extents:
    """Pieces of their owners' true sizes, each in one.

    Holes are what is between the extents, looked for anew each time: there are some hundreds of
    extents, and no list of holes can disagree with them.

    Args:
        capacity: units that there are.

    Attributes:
        used: units that have an owner.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.used = 0
        self._of: dict[int, Extent] = {}

    def __contains__(self, owner: int) -> bool:
        return owner in self._of

    def __getitem__(self, owner: int) -> Extent:
        return self._of[owner]

    def take(self, owner: int, size: int) -> Extent | None:
        """Give an owner the smallest hole that is large enough; None if none is."""
        assert owner not in self._of
        assert size > 0
        fitting = [hole for hole in self._holes() if hole.size >= size]
        if not fitting:
            return None
        hole = min(fitting, key=lambda hole: hole.size)
        self._of[owner] = Extent(hole.begin, size)
        self.used += size
        return self._of[owner]

    def release(self, owner: int) -> None:
        """Make a hole of what an owner has."""
        self.used -= self._of.pop(owner).size

    def compact(self, size: int) -> list[Move]:
        """Move extents down until there is a hole of ``size``; there must be as much in all.

        The moves are to be made in this order: none overwrites what a later one moves.
        """
        assert self.used + size <= self.capacity
        moves, end = [], 0
        for owner, extent in sorted(self._of.items(), key=lambda item: item[1]):
            if extent.begin - end >= size:
                break
            if extent.begin > end:
                moves.append(Move(extent.begin, end, extent.size))
                self._of[owner] = Extent(end, extent.size)
            end += extent.size
        return moves

    def _holes(self) -> list[Extent]:
        holes, end = [], 0
        for extent in (*sorted(self._of.values()), Extent(self.capacity, 0)):
            if extent.begin > end:
                holes.append(Extent(end, extent.begin - end))
            end = extent.begin + extent.size
        return holes
