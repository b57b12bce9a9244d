"""Content by digest: whole or not there, kept once, and removed only when nobody holds it."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from lorax_serve.errors import AdapterRejected, RejectReason, StoreFailed
from lorax_serve.store.content import ContentStore
from lorax_serve.store.digest import CONFIG_FILE, WEIGHTS_FILE
from tests.store.sample import damage, digest, files, fill, put, size


@pytest.fixture
def content(tmp_path: Path) -> Iterator[ContentStore]:
    with ContentStore(tmp_path / "state") as store:
        yield store


def leftovers(content: ContentStore) -> list[Path]:
    return list((content.root / "staging").iterdir())


def test_what_is_committed_is_kept(content: ContentStore) -> None:
    assert put(content, 1) == digest(1)
    assert content.digests() == {digest(1)}
    assert digest(1) in content
    assert digest(2) not in content
    entry = content.path(digest(1))
    assert {path.name: path.read_bytes() for path in entry.iterdir()} == files(1)
    assert {path.stat().st_mode & 0o777 for path in entry.iterdir()} == {0o444}
    assert content.verify(digest(1))
    assert content.nbytes == size(1)
    assert not leftovers(content)


def test_what_is_not_committed_is_deleted(content: ContentStore) -> None:
    with pytest.raises(FileNotFoundError), content.stage() as stage:
        fill(stage.path / "nowhere", 1)
    with content.stage() as first, content.stage() as second:
        assert first.path != second.path
        assert {path.stat().st_mode & 0o777 for path in leftovers(content)} == {0o700}
    assert not leftovers(content)
    assert not content.digests()


def test_the_same_content_is_kept_once(content: ContentStore) -> None:
    put(content, 1)
    before = (content.path(digest(1)) / WEIGHTS_FILE).stat().st_ino
    assert put(content, 1) == digest(1)
    assert (content.path(digest(1)) / WEIGHTS_FILE).stat().st_ino == before
    assert not leftovers(content)


@pytest.mark.parametrize("how", ["flipped", "cut", "gone", "file"])
def test_a_damaged_copy_is_replaced(how: str, content: ContentStore) -> None:
    put(content, 1)
    weights = content.path(digest(1)) / WEIGHTS_FILE
    match how:
        case "flipped":
            damage(weights)
        case "cut":
            weights.chmod(0o644)
            os.truncate(weights, 7)
        case "gone":
            weights.unlink()
        case "file":
            content.remove(digest(1))
            weights.parent.write_text("")
    assert not content.verify(digest(1))
    assert put(content, 1) == digest(1)
    assert content.verify(digest(1))
    assert not leftovers(content)


def test_what_else_was_staged_is_dropped(content: ContentStore) -> None:
    with content.stage() as stage:
        fill(stage.path, 1)
        (stage.path / "README.md").write_text("an adapter")
        (stage.path / ".cache" / "hub").mkdir(parents=True)
        (stage.path / ".cache" / "hub" / "lock").write_text("")
        (stage.path / "elsewhere").symlink_to(content.root)
        content.commit(stage, digest(1))
    names = {path.name for path in content.path(digest(1)).iterdir()}
    assert names == {CONFIG_FILE, WEIGHTS_FILE}
    assert content.verify(digest(1))


def test_another_digest_than_expected_is_refused(content: ContentStore) -> None:
    with content.stage() as stage:
        fill(stage.path, 1)
        with pytest.raises(AdapterRejected, match=f"{digest(1)}, not {digest(2)}") as caught:
            content.commit(stage, digest(2))
    assert caught.value.reason is RejectReason.BAD_FILE
    assert not content.digests()
    assert not leftovers(content)


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
@pytest.mark.parametrize("how", ["missing", "directory", "symlink", "hard link", "pipe"])
def test_what_is_no_file_of_its_own_is_refused(
    name: str, how: str, content: ContentStore, tmp_path: Path
) -> None:
    with content.stage() as stage:
        fill(stage.path, 1)
        path = stage.path / name
        path.rename(tmp_path / "outside")
        match how:
            case "directory":
                path.mkdir()
            case "symlink":
                path.symlink_to(tmp_path / "outside")
            case "hard link":
                path.hardlink_to(tmp_path / "outside")
            case "pipe":
                os.mkfifo(path)
        with pytest.raises(AdapterRejected, match=name) as caught:
            content.commit(stage)
    reason = RejectReason.MISSING_FILE if how == "missing" else RejectReason.BAD_FILE
    assert caught.value.reason is reason
    assert not content.digests()
    assert (tmp_path / "outside").stat().st_mode & 0o200


def test_removing_frees(content: ContentStore) -> None:
    put(content, 1)
    put(content, 2)
    assert content.remove(digest(1)) == size(1)
    assert content.digests() == {digest(2)}
    assert content.nbytes == size(2)
    assert not content.verify(digest(1))
    assert content.remove(digest(1)) == 0
    assert not leftovers(content)
    with pytest.raises(StoreFailed, match=f"{digest(1)}; load the adapter again"):
        content.path(digest(1))


@pytest.mark.parametrize("name", ["", ".", "..", "../staging", "x" * 64])
def test_only_digests_are_looked_up(name: str, content: ContentStore) -> None:
    (content.root / "adapters" / ("x" * 64)).mkdir()
    assert name not in content
    assert not content.verify(name)
    assert content.remove(name) == 0
    assert not content.digests()
    assert (content.root / "staging").is_dir()
    with pytest.raises(StoreFailed):
        content.path(name)


def test_held_content_stays(content: ContentStore) -> None:
    with content.stage() as first, content.stage() as second:
        fill(first.path, 1)
        fill(second.path, 1)
        content.commit(first)
        content.commit(second)
        assert content.remove(digest(1)) == 0
    put(content, 1)
    assert content.remove(digest(1), unless=lambda _: True) == 0
    assert content.remove(digest(1), unless=lambda _: False) == size(1)


def test_removal_and_commit_of_the_same_content_at_once(content: ContentStore) -> None:
    """A removal that was decided on before a load, and comes after it, takes nothing away."""
    recorded: set[str] = set()
    failures: list[str] = []

    def remove() -> None:
        for _ in range(200):
            recorded.discard(digest(1))
            content.remove(digest(1), unless=recorded.__contains__)

    def commit() -> None:
        for _ in range(40):
            with content.stage() as stage:
                fill(stage.path, 1)
                content.commit(stage)
                if not content.verify(digest(1)):
                    failures.append("held content is gone")

    threads = [threading.Thread(target=target) for target in (remove, commit, commit)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    recorded.add(digest(1))
    put(content, 1)
    assert content.remove(digest(1), unless=recorded.__contains__) == 0
    assert content.verify(digest(1))


def test_everything_is_synced_before_it_is_seen(
    content: ContentStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, rename = os.fsync, os.rename

    def recording_fsync(descriptor: int) -> None:
        done.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        fsync(descriptor)

    def recording_rename(source: Path, target: Path) -> None:
        done.append(f"rename {Path(target).name}")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(os, "rename", recording_rename)
    with content.stage() as stage:
        fill(stage.path, 1)
        name = stage.path.name
        content.commit(stage)
    files_first = [f"sync {CONFIG_FILE}", f"sync {WEIGHTS_FILE}", f"sync {name}"]
    assert done == [*files_first, f"rename {digest(1)}", "sync adapters"]
    done.clear()
    content.remove(digest(1))
    assert done == [f"rename {digest(1)}", "sync adapters"]


def test_opening_deletes_what_was_staged(tmp_path: Path) -> None:
    with ContentStore(tmp_path) as content:
        put(content, 1)
    left = tmp_path / "staging" / "left"
    left.mkdir()
    fill(left, 2)
    with ContentStore(tmp_path) as content:
        assert not leftovers(content)
        assert content.verify(digest(1))


def test_a_directory_that_is_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "staging").mkdir()
    (tmp_path / "staging" / "precious").write_text("mine")
    with pytest.raises(StoreFailed, match=f"{tmp_path} is no state directory"):
        ContentStore(tmp_path)
    assert (tmp_path / "staging" / "precious").read_text() == "mine"


def test_a_second_store_is_refused_until_the_first_is_closed(tmp_path: Path) -> None:
    first = ContentStore(tmp_path)
    with first, pytest.raises(StoreFailed, match=f"{tmp_path} is in use by another server"):
        ContentStore(tmp_path)
    first.close()  # once more
    ContentStore(tmp_path).close()
