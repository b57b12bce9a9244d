"""Several adapters that requests name together, each with its scale, as one more adapter.

A composition binds its parts: none of them is freed while it is there. It stays, unused, for the
next request that names the same, until others need its place or one of its parts is to go. A
request that uses it holds both it and its parts.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lorax_serve.core import Part
from lorax_serve.errors import Overloaded
from lorax_serve.registry.background import Background
from lorax_serve.registry.version import Adapter
from lorax_serve.registry.versions import AdapterEngine, Versions

__all__ = ["Composed", "Compositions"]

# What is kept without being used. Each is known to the engine, and in memory only while that has
# room.
_MOST_IDLE = 64
# They are made one after the other, on the thread that reads all adapters.
_MOST_MAKING = 64

_Key = tuple[tuple[int, float], ...]
_Parts = tuple[tuple[Adapter, float], ...]


@dataclass(slots=True, eq=False)
class Composed(Adapter):
    """A composition. Its name is those of its parts.

    Attributes:
        parts: the versions and their scales, in the order of the request.
    """

    parts: _Parts = ()
    leaving: bool = field(default=False)
    """Whether it goes with its last request."""


@dataclass(slots=True)
class _Making:
    """A composition that is being made, and how many requests wait for it."""

    task: asyncio.Task[Composed]
    waiting: int = 0


class Compositions:
    """The compositions of a server.

    Args:
        engine: makes and frees them.
        versions: what they are made of.
        background: makes and frees them whatever becomes of the requests.
    """

    def __init__(self, engine: AdapterEngine, versions: Versions, background: Background) -> None:
        self._engine = engine
        self._versions = versions
        self._background = background
        self._made: OrderedDict[_Key, Composed] = OrderedDict()
        """The least recently used first."""
        self._making: dict[_Key, _Making] = {}

    def __len__(self) -> int:
        return len(self._made)

    def __iter__(self) -> Iterator[Composed]:
        """Those that are there."""
        yield from self._made.values()

    async def acquire(self, parts: Sequence[tuple[Adapter, float]]) -> Composed:
        """Hold the composition of these versions, which the caller holds; made if need be.

        Raises:
            AdapterRejected: one of them is more than LoRA.
            Overloaded: it does not fit into the memory for adapters, or too many are being made.
        """
        key = tuple((adapter.key, scale) for adapter, scale in parts)
        composed = self._made.get(key)
        if composed is None:
            composed = await self._acquire_new(key, tuple(parts))
        else:
            self._made.move_to_end(key)
            composed.hold()
        composed.weight = max(adapter.weight for adapter, _ in parts)  # which may have changed
        return composed

    def released(self, composed: Composed) -> None:
        """It has been released by a request that had acquired it."""
        if composed.references == 0:
            if composed.leaving:
                self._drop(composed)
            else:
                self._make_room()

    def leave(self, adapter: Adapter) -> None:
        """A version is to be freed: what is made of it goes, at once or with its last request."""
        for key, composed in list(self._made.items()):
            if any(part is adapter for part, _ in composed.parts):
                del self._made[key]
                composed.leaving = True
                if composed.references == 0:
                    self._drop(composed)

    async def _acquire_new(self, key: _Key, parts: _Parts) -> Composed:
        making = self._making.get(key)
        if making is None:
            if len(self._making) >= _MOST_MAKING:
                raise Overloaded(
                    f"{len(self._making)} other combinations of adapters and scales are being "
                    "made, the most at a time; try again later"
                )
            for adapter, _ in parts:
                adapter.bind()
            making = self._making[key] = _Making(self._background.run(self._make(key, parts)))
        making.waiting += 1
        try:
            return await asyncio.shield(making.task)
        except asyncio.CancelledError:
            making.waiting -= 1
            task = making.task
            if task.done() and not task.cancelled() and not task.exception():
                task.result().release()  # it was held for this one too
                self.released(task.result())
            raise

    async def _make(self, key: _Key, parts: _Parts) -> Composed:
        """Make one of parts that are bound, and hold it for all who wait by then."""
        number = self._versions.next_key()
        try:
            info = await self._engine.compose_adapter(
                number,
                tuple(
                    Part(each.name, str(each.path), each.info.digest, scale)
                    for each, scale in parts
                ),
            )
        except BaseException:
            for adapter, _ in parts:
                adapter.unbind()
            raise
        finally:
            making = self._making.pop(key)
        composed = Composed(
            name="+".join(adapter.name for adapter, _ in parts),
            version=number,
            info=info,
            path=Path(),
            key=number,
            parts=parts,
        )
        for _ in range(making.waiting):
            composed.hold()
        if not any(adapter.going for adapter, _ in parts):
            self._made[key] = composed
            self._make_room()
        else:  # one was unloaded meanwhile: it goes with the requests that wait for it
            composed.leaving = True
            if not making.waiting:
                self._drop(composed)
        return composed

    def _make_room(self) -> None:
        idle = [key for key, composed in self._made.items() if composed.references == 0]
        for key in idle[: max(0, len(idle) - _MOST_IDLE)]:
            self._drop(self._made.pop(key))

    def _drop(self, composed: Composed) -> None:
        self._background.run(self._free(composed))

    async def _free(self, composed: Composed) -> None:
        try:
            await self._engine.drop_adapter(composed.key)
        finally:
            for adapter, _ in composed.parts:
                adapter.unbind()
