"""Full disks, forbidden directories, damaged files: errors that say so, and nothing lost."""

from __future__ import annotations

import os
import resource
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from lorax_serve.errors import LoraxError, Overloaded, StoreFailed
from lorax_serve.store.catalog import Catalog
from lorax_serve.store.content import ContentStore
from lorax_serve.store.digest import CONFIG_FILE, WEIGHTS_FILE
from lorax_serve.store.disk import disk_errors
from lorax_serve.store.recovery import recover, remove_unreferenced
from tests.store.sample import CATALOG, contents_of, damage, digest, fill, load, put, size, unload

ROOT = Path(__file__).parents[2]


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """The directory of a server that was stopped with two adapters; one has an earlier version."""
    root = tmp_path / "state"
    with ContentStore(root) as content, Catalog(root / CATALOG) as catalog:
        for name, number in (("one", 1), ("two", 2), ("two", 3)):
            load(content, catalog, name, number)
    return root


KEPT = {
    "one": [(digest(1), 1)],
    "two": [(digest(3), 3), (digest(2), 2)],
}


def in_another_process(function: Callable[[Path], None], root: Path) -> None:
    """Call a function of this module, whose limits or rights die with the process."""
    code = f"from {__name__} import *; {function.__name__}(Path({str(root)!r}))"
    subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, check=True)


def fill_the_disk(root: Path) -> None:
    with ContentStore(root) as content, Catalog(root / CATALOG) as catalog:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        with (
            content.stage() as stage,
            pytest.raises(Overloaded, match=f"no room to write in {stage.path}"),
            disk_errors(stage.path),
        ):
            fill(stage.path, 9)
        with pytest.raises(LoraxError, match=CATALOG):
            catalog.record_load("three", digest(1))
        with pytest.raises(LoraxError, match=CATALOG):
            catalog.record_unload("one")
        assert contents_of(catalog) == KEPT
        assert not os.listdir(root / "staging")
    with ContentStore(root) as content, Catalog(root / CATALOG) as catalog:
        assert not recover(content, catalog, verify=True).missing
        assert contents_of(catalog) == KEPT
    with pytest.raises(LoraxError, match=r"other\.sqlite"):
        Catalog(root / "other.sqlite")
    assert not (root / "other.sqlite").exists()


def test_a_full_disk_loses_nothing(state: Path) -> None:
    in_another_process(fill_the_disk, state)
    with ContentStore(state) as content, Catalog(state / CATALOG) as catalog:
        recovery = recover(content, catalog, verify=True)
        assert (recovery.missing, recovery.damaged) == ((), ())
        assert contents_of(catalog) == KEPT
        unload(content, catalog, "two")
        assert load(content, catalog, "three", 9).sequence == 4


def test_a_full_catalogue_is_overloaded_and_goes_on(state: Path) -> None:
    with Catalog(state / CATALOG) as catalog:
        pages = "PRAGMA max_page_count = {}"
        catalog._database.execute(pages.format(1))  # no less than there are
        with pytest.raises(Overloaded, match=f"no room to write in .*{CATALOG}"):
            catalog.record_load("three", digest(1), path="x" * 100_000)
        assert contents_of(catalog) == KEPT
        catalog._database.execute(pages.format(1 << 20))
        assert catalog.record_load("three", digest(1), path="x" * 100_000).sequence == 4


def be_nobody(root: Path) -> None:
    if os.geteuid() == 0:  # whom nothing is forbidden
        os.seteuid(65534)
    with pytest.raises(StoreFailed, match=f"{root} cannot be used: .*make it writable"):
        ContentStore(root)
    with pytest.raises(StoreFailed, match=f"{root / 'deeper'} cannot be used"):
        ContentStore(root / "deeper")
    with pytest.raises(StoreFailed, match=f"{root / CATALOG} cannot be used"):
        Catalog(root / CATALOG)


def test_a_directory_that_cannot_be_written() -> None:
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o555)
        in_another_process(be_nobody, Path(directory))
        assert not os.listdir(directory)


def be_second(root: Path) -> None:
    with pytest.raises(StoreFailed, match=f"{root} is in use by another server"):
        ContentStore(root)


def test_two_processes_on_one_directory(state: Path) -> None:
    with ContentStore(state) as content:
        with content.stage() as stage:
            fill(stage.path, 4)
            in_another_process(be_second, state)
            content.commit(stage)  # the other has not cleared it away
        assert content.verify(digest(4))


def test_a_state_directory_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "file", tmp_path / "file" / "deeper"):
        with pytest.raises(StoreFailed, match=f"{root} cannot be used"):
            ContentStore(root)


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_recovery_reports_damage_and_keeps_the_records(name: str, state: Path) -> None:
    damage(state / "adapters" / digest(3) / name)
    (state / "adapters" / digest(1) / name).unlink()
    with ContentStore(state) as content, Catalog(state / CATALOG) as catalog:
        recovery = recover(content, catalog)
        assert (recovery.missing, recovery.damaged) == (("one",), ())
        recovery = recover(content, catalog, verify=True)
        assert (recovery.missing, recovery.damaged) == (("one",), ("two",))
        assert contents_of(catalog) == KEPT
        put(content, 1)
        put(content, 3)
        recovery = recover(content, catalog, verify=True)
        assert (recovery.missing, recovery.damaged) == ((), ())


def test_recovery_removes_what_nobody_refers_to(state: Path) -> None:
    with ContentStore(state) as content, Catalog(state / CATALOG) as catalog:
        put(content, 7)
        left = catalog.record_unload("two")
        assert left == {digest(2), digest(3)}
        recovery = recover(content, catalog)
        assert recovery.removed == {digest(2), digest(3), digest(7)}
        assert recovery.freed == size(2) + size(3) + size(7)
        assert content.digests() == {digest(1)}


def test_a_late_removal_spares_what_was_loaded_since(state: Path) -> None:
    with ContentStore(state) as content, Catalog(state / CATALOG) as catalog:
        left = catalog.record_unload("two")
        load(content, catalog, "three", 3)
        assert remove_unreferenced(content, catalog, left) == size(2)
        assert content.verify(digest(3))


def test_a_lost_catalogue_does_not_lose_the_content(state: Path) -> None:
    (state / CATALOG).unlink()
    with (
        ContentStore(state) as content,
        Catalog(state / CATALOG) as catalog,
        pytest.raises(StoreFailed, match=f"{state} has 3 adapters, but the catalogue .* is gone"),
    ):
        recover(content, catalog)
    assert len(os.listdir(state / "adapters")) == 3


def test_a_journal_without_its_catalogue(state: Path) -> None:
    (state / CATALOG).unlink()
    (state / f"{CATALOG}-journal").write_bytes(b"what a crash left")
    with pytest.raises(StoreFailed, match=f"{CATALOG} is gone, but {CATALOG}-journal is there"):
        Catalog(state / CATALOG)
    assert not (state / CATALOG).exists()


def test_a_making_that_was_cut_short_is_done_again(tmp_path: Path) -> None:
    (tmp_path / f"{CATALOG}.new").write_bytes(b"half")
    (tmp_path / f"{CATALOG}.new-journal").write_bytes(b"half")
    with Catalog(tmp_path / CATALOG) as catalog:
        assert catalog.created
        assert catalog.names() == []
    assert [path.name for path in tmp_path.iterdir()] == [CATALOG]


def test_a_newer_schema_is_refused(state: Path) -> None:
    with closing(sqlite3.connect(state / CATALOG)) as database:
        database.execute("PRAGMA user_version = 4")
    with pytest.raises(StoreFailed, match=f"{CATALOG} has schema 4, this server knows up to 3"):
        Catalog(state / CATALOG)


def test_an_older_schema_is_brought_up_to_date(state: Path) -> None:
    with closing(sqlite3.connect(state / CATALOG)) as database:
        database.executescript(
            "DROP TABLE unloaded; ALTER TABLE names DROP COLUMN fetched; "
            "PRAGMA user_version = 1; VACUUM"
        )
    with Catalog(state / CATALOG) as catalog:
        records = catalog.names()
        assert {record.fetched for record in records} == {None}
        catalog.record_unload(records[0].name)
    with Catalog(state / CATALOG) as catalog:
        assert catalog.names() == records[1:]
        assert [each.name for each in catalog.unloaded()] == [records[0].name]


def test_another_database_is_refused(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / CATALOG)) as database:
        database.execute("CREATE TABLE names (name)")
    with pytest.raises(StoreFailed, match=f"{CATALOG} is damaged"):
        Catalog(tmp_path / CATALOG)


@pytest.mark.parametrize("change", ["UPDATE counter SET last_sequence = 2", "DELETE FROM counter"])
def test_numbers_that_could_come_again_are_refused(change: str, state: Path) -> None:
    with closing(sqlite3.connect(state / CATALOG)) as database, database:
        database.execute(change)
    with pytest.raises(StoreFailed, match="sequence numbers contradict"):
        Catalog(state / CATALOG)


def test_a_catalogue_cut_anywhere_is_refused(state: Path) -> None:
    whole = (state / CATALOG).read_bytes()
    for length in {0, 1, 15, 16, 100, len(whole) - 1, *range(0, len(whole), 512)} - {len(whole)}:
        (state / CATALOG).write_bytes(whole[:length])
        with pytest.raises(StoreFailed, match=f"{CATALOG} is damaged"):
            Catalog(state / CATALOG)
    (state / CATALOG).write_bytes(whole)
    Catalog(state / CATALOG).close()


def test_a_catalogue_with_lost_pages_is_refused_or_whole(state: Path) -> None:
    whole = (state / CATALOG).read_bytes()
    refused = 0
    for start in range(0, len(whole), 512):
        (state / CATALOG).write_bytes(whole[:start] + bytes(512) + whole[start + 512 :])
        try:
            with Catalog(state / CATALOG) as catalog:
                assert contents_of(catalog) == KEPT
        except StoreFailed:
            refused += 1
    assert refused > 5


def test_another_program_has_the_catalogue(state: Path) -> None:
    with Catalog(state / CATALOG) as catalog, closing(sqlite3.connect(state / CATALOG)) as other:
        catalog._database.execute("PRAGMA busy_timeout = 1")
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreFailed, match="no other program has it open"):
            catalog.set_weight("one", 2)
        other.rollback()
        catalog.set_weight("one", 2)
