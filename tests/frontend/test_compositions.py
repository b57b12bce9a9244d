"""Compositions: shared, kept for the next request, and gone with what they are made of."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from lorax_serve.core import AdapterInfo, AdapterScale, Freed, Part
from lorax_serve.errors import AdapterNotFound, AdapterRejected, RejectReason
from lorax_serve.frontend import compositions
from lorax_serve.frontend.compositions import Composed
from lorax_serve.frontend.in_place import InPlace
from lorax_serve.frontend.registry import AdapterRegistry
from tests.frontend.bare_engine import BareEngine


class Composer(BareEngine):
    """An engine that holds numbers; compositions wait for ``go``."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[int, tuple[Part, ...]] = {}
        self.composed = 0
        self.refusal: AdapterRejected | None = None
        self.go = asyncio.Event()
        self.go.set()

    async def load_adapter(self, version: int, path: str) -> AdapterInfo:
        self.held[version] = ()
        return AdapterInfo(Path(path).name, 4, 2, 100)

    async def compose_adapter(self, version: int, parts: tuple[Part, ...]) -> AdapterInfo:
        self.composed += 1
        await self.go.wait()
        if self.refusal:
            raise self.refusal
        self.held[version] = parts
        return AdapterInfo("of " + "+".join(part.digest for part in parts), 8, 2, 200)

    async def drop_adapter(self, version: int) -> Freed:
        await asyncio.sleep(0)
        del self.held[version]
        return Freed(host=100)


@pytest.fixture
def engine() -> Composer:
    return Composer()


@pytest.fixture
async def registry(engine: Composer, tmp_path: Path) -> AdapterRegistry:
    """With adapters ``a``, ``b`` and ``c``."""
    registry = AdapterRegistry(engine, InPlace(tmp_path))
    for name in "abc":
        (tmp_path / name).mkdir()
        await registry.load(name)
    return registry


AB = [AdapterScale("a", 0.5), AdapterScale("b", -1)]


async def settle() -> None:
    """Let what runs in the background end."""
    for _ in range(20):
        await asyncio.sleep(0)


async def test_requests_for_the_same_share_one(registry: AdapterRegistry, engine: Composer) -> None:
    engine.go.clear()
    waiting = [asyncio.create_task(registry.admit_together(AB)) for _ in range(3)]
    await settle()
    engine.go.set()
    first, second, third = await asyncio.gather(*waiting)
    assert first is second is third
    assert first.references == 3
    assert isinstance(first, Composed)
    assert [(part.name, scale) for part, scale in first.parts] == [("a", 0.5), ("b", -1)]
    assert [(part.digest, part.scale) for part in engine.held[first.key]] == [("a", 0.5), ("b", -1)]
    for _ in range(3):
        registry.release(first)
    await settle()
    assert await registry.admit_together(AB) is first, "it stays for the next request"
    assert engine.composed == 1
    other = await registry.admit_together([AB[0], AdapterScale("b", 1)])
    assert other is not first


async def test_parts_are_counted_as_used(registry: AdapterRegistry) -> None:
    await registry.admit_together(AB)
    used = {adapter.name: (adapter.requests, adapter.references) for adapter in registry.adapters()}
    assert used == {"a": (1, 1), "b": (1, 1), "c": (0, 0)}, "held by the composition"


async def test_a_part_that_is_unloaded_takes_an_unused_composition_along(
    registry: AdapterRegistry, engine: Composer
) -> None:
    composed = await registry.admit_together(AB)
    registry.release(composed)
    assert await asyncio.wait_for(registry.unload("a"), 5) == Freed(host=100)
    assert composed.key not in engine.held
    with pytest.raises(AdapterNotFound, match="'a' is not loaded"):
        await registry.admit_together(AB)
    await settle()
    assert len(engine.held) == 2
    assert all(adapter.references == 0 for adapter in registry.adapters())


async def test_a_part_that_is_unloaded_waits_for_the_composition_in_use(
    registry: AdapterRegistry, engine: Composer
) -> None:
    composed = await registry.admit_together(AB)
    unload = asyncio.create_task(registry.unload("b"))
    await settle()
    assert not unload.done()
    assert composed.key in engine.held
    registry.release(composed)
    await asyncio.wait_for(unload, 5)
    assert len(engine.held) == 2


async def test_a_part_that_is_unloaded_while_it_is_composed(
    registry: AdapterRegistry, engine: Composer
) -> None:
    engine.go.clear()
    wanted = asyncio.create_task(registry.admit_together(AB))
    await settle()
    unload = asyncio.create_task(registry.unload("b"))
    await settle()
    engine.go.set()
    composed = await wanted  # its request was admitted before
    assert not unload.done()
    registry.release(composed)
    await asyncio.wait_for(unload, 5)
    assert len(engine.held) == 2


@pytest.mark.parametrize("unloaded", [False, True])
async def test_a_caller_that_goes_away(
    registry: AdapterRegistry, engine: Composer, unloaded: bool
) -> None:
    engine.go.clear()
    wanted = asyncio.create_task(registry.admit_together(AB))
    await settle()
    wanted.cancel()
    await settle()
    unload = asyncio.create_task(registry.unload("b")) if unloaded else None
    engine.go.set()
    await settle()
    if unload is not None:
        await asyncio.wait_for(unload, 5)
        assert len(engine.held) == 2
        return
    again = await registry.admit_together(AB)
    assert engine.composed == 1
    assert again.references == 1


async def test_a_refusal_leaves_nothing_behind(registry: AdapterRegistry, engine: Composer) -> None:
    engine.refusal = AdapterRejected(RejectReason.UNSUPPORTED, "it has DoRA")
    with pytest.raises(AdapterRejected, match="DoRA"):
        await registry.admit_together(AB)
    with pytest.raises(AdapterNotFound):
        await registry.admit_together([AdapterScale("a"), AdapterScale("nobody")])
    assert all(adapter.references == 0 for adapter in registry.adapters())
    assert len(engine.held) == 3


async def test_only_so_many_are_kept_unused(
    registry: AdapterRegistry, engine: Composer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compositions, "_MOST_IDLE", 4)
    running = await registry.admit_together([AdapterScale("a", 99)])
    for scale in range(6):
        registry.release(await registry.admit_together([AdapterScale("a", scale)]))
        await settle()
        assert len(engine.held) == 3 + 1 + min(scale + 1, 4)
    assert running.key in engine.held
    engine.composed = 0
    registry.release(await registry.admit_together([AdapterScale("a", 5)]))
    assert engine.composed == 0, "the last ones are those that are kept"
