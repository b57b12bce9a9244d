"""Versions that are kept on disk: digests, rolling back, restarts, loads on demand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from lorax_serve.core import AdapterInfo
from lorax_serve.errors import (
    AdapterConflict,
    AdapterNotFound,
    AdapterRejected,
    InvalidRequest,
    RejectReason,
    SourceFailed,
    SourceReason,
)
from lorax_serve.frontend.library import Library
from lorax_serve.frontend.registry import AdapterRegistry, AdapterState
from lorax_serve.report import LoadReport
from lorax_serve.sources import FetchLimits, open_source
from lorax_serve.store.digest import CONFIG_FILE, WEIGHTS_FILE, digest_of
from tests.server.harness import until


class Engine:
    """Reads the digest of a directory; refuses weights that say ``bad``."""

    def __init__(self) -> None:
        self.held: dict[int, str] = {}
        self.loads = 0

    async def load_adapter(self, version: int, path: str) -> AdapterInfo:
        await asyncio.sleep(0)
        self.loads += 1
        if (Path(path) / WEIGHTS_FILE).read_bytes() == b"bad":
            raise AdapterRejected(RejectReason.BAD_FILE, "it is bad")
        digest = self.held[version] = digest_of(Path(path))
        return AdapterInfo(digest, 4, 2, 100)

    async def inspect_adapter(self, path: str) -> LoadReport:
        return LoadReport(digest=digest_of(Path(path)))

    async def drop_adapter(self, version: int) -> int:
        del self.held[version]
        return 100


class Place:
    """A source and a state directory, and servers on them one after the other."""

    def __init__(self, root: Path) -> None:
        self.source, self.state = root / "source", root / "state"
        self.source.mkdir()
        self.engine = Engine()
        self.libraries: list[Library] = []

    def write(self, name: str, weights: bytes) -> str:
        directory = self.source / name
        directory.mkdir(exist_ok=True)
        for file, content in ((CONFIG_FILE, b"{}"), (WEIGHTS_FILE, weights)):
            (directory / f"{file}.new").write_bytes(content)
            (directory / f"{file}.new").replace(directory / file)
        return digest_of(directory)

    def start(self, *, on_demand: bool = False, history: int = 2) -> AdapterRegistry:
        self.stop()
        self.engine = Engine()
        limits = FetchLimits(1000, 10)
        self.libraries = [Library(self.state, open_source(str(self.source)), limits, history)]
        return AdapterRegistry(
            self.engine, None, None, self.libraries[0], history=history, on_demand=on_demand
        )

    def stop(self) -> None:
        for library in self.libraries:
            library.close()

    @property
    def kept(self) -> set[str]:
        """The digests on disk."""
        return {each.name for each in (self.state / "adapters").iterdir()}


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Place]:
    place = Place(tmp_path)
    yield place
    place.stop()


async def test_a_name_and_its_versions_by_digest(place: Place) -> None:
    registry = place.start()
    one = place.write("poet", b"1")
    first = await registry.load("poet")
    two = place.write("poet", b"2")
    second = await registry.load("poet")
    assert (first.info.digest, second.info.digest) == (one, two)
    assert second.version > first.version
    assert first.state is AdapterState.SUPERSEDED
    assert registry.acquire("poet") is second
    assert registry.acquire(f"poet@{one[:12]}") is first
    assert registry.acquire(f"poet@{two}") is second
    with pytest.raises(AdapterNotFound):
        registry.acquire(f"poet@{'0' * 12}")
    with pytest.raises(InvalidRequest, match="12 to 64 hexadecimal digits"):
        registry.acquire(f"poet@{one[:11]}")


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
    assert registry.acquire("poet") is back
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
    used = registry.acquire("poet")
    place.write("poet", b"2")
    await registry.load("poet")
    assert one in place.kept
    registry.release(used)
    await until(lambda: one not in place.kept)
    assert one not in place.engine.held.values()


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
    assert await registry.load_all() == {}
    (after,) = registry.adapters()
    assert (after.name, after.version, after.weight) == ("poet", before.version, 7)
    assert after.info == before.info
    assert place.engine.loads == 1  # nothing was fetched again
    # An earlier version is still there, on disk.
    old = await registry.admit(f"poet@{first}")
    assert old.info.digest == first
    assert (await registry.roll_back("poet")) is old


async def test_a_restart_loads_what_has_changed_in_the_source(place: Place) -> None:
    registry = place.start()
    place.write("poet", b"1")
    place.write("pilot", b"2")
    assert await registry.load_all() == {}
    changed = place.write("poet", b"3")
    place.write("bad", b"bad")
    registry = place.start()
    failures = await registry.load_all()
    assert {name: type(error) for name, error in failures.items()} == {"bad": AdapterRejected}
    assert registry.acquire("poet").info.digest == changed
    assert {adapter.name for adapter in registry.adapters()} == {"poet", "pilot"}
    assert len(place.kept) == 3


async def test_unloading_forgets_all_versions_and_their_files(place: Place) -> None:
    registry = place.start()
    for weights in (b"1", b"2"):
        place.write("poet", weights)
        await registry.load("poet")
    assert await registry.unload("poet") == 200
    assert (place.engine.held, place.kept) == ({}, set())
    assert await place.start().load_all() == {}


async def test_a_refused_adapter_leaves_nothing_and_changes_nothing(place: Place) -> None:
    registry = place.start()
    good = place.write("poet", b"1")
    first = await registry.load("poet")
    place.write("poet", b"bad")
    with pytest.raises(AdapterRejected):
        await registry.load("poet")
    assert registry.acquire("poet") is first
    await until(lambda: place.kept == {good})


async def test_looking_at_an_adapter_keeps_nothing_of_it(place: Place) -> None:
    registry = place.start()
    digest = place.write("poet", b"1")
    assert (await registry.inspect("poet")).digest == digest
    assert (registry.adapters(), place.engine.held, place.kept) == ([], {}, set())


async def test_requests_load_what_the_source_has_once(place: Place) -> None:
    registry = place.start(on_demand=True)
    place.write("poet", b"1")
    assert await registry.load_all() == {}
    assert registry.adapters() == []
    adapters = await asyncio.gather(*(registry.admit("poet") for _ in range(5)))
    assert len(set(map(id, adapters))) == 1
    assert adapters[0].references == 5
    assert place.engine.loads == 1
    with pytest.raises(AdapterNotFound, match=r"'nobody' is not loaded, and .*nobody"):
        await registry.admit("nobody")


async def test_what_failed_is_left_alone_for_a_while(place: Place) -> None:
    registry = place.start(on_demand=True)
    place.write("poet", b"bad")
    for _ in range(3):
        with pytest.raises(AdapterRejected, match="it is bad"):
            await registry.admit("poet")
    assert place.engine.loads == 1
    place.write("poet", b"good")
    assert (await registry.load("poet")).name == "poet"  # an operator need not wait


async def test_a_source_that_is_gone_leaves_what_is_loaded_alone(place: Place) -> None:
    registry = place.start()
    place.write("poet", b"1")
    await registry.load("poet")
    place.source.rename(place.source.with_name("elsewhere"))
    with pytest.raises(SourceFailed) as caught:
        await registry.load("pilot")
    assert caught.value.reason in (SourceReason.NOT_FOUND, SourceReason.UNAVAILABLE)
    assert registry.acquire("poet").name == "poet"


async def test_without_a_library_nothing_is_rolled_back(tmp_path: Path) -> None:
    (tmp_path / "poet").mkdir()
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        (tmp_path / "poet" / file).write_bytes(b"1")
    registry = AdapterRegistry(Engine(), tmp_path)
    await registry.load("poet")
    with pytest.raises(AdapterConflict, match="--state DIR"):
        await registry.roll_back("poet")
