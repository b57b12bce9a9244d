"""What should be served is: after a restart, after a change in the source, after a failure."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest

from lorax_serve.core import AdapterInfo
from lorax_serve.errors import AdapterRejected, Overloaded, SourceFailed, StoreFailed
from lorax_serve.registry.version import Adapter
from lorax_serve.store.catalog import NameRecord
from lorax_serve.store.digest import CONFIG_FILE, WEIGHTS_FILE
from tests.registry.place import Place, overwrite
from tests.server.harness import until


async def test_a_restart_serves_what_was_acknowledged(place: Place) -> None:
    registry = place.start()
    first = place.write("poet", b"1")
    await registry.load("poet", weight=7)
    place.write("poet", b"2")
    before = await registry.load("poet")
    place.write("pilot", b"3")
    await registry.load("pilot")
    await registry.unload("pilot")
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        (place.source / "pilot" / file).unlink()
    (place.source / "pilot").rmdir()

    registry = place.start()
    await place.reconciler(registry).run_once()
    (after,) = registry.adapters()
    assert (after.name, after.version, after.weight) == ("poet", before.version, 7)
    assert after.info == before.info
    assert place.engine.loads == 1  # nothing was fetched again
    # An earlier version is still there, on disk.
    old = await registry.admission.admit(f"poet@{first}")
    assert old.info.digest == first
    assert (await registry.roll_back("poet")) is old


async def test_a_restart_loads_what_has_changed_in_the_source(place: Place) -> None:
    registry = place.start()
    place.write("poet", b"1")
    place.write("pilot", b"2")
    await place.reconciler(registry).run_once()
    assert {adapter.name for adapter in registry.adapters()} == {"poet", "pilot"}
    changed = place.write("poet", b"3")
    place.write("bad", b"bad")
    registry = place.start()
    reconciler = place.reconciler(registry)
    await reconciler.run_once()
    assert {name: type(error) for name, error in reconciler.failures.items()} == {
        "bad": AdapterRejected
    }
    assert registry.admission.acquire("poet").info.digest == changed
    assert {adapter.name for adapter in registry.adapters()} == {"poet", "pilot"}
    assert len(place.kept) == 3


async def test_a_change_is_loaded_and_what_is_the_same_is_not_fetched(place: Place) -> None:
    registry = place.start()
    reconciler = place.reconciler(registry)
    place.write("poet", b"1")
    await reconciler.run_once()
    await reconciler.run_once()
    assert place.engine.loads == 1
    changed = place.write("poet", b"2")
    await reconciler.run_once()
    assert registry.admission.acquire("poet").info.digest == changed
    assert place.engine.loads == 2


async def test_what_was_touched_but_not_changed_is_fetched_once(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = place.start()
    reconciler = place.reconciler(registry)
    place.write("poet", b"1")
    await reconciler.run_once()
    (before,) = registry.adapters()
    fetches = place.count_fetches(monkeypatch)
    place.write("poet", b"1")
    for _ in range(3):
        await reconciler.run_once()
    assert fetches == ["poet"]
    assert registry.adapters() == [before]
    # Also after a restart, which gives what was acknowledged the number that it had.
    registry = place.start()
    fetches = place.count_fetches(monkeypatch)
    await place.reconciler(registry).run_once()
    assert fetches == []
    assert [adapter.version for adapter in registry.adapters()] == [before.version]


async def test_a_name_that_was_loaded_from_elsewhere_is_left_alone(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = place.start()
    reconciler = place.reconciler(registry)
    place.write("copy", b"1")
    adapter = await registry.load("poet", "copy")
    place.write("poet", b"2")
    fetches = place.count_fetches(monkeypatch)
    for _ in range(3):
        await reconciler.run_once()
    assert fetches == ["copy"]
    assert registry.admission.acquire("poet") is adapter


async def test_a_roll_back_stands_until_the_source_changes(place: Place) -> None:
    registry = place.start()
    reconciler = place.reconciler(registry)
    first = place.write("poet", b"1")
    await reconciler.run_once()
    place.write("poet", b"2")
    await reconciler.run_once()
    await registry.roll_back("poet")
    await reconciler.run_once()
    assert registry.admission.acquire("poet").info.digest == first
    third = place.write("poet", b"3")
    await reconciler.run_once()
    assert registry.admission.acquire("poet").info.digest == third


async def test_a_roll_back_stands_when_the_source_was_touched_but_not_changed(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = place.start()
    reconciler = place.reconciler(registry)
    first = place.write("poet", b"1")
    await reconciler.run_once()
    second = place.write("poet", b"2")
    await reconciler.run_once()
    back = await registry.roll_back("poet")
    fetches = place.count_fetches(monkeypatch)
    place.write("poet", b"2")
    for _ in range(3):
        await reconciler.run_once()
    assert fetches == ["poet"]
    assert registry.admission.acquire("poet") is back
    # Also after a restart, and if it was touched while the server was away.
    place.write("poet", b"2")
    registry = place.start()
    reconciler = place.reconciler(registry)
    await reconciler.run_once()
    assert registry.admission.acquire("poet").info.digest == first
    assert (await registry.load("poet")).info.digest == second, "by hand it can be loaded"
    await registry.roll_back("poet")
    place.write("poet", b"1")
    await reconciler.run_once()
    place.write("poet", b"2")
    await reconciler.run_once()
    assert registry.admission.acquire("poet").info.digest == second, "the source had other content"


async def test_what_was_unloaded_stays_away_when_it_was_touched_but_not_changed(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = place.start()
    reconciler = place.reconciler(registry)
    place.write("poet", b"1")
    await reconciler.run_once()
    await registry.unload("poet")
    fetches = place.count_fetches(monkeypatch)
    place.write("poet", b"1")
    for _ in range(3):
        await reconciler.run_once()
    assert fetches == ["poet"]
    assert not registry.is_loaded("poet")
    assert (place.engine.held, place.kept) == ({}, set())
    changed = place.write("poet", b"2")
    await reconciler.run_once()
    assert registry.admission.acquire("poet").info.digest == changed


async def test_what_is_loaded_during_a_pass_is_not_replaced_by_what_was_seen_before(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = place.start()
    place.write("copy", b"1")
    place.write("poet", b"2")
    library = place.libraries[0]
    listing, loaded = library.listing, list[Adapter]()

    async def listing_then_load() -> dict[str, str] | None:
        listed = await listing()
        loaded.append(await registry.load("poet", "copy"))
        return listed

    monkeypatch.setattr(library, "listing", listing_then_load)
    await place.reconciler(registry).run_once()
    assert registry.admission.acquire("poet") is loaded[0]


async def test_what_is_unloaded_during_a_pass_does_not_come_back(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = place.start()
    place.write("poet", b"1")
    await registry.load("poet")
    names = place.libraries[0].names

    async def names_then_unload() -> list[NameRecord]:
        records = await names()
        await registry.unload("poet")
        return records

    monkeypatch.setattr(place.libraries[0], "names", names_then_unload)
    await place.reconciler(registry, from_source=False).run_once()
    assert registry.adapters() == []
    assert (place.engine.held, place.kept) == ({}, set())


@pytest.mark.parametrize("alias", [False, True])
async def test_what_was_unloaded_comes_back_only_when_it_has_changed(
    place: Place, alias: bool
) -> None:
    registry = place.start()
    reconciler = place.reconciler(registry)
    place.write("poet", b"1")
    place.write("copy", b"2")
    if alias:
        await registry.load("poet", "copy")
    await reconciler.run_once()
    await registry.unload("poet")
    await reconciler.run_once()
    assert not registry.is_loaded("poet")
    registry = place.start()
    reconciler = place.reconciler(registry)
    await reconciler.run_once()
    assert not registry.is_loaded("poet"), "nor after a restart"
    changed = place.write("poet", b"3")
    await reconciler.run_once()
    assert registry.admission.acquire("poet").info.digest == changed


async def test_what_was_unloaded_can_be_loaded(place: Place) -> None:
    registry = place.start()
    reconciler = place.reconciler(registry)
    digest = place.write("poet", b"1")
    await reconciler.run_once()
    await registry.unload("poet")
    await registry.load("poet")
    registry = place.start()
    await place.reconciler(registry).run_once()
    assert registry.admission.acquire("poet").info.digest == digest


async def test_what_disappears_from_the_source_stays(place: Place) -> None:
    registry = place.start()
    reconciler = place.reconciler(registry)
    place.write("poet", b"1")
    await reconciler.run_once()
    shutil.rmtree(place.source / "poet")
    await reconciler.run_once()
    assert registry.is_loaded("poet")
    assert reconciler.failures == {}


async def test_what_was_refused_is_tried_again_when_it_has_changed(place: Place) -> None:
    registry = place.start()
    reconciler = place.reconciler(registry)
    place.write("poet", b"bad")
    for place.now in (0.0, 1000.0):
        await reconciler.run_once()
    assert place.engine.loads == 1
    assert isinstance(reconciler.failures["poet"], AdapterRejected)
    place.write("poet", b"good")
    await reconciler.run_once()
    assert registry.is_loaded("poet")
    assert reconciler.failures == {}


async def test_a_source_that_is_gone_is_tried_again_after_longer_and_longer(place: Place) -> None:
    registry = place.start()
    reconciler = place.reconciler(registry)
    place.write("poet", b"1")
    elsewhere = place.source.rename(place.source.with_name("elsewhere"))
    await reconciler.run_once()
    (error,) = reconciler.failures.values()
    assert isinstance(error, SourceFailed)
    elsewhere.rename(place.source)
    await reconciler.run_once()
    assert not registry.is_loaded("poet")  # it is left alone for a second
    place.now = 1.0
    await reconciler.run_once()
    assert registry.is_loaded("poet")
    assert reconciler.failures == {}


async def test_a_pass_that_breaks_is_not_the_last(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = place.start()
    reconciler = place.reconciler(registry)
    place.write("poet", b"1")
    passes = iter([StoreFailed("the disk"), ZeroDivisionError("a bug")])
    run_once = reconciler.run_once

    async def broken_at_first() -> None:
        for error in passes:
            raise error
        await run_once()

    monkeypatch.setattr(reconciler, "run_once", broken_at_first)
    running = asyncio.create_task(reconciler.run_for_ever(0))
    await until(lambda: registry.is_loaded("poet"))
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running


async def test_content_that_was_lost_is_fetched_again(place: Place) -> None:
    registry = place.start()
    digest = place.write("poet", b"1")
    await place.reconciler(registry).run_once()
    place.stop()
    shutil.rmtree(place.state / "adapters" / digest)
    registry = place.start()
    await place.reconciler(registry).run_once()
    assert registry.admission.acquire("poet").info.digest == digest
    assert place.kept == {digest}


@pytest.mark.parametrize("damage", [b"X", b"bad"])
async def test_content_that_was_damaged_is_fetched_again_and_never_served(
    place: Place, damage: bytes
) -> None:
    registry = place.start()
    digest = place.write("poet", b"1")
    await place.reconciler(registry).run_once()
    place.stop()
    overwrite(place.state / "adapters" / digest / WEIGHTS_FILE, damage)
    registry = place.start()
    await place.reconciler(registry).run_once()
    assert registry.admission.acquire("poet").info.digest == digest
    assert (set(place.engine.held.values()), place.kept) == ({digest}, {digest})
    place.stop()
    overwrite(place.state / "adapters" / digest / WEIGHTS_FILE, damage)
    shutil.rmtree(place.source)
    registry = place.start()
    reconciler = place.reconciler(registry, from_source=False)
    await reconciler.run_once()
    assert not registry.is_loaded("poet")
    assert place.engine.held == {}
    place.stop()
    registry = place.start(source=False)
    reconciler = place.reconciler(registry)
    await reconciler.run_once()
    assert isinstance(reconciler.failures["poet"], StoreFailed)
    assert f"the content {digest} has been damaged" in str(reconciler.failures["poet"])


async def test_content_that_is_fetched_again_keeps_weight_and_pin(place: Place) -> None:
    registry = place.start()
    digest = place.write("poet", b"1")
    await registry.load("poet", weight=7, pinned=True)
    place.stop()
    shutil.rmtree(place.state / "adapters" / digest)
    registry = place.start()
    await place.reconciler(registry).run_once()
    adapter = registry.admission.acquire("poet")
    assert (adapter.weight, adapter.pinned, place.engine.pinned) == (7, True, {adapter.key})


async def test_what_takes_the_place_of_what_was_not_restored_keeps_weight_and_pin(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = place.start()
    first = place.write("poet", b"1")
    await registry.load("poet", weight=7, pinned=True)
    second = place.write("poet", b"2")
    registry = place.start()
    load = place.engine.load_adapter

    async def too_large_at_first(version: int, path: str) -> AdapterInfo:
        if Path(path).name == first:
            raise Overloaded("it does not fit")
        return await load(version, path)

    monkeypatch.setattr(place.engine, "load_adapter", too_large_at_first)
    reconciler = place.reconciler(registry)
    await reconciler.run_once()
    adapter = registry.admission.acquire("poet")
    assert reconciler.failures == {}
    assert (adapter.info.digest, adapter.weight, adapter.pinned) == (second, 7, True)


async def test_a_roll_back_that_is_lost_is_not_replaced_by_what_it_went_back_from(
    place: Place,
) -> None:
    registry = place.start()
    first = place.write("poet", b"1")
    await registry.load("poet")
    place.write("poet", b"2")
    await registry.load("poet")
    await registry.roll_back("poet")
    place.stop()
    shutil.rmtree(place.state / "adapters" / first)
    registry = place.start()
    reconciler = place.reconciler(registry)
    await reconciler.run_once()
    assert not registry.is_loaded("poet")
    assert isinstance(reconciler.failures["poet"], StoreFailed)


async def test_an_earlier_version_that_was_damaged_is_refused(place: Place) -> None:
    registry = place.start()
    first = place.write("poet", b"1")
    await registry.load("poet")
    second = place.write("poet", b"2")
    await registry.load("poet")
    registry = place.start()
    await place.reconciler(registry).run_once()
    overwrite(place.state / "adapters" / first / WEIGHTS_FILE, b"X")
    with pytest.raises(StoreFailed, match=first):
        await registry.admission.admit(f"poet@{first}")
    with pytest.raises(StoreFailed, match=first):
        await registry.roll_back("poet")
    assert registry.admission.acquire("poet").info.digest == second
    assert set(place.engine.held.values()) == {second}


async def test_content_that_is_lost_for_good_is_told(place: Place) -> None:
    registry = place.start()
    digest = place.write("poet", b"1")
    place.write("pilot", b"2")
    await place.reconciler(registry).run_once()
    place.stop()
    shutil.rmtree(place.state / "adapters" / digest)
    registry = place.start(source=False)
    reconciler = place.reconciler(registry)
    await reconciler.run_once()
    assert {name: type(error) for name, error in reconciler.failures.items()} == {
        "poet": StoreFailed
    }
    assert registry.is_loaded("pilot")


async def test_a_source_for_demand_is_not_listed(place: Place) -> None:
    registry = place.start(on_demand=True)
    place.write("poet", b"1")
    await place.reconciler(registry, from_source=False).run_once()
    assert registry.adapters() == []
