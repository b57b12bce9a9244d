"""A pin belongs to a name: it goes where the name goes, and survives a restart."""

from __future__ import annotations

import asyncio

import pytest

from lorax_serve.core import AdapterInfo
from lorax_serve.errors import AdapterNotFound, InvalidRequest, Overloaded, StoreFailed
from lorax_serve.registry.registry import AdapterRegistry
from lorax_serve.store.catalog import Catalog
from tests.registry.place import Engine, Place


class Full(Engine):
    """Has no room for pins."""

    async def pin_adapter(self, version: int, instead_of: int | None = None) -> None:
        raise Overloaded("it cannot be pinned")


def pinned(place: Place) -> set[str]:
    """The digests that the engine keeps in memory."""
    return {place.engine.held[version] for version in place.engine.pinned}


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_a_pin_follows_the_name(place: Place) -> None:
    registry = place.start()
    first = place.write("poet", b"1")
    await registry.load("poet", pinned=True)
    assert pinned(place) == {first}
    second = place.write("poet", b"2")
    assert (await registry.load("poet")).pinned
    await settle()
    assert pinned(place) == {second}
    assert (await registry.roll_back("poet")).pinned
    await settle()
    assert pinned(place) == {first}
    assert [(each.info.digest, each.pinned) for each in registry.adapters()] == [
        (second, False),
        (first, True),
    ]
    registry = place.start()
    await place.reconciler(registry).run_once()
    assert pinned(place) == {first}
    await registry.load("poet", pinned=False)
    registry = place.start()
    await place.reconciler(registry).run_once()
    assert pinned(place) == set()


async def test_update(place: Place) -> None:
    registry = place.start()
    digest = place.write("poet", b"1")
    with pytest.raises(AdapterNotFound, match="'poet' is not loaded"):
        await registry.update("poet", pinned=True)
    loaded = await registry.load("poet")
    for weight in (0, 101):
        with pytest.raises(InvalidRequest, match="weight must be in"):
            await registry.update("poet", weight=weight)
    assert await registry.update("poet") is loaded
    assert await registry.update("poet", weight=5, pinned=True) is loaded
    assert (loaded.weight, loaded.pinned, pinned(place)) == (5, True, {digest})
    assert await registry.update("poet", pinned=False) is loaded
    assert (loaded.weight, loaded.pinned, pinned(place)) == (5, False, set())


async def test_a_pin_that_is_not_recorded_is_undone(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise StoreFailed("the disk fails")

    registry = place.start()
    place.write("poet", b"1")
    loaded = await registry.load("poet")
    monkeypatch.setattr(Catalog, "set_pinned", fail)
    with pytest.raises(StoreFailed):
        await registry.update("poet", pinned=True)
    assert (loaded.pinned, pinned(place)) == (False, set())


async def test_a_load_that_cannot_be_pinned_changes_nothing(place: Place) -> None:
    registry = place.start()
    place.write("poet", b"1")
    old = await registry.load("poet")
    full = Full()
    full.held = place.engine.held
    registry._engine = full
    place.write("poet", b"2")
    with pytest.raises(Overloaded, match="cannot be pinned"):
        await registry.load("poet", pinned=True)
    assert registry.admission.acquire("poet") is old
    assert place.engine.held == {old.key: old.info.digest}
    assert place.kept == {old.info.digest}


async def test_a_roll_back_that_cannot_be_pinned_changes_nothing(place: Place) -> None:
    registry = place.start()
    place.write("poet", b"1")
    old = await registry.load("poet")
    digest = place.write("poet", b"2")
    new = await registry.load("poet", pinned=True)
    full = Full()
    registry._engine = full
    with pytest.raises(Overloaded, match="cannot be pinned"):
        await registry.roll_back("poet")
    assert registry.admission.acquire("poet") is new
    assert (new.pinned, old.pinned, pinned(place)) == (True, False, {digest})


async def test_a_roll_back_that_is_not_recorded_is_undone(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise StoreFailed("the disk fails")

    registry = place.start()
    place.write("poet", b"1")
    old = await registry.load("poet")
    digest = place.write("poet", b"2")
    new = await registry.load("poet", pinned=True)
    monkeypatch.setattr(Catalog, "roll_back", fail)
    with pytest.raises(StoreFailed):
        await registry.roll_back("poet")
    assert registry.admission.acquire("poet") is new
    assert (new.pinned, old.pinned, pinned(place)) == (True, False, {digest})


async def test_a_restart_with_less_room_serves_unpinned(place: Place) -> None:
    registry = place.start()
    place.write("poet", b"1")
    await registry.load("poet", pinned=True)
    place.start()
    registry = AdapterRegistry(Full(), place.libraries[0])
    await place.reconciler(registry).run_once()
    (served,) = registry.adapters()
    assert not served.pinned
    assert served.info == AdapterInfo(served.info.digest, 4, 2, 100)
