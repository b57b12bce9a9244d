"""A source that hangs: what it holds up, for how long, and what it leaves behind."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from lorax_serve.errors import AdapterConflict, SourceFailed, SourceReason
from lorax_serve.registry import library
from lorax_serve.registry.source_threads import SourceThreads
from lorax_serve.sources import FetchLimits
from tests.registry.place import Place
from tests.server.harness import until

MOST = library._MOST_FETCHES


class Gate:
    """Stands before a source: what is asked for a name in ``closed`` waits for ``open``."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.closed: set[str] = set()
        self.waiting: list[str] = []

    def put_before(self, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
        source = place.libraries[0].source
        assert source is not None
        fetch, listing = source.fetch, source.list  # type: ignore[attr-defined]

        def gated_fetch(path: str, into: Path, limits: FetchLimits) -> str:
            self._pass(path)
            return fetch(path, into, limits)

        def gated_listing() -> object:
            self._pass("list")
            return listing()

        monkeypatch.setattr(source, "fetch", gated_fetch)
        monkeypatch.setattr(source, "list", gated_listing)

    def _pass(self, name: str) -> None:
        if name in self.closed:
            self.waiting.append(name)
            self.open.wait()


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.open.set()


async def test_it_holds_up_neither_the_disk_nor_what_it_does_give(
    place: Place, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = place.start(on_demand=True)
    gate.put_before(place, monkeypatch)
    for weights in (b"1", b"2"):
        place.write("poet", weights)
        await registry.load("poet")
    gate.closed = {f"hung{number}" for number in range(MOST)}
    for name in (*gate.closed, "pilot", "pirate"):
        place.write(name, name.encode())
    *most, last = sorted(gate.closed)
    asking = [asyncio.create_task(registry.admission.admit(name)) for name in most]
    await until(lambda: len(gate.waiting) == MOST - 1)
    # There is a place left for what the source gives.
    assert (await registry.admission.admit("pilot")).name == "pilot"
    asking.append(asyncio.create_task(registry.admission.admit(last)))
    await until(lambda: len(gate.waiting) == MOST)
    # There is none, and the disk and the catalogue still work.
    asking.append(asyncio.create_task(registry.admission.admit("pirate")))
    await registry.roll_back("poet")
    await registry.unload("poet")
    assert await place.libraries[0].history("pilot") == []
    gate.open.set()
    names = {adapter.name for adapter in await asyncio.gather(*asking)}
    assert names == {*gate.closed, "pirate"}


async def test_a_fetch_that_hangs_ends_for_the_caller_and_for_the_name(
    place: Place, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one from a mount does, which no time-out of the network ends."""
    monkeypatch.setattr(library, "_GRACE_SECONDS", 0.05)
    registry = place.start(on_demand=True, fetch_seconds=0.05)
    gate.put_before(place, monkeypatch)
    gate.closed = {"poet"}
    place.write("poet", b"1")
    with pytest.raises(SourceFailed, match=r"source/poet: the source gave nothing within") as found:
        await registry.admission.admit("poet")
    assert found.value.reason is SourceReason.TIMEOUT
    assert place.staged == []
    with pytest.raises(SourceFailed, match="gave nothing"):
        await registry.admission.admit("poet")  # at once
    assert gate.waiting == ["poet"]
    gate.closed = set()
    place.now = 1.0
    assert (await registry.admission.admit("poet")).name == "poet"


async def test_a_listing_that_hangs_is_waited_for_by_one_thread(
    place: Place, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "_GRACE_SECONDS", 0.05)
    registry = place.start(fetch_seconds=0.05)
    gate.put_before(place, monkeypatch)
    gate.closed = {"list"}
    place.write("poet", b"1")
    reconciler = place.reconciler(registry)
    for place.now in (0.0, 10.0, 20.0):
        await reconciler.run_once()
        (error,) = reconciler.failures.values()
        assert isinstance(error, SourceFailed)
        assert error.reason is SourceReason.TIMEOUT
    assert gate.waiting == ["list"]
    gate.open.set()
    place.now = 100.0
    await reconciler.run_once()
    assert reconciler.failures == {}
    assert registry.is_loaded("poet")


async def test_a_pass_does_not_wait_for_everything_that_hangs(
    place: Place, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "_GRACE_SECONDS", 0.05)
    registry = place.start(fetch_seconds=0.05)
    gate.put_before(place, monkeypatch)
    gate.closed = set("abcde")
    for name in "abcdexyz":
        place.write(name, name.encode())
    reconciler = place.reconciler(registry)
    await reconciler.run_once()
    assert gate.waiting == ["a", "b", "c"]
    assert registry.adapters() == []
    # What has failed does not come first again.
    await reconciler.run_once()
    assert gate.waiting == ["a", "b", "c", "d", "e"]
    assert [adapter.name for adapter in registry.adapters()] == ["x", "y", "z"]
    assert set(reconciler.failures) == set("abcde")
    gate.closed = set()
    place.now = 1.0
    await reconciler.run_once()
    assert len(registry.adapters()) == 8
    assert reconciler.failures == {}


async def test_looking_at_an_adapter_leaves_nothing_if_the_caller_goes_away(
    place: Place, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = place.start()
    gate.put_before(place, monkeypatch)
    gate.closed = {"poet"}
    place.write("poet", b"1")
    looking = asyncio.create_task(registry.inspect("poet"))
    await until(lambda: gate.waiting == ["poet"])
    looking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await looking
    gate.open.set()
    await until(lambda: place.staged == [])
    await until(lambda: not registry._background)
    assert place.kept == set()


async def test_a_registry_that_is_closed_waits_for_no_fetch(
    place: Place, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = place.start()
    gate.put_before(place, monkeypatch)
    gate.closed = {"poet"}
    place.write("poet", b"1")
    loading = asyncio.create_task(registry.load("poet"))
    await until(lambda: gate.waiting == ["poet"])
    with pytest.raises(AdapterConflict):
        await registry.load("poet")
    await registry.close()
    with pytest.raises(asyncio.CancelledError):
        await loading
    assert place.staged == []


async def test_a_call_that_fails_gives_its_thread_back() -> None:
    threads = SourceThreads(1)

    def fail() -> None:
        raise SourceFailed(SourceReason.DENIED, "no")

    for _ in range(3):
        with pytest.raises(SourceFailed, match="no"):
            await threads.run(fail, 10)
    assert await threads.run(lambda: "yes", 10) == "yes"
