"""Versions that are kept on disk: digests, rolling back, restarts, loads on demand."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from lorax_serve.core import AdapterInfo, Freed
from lorax_serve.errors import (
    AdapterConflict,
    AdapterNotFound,
    AdapterRejected,
    InvalidRequest,
    LoraxError,
    SourceFailed,
    SourceReason,
)
from lorax_serve.registry.in_place import InPlace
from lorax_serve.registry.registry import AdapterRegistry
from lorax_serve.registry.upload import Upload
from lorax_serve.registry.version import Adapter, AdapterState
from lorax_serve.sources import FetchLimits
from lorax_serve.store.content import ContentStore
from lorax_serve.store.digest import CONFIG_FILE, WEIGHTS_FILE
from tests.registry.place import Engine, Place, overwrite
from tests.server.harness import until


async def test_a_name_and_its_versions_by_digest(place: Place) -> None:
    registry = place.start()
    one = place.write("poet", b"1")
    first = await registry.load("poet")
    two = place.write("poet", b"2")
    second = await registry.load("poet")
    assert (first.info.digest, second.info.digest) == (one, two)
    assert second.version > first.version
    assert first.state is AdapterState.SUPERSEDED
    assert registry.admission.acquire("poet") is second
    assert registry.admission.acquire(f"poet@{one[:12]}") is first
    assert registry.admission.acquire(f"poet@{two}") is second
    with pytest.raises(AdapterNotFound):
        registry.admission.acquire(f"poet@{'0' * 12}")
    with pytest.raises(InvalidRequest, match="12 to 64 hexadecimal digits"):
        registry.admission.acquire(f"poet@{one[:11]}")
    message = f"'poet@0{{12}}' is not loaded; 'poet' means {two[:12]} now, .* are: {one[:12]}$"
    with pytest.raises(AdapterNotFound, match=message):
        await registry.admission.admit(f"poet@{'0' * 12}")


async def test_rolling_back_and_forth(place: Place) -> None:
    registry = place.start()
    digests = []
    for weights in (b"1", b"2", b"3"):
        digests.append(place.write("poet", weights))
        last = await registry.load("poet")
    loads = place.engine.loads
    back = await registry.roll_back("poet")
    assert back.info.digest == digests[1]
    assert back.version > last.version
    assert registry.admission.acquire("poet") is back
    assert place.engine.loads == loads  # it was there
    assert (await registry.roll_back("poet")).info.digest == digests[2]
    assert (await registry.roll_back("poet", digests[0][:20])).info.digest == digests[0]
    with pytest.raises(AdapterConflict, match=r"no earlier version 0{12}; it has: "):
        await registry.roll_back("poet", "0" * 12)
    with pytest.raises(AdapterNotFound):
        await registry.roll_back("pilot")


async def test_history_is_bounded_and_what_falls_out_of_it_is_freed(place: Place) -> None:
    registry = place.start(history=2)
    digests = []
    for number in range(6):
        digests.append(place.write("poet", bytes([number])))
        await registry.load("poet")
    await until(lambda: len(place.engine.held) == 3)
    await until(lambda: place.kept == set(digests[3:]))
    assert set(place.engine.held.values()) == set(digests[3:])


async def test_a_version_in_use_stays_until_its_last_request(place: Place) -> None:
    registry = place.start(history=0)
    one = place.write("poet", b"1")
    await registry.load("poet")
    used = registry.admission.acquire("poet")
    place.write("poet", b"2")
    await registry.load("poet")
    assert one in place.kept
    registry.admission.release(used)
    await until(lambda: one not in place.kept)
    assert one not in place.engine.held.values()


async def test_unloading_forgets_all_versions_and_their_files(place: Place) -> None:
    registry = place.start()
    for weights in (b"1", b"2"):
        place.write("poet", weights)
        await registry.load("poet")
    sizes = [len(b"{}") + 1, len(b"{}") + 1]
    assert await registry.unload("poet") == Freed(host=200, disk=sum(sizes))
    assert (place.engine.held, place.kept) == ({}, set())


async def test_unloading_after_a_restart_deletes_versions_that_were_not_in_memory(
    place: Place,
) -> None:
    registry = place.start()
    for weights in (b"1", b"2", b"3"):
        place.write("poet", weights)
        await registry.load("poet")
    registry = place.start()
    await place.reconciler(registry, from_source=False).run_once()
    assert len(place.engine.held) == 1
    assert await registry.unload("poet") == Freed(host=100, disk=3 * (len(b"{}") + 1))
    assert place.kept == set()


async def test_what_falls_out_of_history_after_a_restart_is_deleted(place: Place) -> None:
    registry = place.start(history=1)
    digests = []
    for weights in (b"1", b"2"):
        digests.append(place.write("poet", weights))
        await registry.load("poet")
    registry = place.start(history=1)
    await place.reconciler(registry, from_source=False).run_once()
    digests.append(place.write("poet", b"3"))
    await registry.load("poet")
    await until(lambda: place.kept == set(digests[1:]))


async def test_files_stay_until_the_last_version_that_is_read_from_them_ends(place: Place) -> None:
    registry = place.start()
    digest = place.write("poet", b"1")
    await registry.load("poet")
    await registry.load("twin", "poet")
    used = registry.admission.acquire("poet")
    unloading = asyncio.create_task(registry.unload("poet"))
    await until(lambda: not registry.is_loaded("poet"))
    await registry.unload("twin")
    assert place.kept == {digest}, "a running request may have to read it again"
    registry.admission.release(used)
    assert (await unloading).disk == len(b"{}") + 1
    assert place.kept == set()


async def test_a_version_that_a_request_and_a_roll_back_want_is_read_once(place: Place) -> None:
    registry = place.start()
    first = place.write("poet", b"1")
    await registry.load("poet")
    place.write("poet", b"2")
    await registry.load("poet")
    registry = place.start()
    await place.reconciler(registry, from_source=False).run_once()
    asked, back = await asyncio.gather(
        registry.admission.admit(f"poet@{first}"),
        registry.roll_back("poet"),
        return_exceptions=True,
    )
    assert isinstance(back, Adapter)
    assert registry.admission.acquire("poet") is back
    assert asked is back or isinstance(asked, AdapterConflict)
    await registry.load("poet", weight=2)
    assert len(place.engine.held) == 2
    assert {adapter.key for adapter in registry.adapters()} == set(place.engine.held)


async def test_a_version_is_not_brought_back_once_its_name_means_other_content(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = place.start()
    first = place.write("poet", b"1")
    await registry.load("poet")
    place.write("poet", b"2")
    await registry.load("poet")
    registry = place.start()
    await place.reconciler(registry, from_source=False).run_once()
    load = place.engine.load_adapter

    async def load_while_the_name_is_given_away(version: int, path: str) -> AdapterInfo:
        monkeypatch.setattr(place.engine, "load_adapter", load)
        info = await load(version, path)
        await registry.unload("poet")
        place.write("poet", b"3")
        await registry.load("poet")
        return info

    monkeypatch.setattr(place.engine, "load_adapter", load_while_the_name_is_given_away)
    with pytest.raises(AdapterConflict, match="was changed by another call"):
        await registry.admission.admit(f"poet@{first}")
    (adapter,) = registry.adapters()
    assert set(place.engine.held) == {adapter.key}


@pytest.mark.parametrize("step", ["stage", "commit"])
async def test_an_upload_that_is_cancelled_while_the_disk_works_leaves_nothing(
    place: Place, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    registry = place.start()
    digest = place.write("poet", b"1")
    reached, go = threading.Event(), threading.Event()
    work = getattr(ContentStore, step)

    def slow(*arguments: Any) -> Any:
        reached.set()
        assert go.wait(10)
        return work(*arguments)

    async def chunks() -> AsyncIterator[bytes]:
        yield b"{}1"

    monkeypatch.setattr(ContentStore, step, slow)
    uploading = asyncio.create_task(registry.upload("poet", Upload(digest, 2, 1, chunks())))
    await until(reached.is_set)
    uploading.cancel()
    go.set()
    with pytest.raises(asyncio.CancelledError):
        await uploading
    assert (registry.adapters(), place.staged, place.kept) == ([], [], set())
    await registry.upload("poet", Upload(digest, 2, 1, chunks()))
    await registry.unload("poet")
    assert (place.staged, place.kept) == ([], set()), "nobody holds it any more"


async def test_a_refused_adapter_leaves_nothing_and_changes_nothing(place: Place) -> None:
    registry = place.start()
    good = place.write("poet", b"1")
    first = await registry.load("poet")
    place.write("poet", b"bad")
    with pytest.raises(AdapterRejected):
        await registry.load("poet")
    assert registry.admission.acquire("poet") is first
    await until(lambda: place.kept == {good})


async def test_looking_at_an_adapter_keeps_nothing_of_it(place: Place) -> None:
    registry = place.start()
    digest = place.write("poet", b"1")
    assert (await registry.inspect("poet")).digest == digest
    assert (registry.adapters(), place.engine.held, place.kept) == ([], {}, set())


async def test_requests_load_what_the_source_has_once(place: Place) -> None:
    registry = place.start(on_demand=True)
    place.write("poet", b"1")
    adapters = await asyncio.gather(*(registry.admission.admit("poet") for _ in range(5)))
    assert len(set(map(id, adapters))) == 1
    assert adapters[0].references == 5
    assert place.engine.loads == 1
    with pytest.raises(AdapterNotFound, match=r"'nobody' is not loaded, and .*nobody"):
        await registry.admission.admit("nobody")


async def test_what_failed_is_left_alone_for_a_while(place: Place) -> None:
    registry = place.start(on_demand=True)
    place.write("poet", b"bad")
    for _ in range(3):
        with pytest.raises(AdapterRejected, match=r"'poet' .* refused: it is bad"):
            await registry.admission.admit("poet")
    assert place.engine.loads == 1
    place.write("poet", b"good")
    assert (await registry.load("poet")).name == "poet"  # an operator need not wait


async def test_what_failed_is_loaded_at_once_after_somebody_has_loaded_it(place: Place) -> None:
    registry = place.start(on_demand=True)
    place.write("poet", b"bad")
    with pytest.raises(AdapterRejected):
        await registry.admission.admit("poet")
    place.write("poet", b"good")
    await registry.load("poet")
    await registry.unload("poet")
    assert (await registry.admission.admit("poet")).name == "poet"


async def test_a_name_that_cannot_be_restored_is_not_replaced_on_demand(place: Place) -> None:
    registry = place.start(on_demand=True)
    kept = place.write("copy", b"1")
    await registry.load("poet", "copy")
    other = place.write("poet", b"2")
    place.stop()
    overwrite(place.state / "adapters" / kept / WEIGHTS_FILE, b"X")
    registry = place.start(on_demand=True)
    with pytest.raises(AdapterNotFound, match=rf"'poet' .* means the digest {kept[:12]}, which"):
        await registry.admission.admit("poet")
    assert place.engine.held == {}
    assert (await registry.load("poet")).info.digest == other


@pytest.mark.parametrize("reason", [SourceReason.NOT_FOUND, SourceReason.UNAVAILABLE])
async def test_what_a_failed_load_had_in_hand_is_not_kept(
    place: Place, monkeypatch: pytest.MonkeyPatch, reason: SourceReason
) -> None:
    class Client:
        pass

    clients = []

    def fetch(path: str, into: Path, limits: FetchLimits) -> str:
        client = Client()
        clients.append(weakref.ref(client))
        raise SourceFailed(reason, "no") from OSError(client)

    registry = place.start(on_demand=True)
    monkeypatch.setattr(place.libraries[0].source, "fetch", fetch)
    for _ in range(2):
        with pytest.raises(LoraxError, match="no"):
            await registry.admission.admit("poet")
    gc.collect()
    assert [client() for client in clients] == [None]


async def test_a_source_that_is_gone_leaves_what_is_loaded_alone(place: Place) -> None:
    registry = place.start()
    place.write("poet", b"1")
    await registry.load("poet")
    place.source.rename(place.source.with_name("elsewhere"))
    with pytest.raises(SourceFailed) as caught:
        await registry.load("pilot")
    assert caught.value.reason in (SourceReason.NOT_FOUND, SourceReason.UNAVAILABLE)
    assert registry.admission.acquire("poet").name == "poet"


async def test_without_a_library_nothing_is_rolled_back(tmp_path: Path) -> None:
    (tmp_path / "poet").mkdir()
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        (tmp_path / "poet" / file).write_bytes(b"1")
    registry = AdapterRegistry(Engine(), InPlace(tmp_path))
    await registry.load("poet")
    with pytest.raises(AdapterConflict, match="--state DIR"):
        await registry.roll_back("poet")
