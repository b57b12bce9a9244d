"""Compositions: shared, kept for the next request, and gone with what they are made of."""

from __future__ import annotations

import asyncio
import random
from contextlib import suppress
from pathlib import Path

import pytest

from lorax_serve.core import AdapterInfo, AdapterScale, Freed, Part
from lorax_serve.errors import (
    AdapterConflict,
    AdapterNotFound,
    AdapterRejected,
    Overloaded,
    RejectReason,
)
from lorax_serve.registry import compositions
from lorax_serve.registry.compositions import Composed
from lorax_serve.registry.in_place import InPlace
from lorax_serve.registry.registry import AdapterRegistry
from tests.registry.bare_engine import BareEngine


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


class SlowComposer(Composer):
    """Takes its time, refuses now and then, and sees to it that what it reads is not freed."""

    def __init__(self, chance: random.Random) -> None:
        super().__init__()
        self.chance = chance
        self.paths: dict[int, str] = {}

    async def load_adapter(self, version: int, path: str) -> AdapterInfo:
        self.paths[version] = path
        return await super().load_adapter(version, f"{path}-{version}")

    async def compose_adapter(self, version: int, parts: tuple[Part, ...]) -> AdapterInfo:
        info = await super().compose_adapter(version, parts)
        for _ in range(self.chance.randrange(4)):
            await asyncio.sleep(0)
            self.check(parts)
        if self.chance.random() < 0.1:
            del self.held[version]
            raise AdapterRejected(RejectReason.UNSUPPORTED, "not this time")
        return info

    async def drop_adapter(self, version: int) -> Freed:
        for _ in range(self.chance.randrange(3)):
            await asyncio.sleep(0)
        freed = await super().drop_adapter(version)
        for parts in self.held.values():
            self.check(parts)
        return freed

    def check(self, parts: tuple[Part, ...]) -> None:
        loaded = {f"{Path(path).name}-{version}": version for version, path in self.paths.items()}
        assert all(loaded[part.digest] in self.held for part in parts), "a part was freed"


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


def held(registry: AdapterRegistry) -> list[str]:
    """Names of the versions that something holds."""
    return [
        adapter.name
        for adapter in registry.adapters()
        if adapter.references or adapter.compositions or not adapter.unused.is_set()
    ]


async def test_requests_for_the_same_share_one(registry: AdapterRegistry, engine: Composer) -> None:
    engine.go.clear()
    waiting = [asyncio.create_task(registry.admission.admit_together(AB)) for _ in range(3)]
    await settle()
    engine.go.set()
    first, second, third = await asyncio.gather(*waiting)
    assert first is second is third
    assert first.references == 3
    assert isinstance(first, Composed)
    assert [(part.name, scale) for part, scale in first.parts] == [("a", 0.5), ("b", -1)]
    assert [(part.digest, part.scale) for part in engine.held[first.key]] == [("a", 0.5), ("b", -1)]
    for _ in range(3):
        registry.admission.release(first)
    await settle()
    assert await registry.admission.admit_together(AB) is first, "it stays for the next request"
    assert engine.composed == 1
    other = await registry.admission.admit_together([AB[0], AdapterScale("b", 1)])
    assert other is not first


async def test_parts_count_the_requests_that_use_them(registry: AdapterRegistry) -> None:
    def used() -> dict[str, tuple[int, int]]:
        return {each.name: (each.requests, each.references) for each in registry.adapters()}

    composed = await registry.admission.admit_together(AB)
    assert used() == {"a": (1, 1), "b": (1, 1), "c": (0, 0)}
    await registry.admission.admit_together(AB)
    await registry.admission.admit_together([AdapterScale("a", 3)])
    assert used() == {"a": (3, 3), "b": (2, 2), "c": (0, 0)}
    registry.admission.release(composed)
    registry.admission.release(composed)
    assert used() == {"a": (3, 1), "b": (2, 0), "c": (0, 0)}, "it stays, but no request uses it"


async def test_a_composition_weighs_what_its_heaviest_part_weighs_now(
    registry: AdapterRegistry, engine: Composer
) -> None:
    await registry.load("b", weight=3)
    assert (await registry.admission.admit_together(AB)).weight == 3
    await registry.load("b", weight=2)
    await registry.load("a", weight=7)
    assert (await registry.admission.admit_together(AB)).weight == 7
    assert engine.composed == 1


async def test_a_part_that_is_unloaded_takes_an_unused_composition_along(
    registry: AdapterRegistry, engine: Composer
) -> None:
    composed = await registry.admission.admit_together(AB)
    registry.admission.release(composed)
    assert await asyncio.wait_for(registry.unload("a"), 5) == Freed(host=100)
    assert composed.key not in engine.held
    with pytest.raises(AdapterNotFound, match="'a' is not loaded"):
        await registry.admission.admit_together(AB)
    await settle()
    assert len(engine.held) == 2
    assert held(registry) == []


async def test_a_part_that_is_unloaded_waits_for_the_composition_in_use(
    registry: AdapterRegistry, engine: Composer
) -> None:
    composed = await registry.admission.admit_together(AB)
    unload = asyncio.create_task(registry.unload("b"))
    await settle()
    assert not unload.done()
    assert composed.key in engine.held
    registry.admission.release(composed)
    await asyncio.wait_for(unload, 5)
    assert len(engine.held) == 2


async def test_a_part_that_is_unloaded_while_it_is_composed(
    registry: AdapterRegistry, engine: Composer
) -> None:
    engine.go.clear()
    wanted = asyncio.create_task(registry.admission.admit_together(AB))
    await settle()
    unload = asyncio.create_task(registry.unload("b"))
    await settle()
    engine.go.set()
    composed = await wanted  # its request was admitted before
    assert not unload.done()
    registry.admission.release(composed)
    await asyncio.wait_for(unload, 5)
    assert len(engine.held) == 2


@pytest.mark.parametrize("unloaded", [False, True])
async def test_a_caller_that_goes_away(
    registry: AdapterRegistry, engine: Composer, unloaded: bool
) -> None:
    engine.go.clear()
    wanted = asyncio.create_task(registry.admission.admit_together(AB))
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
    again = await registry.admission.admit_together(AB)
    assert engine.composed == 1
    assert again.references == 1


async def test_a_refusal_leaves_nothing_behind(registry: AdapterRegistry, engine: Composer) -> None:
    engine.refusal = AdapterRejected(RejectReason.UNSUPPORTED, "it has DoRA")
    with pytest.raises(AdapterRejected, match="DoRA"):
        await registry.admission.admit_together(AB)
    with pytest.raises(AdapterNotFound):
        await registry.admission.admit_together([AdapterScale("a"), AdapterScale("nobody")])
    assert held(registry) == []
    assert len(engine.held) == 3


async def test_only_so_many_are_kept_unused(
    registry: AdapterRegistry, engine: Composer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compositions, "_MOST_IDLE", 4)
    running = await registry.admission.admit_together([AdapterScale("a", 99)])
    for scale in range(6):
        registry.admission.release(
            await registry.admission.admit_together([AdapterScale("a", scale)])
        )
        await settle()
        assert len(engine.held) == 3 + 1 + min(scale + 1, 4)
    assert running.key in engine.held
    engine.composed = 0
    registry.admission.release(await registry.admission.admit_together([AdapterScale("a", 5)]))
    assert engine.composed == 0, "the last ones are those that are kept"


async def test_only_so_many_are_made_at_a_time(
    registry: AdapterRegistry, engine: Composer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compositions, "_MOST_MAKING", 2)
    made = await registry.admission.admit_together([AdapterScale("a", 9)])
    engine.go.clear()
    tasks = [
        asyncio.create_task(registry.admission.admit_together([AdapterScale("a", scale)]))
        for scale in (1, 2, 1, 3, 2)
    ]
    await settle()
    assert await registry.admission.admit_together([AdapterScale("a", 9)]) is made, "it is there"
    engine.go.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    (refused,) = [result for result in results if isinstance(result, Exception)]
    assert isinstance(refused, Overloaded)
    assert results.index(refused) == 3
    assert "2 other combinations of adapters and scales are being made" in str(refused)
    registry.admission.release(await registry.admission.admit_together([AdapterScale("a", 3)]))
    assert {each.name: each.references for each in registry.adapters()} == {"a": 6, "b": 0, "c": 0}


@pytest.mark.parametrize("seed", range(20))
async def test_whatever_happens_nothing_is_freed_too_early_or_left_behind(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests that come, go away and end, and versions that change and go, in any order."""
    monkeypatch.setattr(compositions, "_MOST_IDLE", 3)
    chance = random.Random(seed)
    engine = SlowComposer(chance)
    registry = AdapterRegistry(engine, InPlace(tmp_path))
    for name in "abc":
        (tmp_path / name).mkdir()
        await registry.load(name)
    running: list[Composed] = []

    async def request() -> None:
        names = chance.sample("abc", chance.randint(1, 3))
        named = [AdapterScale(name, chance.choice((1, -0.5))) for name in names]
        with suppress(AdapterNotFound, AdapterRejected):
            composed = await registry.admission.admit_together(named)
            assert isinstance(composed, Composed)
            running.append(composed)

    async def change() -> None:
        name = chance.choice("abc")
        with suppress(AdapterNotFound):
            await registry.unload(name)
        with suppress(AdapterConflict):
            await registry.load(name)

    work: list[asyncio.Task[None]] = []
    for _ in range(300):
        action = chance.random()
        if action < 0.4:
            work.append(asyncio.create_task(request()))
        elif action < 0.5 and work:
            chance.choice(work).cancel()
        elif action < 0.55:
            work.append(asyncio.create_task(change()))
        elif action < 0.8 and running:
            composed = running.pop(chance.randrange(len(running)))
            assert composed.key in engine.held, "it was freed while a request used it"
            registry.admission.release(composed)
        else:
            await asyncio.sleep(0)
        assert all(composed.key in engine.held for composed in running)
    async with asyncio.timeout(5):
        while running or not all(task.done() for task in work):
            while running:
                registry.admission.release(running.pop())
            await settle()
    assert len(registry.admission._compositions) <= 3
    for name in "abc":
        if registry.is_loaded(name):
            await asyncio.wait_for(registry.unload(name), 5)
    await settle()
    assert engine.held == {}
    assert registry.adapters() == []
