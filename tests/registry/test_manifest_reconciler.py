"""What a manifest says is served, and nothing else: whatever happens to it, or to the sources."""

from __future__ import annotations

import asyncio
import logging
import shutil
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import yaml

from lorax_serve.errors import AdapterRejected, InvalidRequest, LoraxError, SourceFailed
from lorax_serve.registry import manifest_reconciler
from lorax_serve.registry.manifest import Manifest
from lorax_serve.registry.manifest_reader import ManifestReader
from lorax_serve.registry.manifest_reconciler import ManifestReconciler
from lorax_serve.registry.registry import AdapterRegistry
from lorax_serve.sources import FetchLimits
from lorax_serve.sources.directory import DirectorySource
from lorax_serve.store.digest import WEIGHTS_FILE
from tests.registry.place import Place, overwrite
from tests.server.harness import until


class Followed:
    """A manifest, and servers that follow it one after the other."""

    def __init__(self, place: Place, path: Path) -> None:
        self.place, self.path = place, path
        self.registry: AdapterRegistry
        self.reconciler: ManifestReconciler
        self.started: list[ManifestReconciler] = []

    def write(self, *entries: dict[str, Any] | str) -> None:
        """Entries; a name alone is of the directory that is called so."""
        listed = [{"name": e, "source": e} if isinstance(e, str) else e for e in entries]
        self.path.write_text(yaml.safe_dump({"adapters": listed}))

    async def start(self, reader: ManifestReader | None = None) -> None:
        self.registry = self.place.start(source=False)
        self.reconciler = ManifestReconciler(
            self.registry,
            self.place.libraries[0],
            reader or ManifestReader(str(self.path)),
            self.place.source,
            clock=lambda: self.place.now,
        )
        self.started.append(self.reconciler)
        await self.reconciler.run_once()

    async def run(self) -> None:
        await self.reconciler.run_once()

    @property
    def served(self) -> dict[str, str]:
        """Digests by name."""
        return {each.name: each.info.digest for each in self.registry._names._current.values()}

    @property
    def failures(self) -> dict[str, LoraxError]:
        return self.reconciler.failures


@pytest_asyncio.fixture
async def followed(place: Place, tmp_path: Path) -> AsyncIterator[Followed]:
    followed = Followed(place, tmp_path / "adapters.yaml")
    yield followed
    for reconciler in followed.started:
        await reconciler.close()


async def test_what_is_added_changed_and_taken_out(followed: Followed) -> None:
    poet, pilot = followed.place.write("poet", b"1"), followed.place.write("pilot", b"2")
    followed.place.write("unwanted", b"3")
    followed.write("poet")
    await followed.start()
    assert followed.served == {"poet": poet}
    followed.write({"name": "poet", "source": "poet", "weight": 3, "pinned": True}, "pilot")
    await followed.run()
    assert followed.served == {"poet": poet, "pilot": pilot}
    adapter = followed.registry.admission.acquire("poet")
    assert (adapter.weight, adapter.pinned) == (3, True)
    # A request that runs keeps what it has; the name is gone at once.
    followed.write("pilot")
    await followed.run()
    assert followed.served == {"pilot": pilot}
    assert adapter.key in followed.place.engine.held
    followed.registry.admission.release(adapter)
    await until(lambda: adapter.key not in followed.place.engine.held)
    # What is left out is as if it had never been said.
    followed.write("poet", "pilot")
    await followed.run()
    again = followed.registry.admission.acquire("poet")
    assert (again.info.digest, again.weight, again.pinned) == (poet, 1, False)
    followed.registry.admission.release(again)
    followed.write()
    await followed.run()
    assert followed.served == {}
    await until(lambda: followed.place.kept == set())


async def test_a_name_that_comes_back_while_a_request_still_has_it(followed: Followed) -> None:
    followed.place.write("poet", b"1")
    followed.write("poet")
    await followed.start()
    adapter = followed.registry.admission.acquire("poet")
    followed.write()
    await followed.run()
    followed.write("poet")
    await followed.run()
    assert followed.served.keys() == {"poet"}
    followed.registry.admission.release(adapter)


async def test_without_a_digest_the_source_is_followed(followed: Followed) -> None:
    first = followed.place.write("poet", b"1")
    followed.write("poet")
    await followed.start()
    assert followed.served == {"poet": first}
    second = followed.place.write("poet", b"2")
    await followed.run()
    assert followed.served == {"poet": second}
    loads = followed.place.engine.loads
    await followed.run()
    assert followed.place.engine.loads == loads


async def test_a_digest_says_which_content(followed: Followed) -> None:
    first = followed.place.write("poet", b"1")
    entry = {"name": "poet", "source": "poet", "digest": f"sha256:{first}"}
    followed.write(entry)
    await followed.start()
    second = followed.place.write("poet", b"2")
    await followed.run()
    assert followed.served == {"poet": first}
    followed.write({**entry, "digest": second})
    await followed.run()
    assert followed.served == {"poet": second}
    # Going back needs no source: the content is here.
    shutil.rmtree(followed.place.source / "poet")
    followed.write(entry)
    await followed.run()
    assert (followed.served, followed.failures) == ({"poet": first}, {})
    # Without a digest it is what the source has again.
    followed.place.write("poet", b"2")
    followed.write("poet")
    await followed.run()
    assert followed.served == {"poet": second}


async def test_another_content_than_the_digest_is_refused(followed: Followed) -> None:
    followed.place.write("poet", b"1")
    followed.write({"name": "poet", "source": "poet", "digest": 64 * "0"})
    await followed.start()
    assert followed.served == {}
    assert isinstance(followed.failures["poet"], AdapterRejected)
    assert followed.place.kept == set()


async def test_one_broken_entry_blocks_no_other_and_is_tried_again(followed: Followed) -> None:
    followed.place.write("bad", b"bad")
    followed.place.write("poet", b"1")
    entries: tuple[Any, ...] = (
        "bad",
        "missing",
        {"name": "no name", "source": "poet"},
        {"name": "outside", "source": "../poet"},
        {"name": "elsewhere", "source": "/etc"},
        {"name": "by-uri", "source": "file:///etc"},
        {"name": "odd", "source": "gopher://x"},
        "poet",
    )
    followed.write(*entries)
    await followed.start()
    assert followed.served.keys() == {"poet"}
    assert {name: type(error) for name, error in followed.failures.items()} == {
        "bad": AdapterRejected,
        "missing": SourceFailed,
        "adapters[2]": InvalidRequest,
        "outside": InvalidRequest,
        "elsewhere": InvalidRequest,
        "by-uri": InvalidRequest,
        "odd": InvalidRequest,
    }
    assert "is not inside --adapters" in str(followed.failures["elsewhere"])
    # Later and later, whatever becomes of the others.
    loads = followed.place.engine.loads
    followed.place.write("missing", b"2")
    await followed.run()
    assert followed.place.engine.loads == loads
    followed.place.now += 1
    await followed.run()
    assert followed.served.keys() == {"poet", "missing"}
    assert "missing" not in followed.failures
    # An entry that is mended is tried at once.
    followed.write({"name": "bad", "source": "poet"})
    await followed.run()
    assert followed.failures == {}
    assert followed.served.keys() == {"bad"}


async def test_a_source_that_hangs_holds_up_no_pass(
    followed: Followed, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = asyncio.Event()
    loop = asyncio.get_running_loop()
    fetch = DirectorySource.fetch

    def hanging(self: DirectorySource, path: str, into: Path, limits: FetchLimits) -> str:
        if path == "slow":
            asyncio.run_coroutine_threadsafe(release.wait(), loop).result()
        return fetch(self, path, into, limits)

    monkeypatch.setattr(DirectorySource, "fetch", hanging)
    followed.write()
    await followed.start()
    for name in ("slow", "poet", "pilot"):
        followed.place.write(name, name.encode())
    followed.write("slow", "poet")
    task = asyncio.create_task(followed.reconciler.run_for_ever(0.01))
    await until(lambda: followed.served.keys() == {"poet"})
    followed.write("slow", "pilot")
    await until(lambda: followed.served.keys() == {"pilot"})
    release.set()
    await until(lambda: followed.served.keys() == {"pilot", "slow"})
    task.cancel()


async def test_a_manifest_that_hangs_holds_up_no_entry(
    followed: Followed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest_reconciler, "_READ_SECONDS", 0.01)
    for name in ("poet", "pilot"):
        followed.place.write(name, name.encode())
    followed.write("poet", "late")
    await followed.start()
    assert followed.failures.keys() == {"late"}
    release, asked, opening = threading.Event(), list[Path](), Path.open

    def hanging(path: Path, *args: Any, **kwargs: Any) -> Any:
        if path == followed.path and not release.is_set():
            asked.append(path)
            release.wait(20)
        return opening(path, *args, **kwargs)

    task = asyncio.create_task(followed.reconciler.run_for_ever(0.01))
    try:
        with monkeypatch.context() as patch:
            patch.setattr(Path, "open", hanging)
            await until(lambda: asked != [])
            followed.place.write("late", b"1")
            followed.place.now += 1
            await until(lambda: followed.served.keys() == {"poet", "late"})
            assert (len(asked), followed.reconciler.read_errors) == (1, 0)
            # What it says is taken in as soon as it is there.
            new = followed.path.with_name("new.yaml")
            new.write_text("adapters: [{name: pilot, source: pilot}]")
            new.replace(followed.path)
            release.set()
            await until(lambda: followed.served.keys() == {"pilot"})
    finally:
        release.set()
        task.cancel()
    assert followed.failures == {}


async def test_reads_that_hang_are_made_one_at_a_time(
    followed: Followed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one that failed is counted once, whatever passes began meanwhile."""
    monkeypatch.setattr(manifest_reconciler, "_READ_SECONDS", 0.01)
    followed.place.write("poet", b"1")
    followed.write("poet")
    reader = ManifestReader(str(followed.path))
    await followed.start(reader)
    reads = [asyncio.Event() for _ in range(2)]
    waiting, read = list[asyncio.Event](), reader.read

    async def hanging() -> Manifest:
        waiting.append(reads[len(waiting)])
        await waiting[-1].wait()
        return await read()

    monkeypatch.setattr(reader, "read", hanging)
    passes, names = 0, followed.place.libraries[0].names

    async def counted() -> Any:
        nonlocal passes
        passes += 1
        return await names()

    monkeypatch.setattr(followed.place.libraries[0], "names", counted)
    task = asyncio.create_task(followed.reconciler.run_for_ever(0.2))
    await until(lambda: passes >= 2)
    followed.path.write_text("oops")
    assert (len(waiting), followed.reconciler.read_errors) == (1, 0)
    reads[0].set()
    await until(lambda: len(waiting) == 2)
    assert followed.reconciler.read_errors == 1
    assert followed.served.keys() == {"poet"}
    task.cancel()


async def test_a_manifest_that_cannot_be_read_changes_nothing(followed: Followed) -> None:
    followed.place.write("poet", b"1")
    followed.write("poet")
    await followed.start()
    for text in ("adapters: [", "", "adapters: [{name: poet, name: poet}]"):
        followed.path.write_text(text)
        await followed.run()
        assert followed.served.keys() == {"poet"}
        assert followed.failures.keys() == {str(followed.path)}
    followed.path.unlink()
    await followed.run()
    assert followed.reconciler.read_errors == 4
    assert followed.reconciler.wanted == 1
    followed.write()
    await followed.run()
    assert (followed.served, followed.failures) == ({}, {})


async def test_the_log_tells_of_a_manifest_when_something_changes(
    followed: Followed, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, manifest_reconciler.__name__)
    followed.write()
    await followed.start()
    for text in ("oops", "oops", "adapters: []", "adapters: []"):
        followed.path.write_text(text)
        await followed.run()
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    assert "what the last good manifest says is served" in said[0]
    assert said[1] == f"manifest {followed.path} can be read again"


async def test_a_start_without_a_readable_manifest_serves_what_was_served(
    followed: Followed,
) -> None:
    poet = followed.place.write("poet", b"1")
    followed.write("poet")
    await followed.start()
    followed.path.write_text("oops")
    await followed.start()
    assert followed.served == {"poet": poet}
    assert followed.failures.keys() == {str(followed.path)}


async def test_what_was_read_before_the_start_counts_from_then_on(followed: Followed) -> None:
    """The model is loaded between the two, and the bucket may go away meanwhile."""
    poet = followed.place.write("poet", b"1")
    followed.write("poet")
    reader = ManifestReader(str(followed.path))
    await reader.read()
    followed.path.unlink()
    await followed.start(reader)
    assert followed.served == {"poet": poet}
    assert followed.failures.keys() == {str(followed.path)}
    assert followed.reconciler.read_errors == 1


async def test_while_a_name_cannot_be_read_nothing_is_unloaded(followed: Followed) -> None:
    for name in ("poet", "pilot"):
        followed.place.write(name, name.encode())
    followed.write("poet", "pilot")
    await followed.start()
    followed.write({"naem": "poet", "source": "poet"}, "pilot")
    await followed.run()
    assert followed.served.keys() == {"poet", "pilot"}
    # A broken entry keeps what its name meant, also over a restart.
    followed.write({"name": "poet", "source": "poet", "weight": "heavy"})
    await followed.start()
    assert followed.served.keys() == {"poet"}
    await followed.run()
    assert followed.failures.keys() == {"poet"}


async def test_a_restart_needs_no_source(followed: Followed) -> None:
    poet = followed.place.write("poet", b"1")
    followed.write({"name": "poet", "source": "poet", "digest": poet, "weight": 5})
    await followed.start()
    shutil.rmtree(followed.place.source)
    await followed.start()
    assert (followed.served, followed.failures) == ({"poet": poet}, {})
    # What was taken out while no server ran is gone, content and all.
    followed.write()
    await followed.start()
    assert followed.served == {}
    await until(lambda: followed.place.kept == set())


async def test_what_is_damaged_on_disk_is_fetched_again(followed: Followed) -> None:
    poet = followed.place.write("poet", b"1")
    followed.write({"name": "poet", "source": "poet", "digest": poet})
    await followed.start()
    overwrite(followed.place.state / "adapters" / poet / WEIGHTS_FILE, b"!")
    await followed.start()
    assert (followed.served, followed.failures) == ({"poet": poet}, {})


async def test_the_link_that_kubernetes_replaces_is_followed(followed: Followed) -> None:
    followed.place.write("poet", b"1")
    root = followed.path.parent
    for version, text in (("v1", "adapters: []"), ("v2", "adapters: [{name: poet, source: poet}]")):
        (root / version).mkdir()
        (root / version / "list.yaml").write_text(text)
    (root / "..data").symlink_to("v1")
    followed.path.symlink_to("..data/list.yaml")
    await followed.start()
    (root / "..new").symlink_to("v2")
    (root / "..new").replace(root / "..data")
    await followed.run()
    assert followed.served.keys() == {"poet"}
