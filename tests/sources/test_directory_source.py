"""Adapters in a directory: nothing is read outside of it, and nothing that is half written."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lorax_serve.errors import InvalidRequest, SourceFailed, SourceReason
from lorax_serve.sources import CONFIG_FILE, WEIGHTS_FILE, FetchLimits, WatchableSource
from lorax_serve.sources.directory import DirectorySource
from lorax_serve.sources.files import chunks_of, failure_of
from tests.sources.fetching import ADAPTER, CONFIG, LIMITS, SIZE, failure, fetched, write_adapter


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root").mkdir()
    write_adapter(tmp_path / "root" / "poet")
    return tmp_path / "root"


@pytest.fixture
def source(root: Path) -> DirectorySource:
    return DirectorySource(root)


@pytest.fixture
def into(tmp_path: Path) -> Path:
    return tmp_path / "into"


def test_fetches_what_it_lists(source: DirectorySource, into: Path) -> None:
    assert isinstance(source, WatchableSource)
    files, signature = fetched(source, "poet", into)
    assert files == ADAPTER
    assert source.list() == {"poet": signature}
    assert source.signature("poet") == signature


def test_the_root_itself_is_the_empty_path(root: Path, into: Path) -> None:
    assert fetched(DirectorySource(root / "poet"), "", into)[0] == ADAPTER


def test_the_uri_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert DirectorySource(Path("a b/../c d")).uri == f"{tmp_path.as_uri()}/c%20d"


def test_lists_only_adapters(source: DirectorySource, root: Path, tmp_path: Path) -> None:
    write_adapter(root / ".hidden")
    write_adapter(root / "poet" / "checkpoint-10")
    (root / "empty").mkdir()
    (root / "file").touch()
    (root / "loop").symlink_to(root / "loop")
    (root / "dangling").symlink_to(tmp_path / "nowhere")
    (root / "linked").symlink_to(root / "poet")
    assert source.list().keys() == {"poet", "linked"}


def test_a_half_written_adapter_is_listed_and_changes(
    source: DirectorySource, root: Path, into: Path
) -> None:
    (root / "poet" / WEIGHTS_FILE).unlink()
    before = source.list()["poet"]
    error = failure(source, "poet", into)
    assert error.reason is SourceReason.NOT_FOUND
    assert WEIGHTS_FILE in str(error)
    (root / "poet" / WEIGHTS_FILE).touch()
    assert source.list()["poet"] != before


@pytest.mark.parametrize("file", [CONFIG_FILE, WEIGHTS_FILE])
def test_signatures_change_with_either_file(source: DirectorySource, root: Path, file: str) -> None:
    target = root / "poet" / file
    signatures = [source.signature("poet")]
    target.write_bytes(b"a")
    signatures.append(source.signature("poet"))
    times = target.stat()
    copy = target.with_name("copy")
    copy.write_bytes(b"b")
    os.utime(copy, ns=(times.st_atime_ns, times.st_mtime_ns))
    copy.rename(target)
    signatures.append(source.signature("poet"))
    os.utime(target, ns=(0, 0))
    signatures.append(source.signature("poet"))
    assert len(set(signatures)) == 4
    assert source.list()["poet"] == signatures[-1]


@pytest.mark.parametrize("path", ["..", "../secret", "a/../../secret", "/etc", "link", "link/deep"])
def test_paths_stay_inside_the_root(
    source: DirectorySource, root: Path, into: Path, path: str
) -> None:
    write_adapter(root.parent / "secret" / "deep")
    write_adapter(root.parent / "secret")
    (root / "link").symlink_to(root.parent / "secret")
    (root / "a").mkdir()
    into.mkdir()
    with pytest.raises(InvalidRequest, match="leads outside file://"):
        source.fetch(path, into, LIMITS)
    assert not list(into.iterdir())


@pytest.mark.parametrize("file", [CONFIG_FILE, WEIGHTS_FILE])
def test_files_stay_inside_the_root(
    source: DirectorySource, root: Path, into: Path, file: str
) -> None:
    secret = write_adapter(root.parent / "secret")
    (root / "poet" / file).unlink()
    (root / "poet" / file).symlink_to(secret / file)
    error = failure(source, "poet", into)
    assert error.reason is SourceReason.DENIED
    assert f"poet/{file}: is a link that leads outside the source" in str(error)


def test_a_link_that_is_put_there_after_the_check_is_not_followed(
    source: DirectorySource, root: Path, into: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = write_adapter(root.parent / "secret")
    real = os.path.realpath

    def swapped(path: str, *, strict: bool = False) -> str:
        found = real(path, strict=strict)
        if str(path).endswith(CONFIG_FILE):
            shutil.rmtree(root / "poet")
            (root / "poet").symlink_to(secret)
        return found

    monkeypatch.setattr(os.path, "realpath", swapped)
    assert failure(source, "poet", into).reason is SourceReason.NOT_FOUND


def test_links_inside_the_root_are_followed(
    source: DirectorySource, root: Path, into: Path
) -> None:
    """As a mounted ConfigMap has them: files through a directory that is exchanged whole."""
    write_adapter(root / "mounted" / "..2026")
    (root / "mounted" / "..data").symlink_to("..2026")
    for name in ADAPTER:
        (root / "mounted" / name).symlink_to(f"..data/{name}")
    before = source.list()["mounted"]
    assert fetched(source, "mounted", into) == (ADAPTER, before)
    write_adapter(root / "mounted" / "..2027", b"new")
    (root / "mounted" / "..new").symlink_to("..2027")
    (root / "mounted" / "..new").rename(root / "mounted" / "..data")
    assert source.list()["mounted"] != before
    files, _ = fetched(source, "mounted", into.with_name("again"))
    assert files == {CONFIG_FILE: CONFIG, WEIGHTS_FILE: b"new"}


def test_the_root_may_be_a_link_that_moves(root: Path, tmp_path: Path, into: Path) -> None:
    current = tmp_path / "current"
    current.symlink_to(root)
    source = DirectorySource(current)
    assert fetched(source, "poet", into)[0] == ADAPTER
    write_adapter(tmp_path / "release-2" / "poet", b"2")
    current.unlink()
    current.symlink_to(tmp_path / "release-2")
    assert fetched(source, "poet", into.with_name("again"))[0][WEIGHTS_FILE] == b"2"


@pytest.mark.parametrize("file", [CONFIG_FILE, WEIGHTS_FILE])
def test_only_regular_files_are_read(
    source: DirectorySource, root: Path, into: Path, file: str
) -> None:
    (root / "poet" / file).unlink()
    os.mkfifo(root / "poet" / file)
    error = failure(source, "poet", into)
    assert error.reason is SourceReason.NOT_FOUND
    assert "is no regular file" in str(error)
    (root / "poet" / file).unlink()
    (root / "poet" / file).mkdir()
    assert failure(source, "poet", into).reason is SourceReason.NOT_FOUND


@pytest.mark.parametrize(
    "path", ["nobody", "x" * 300, "poet/" + "y/" * 3000, "loop", "loop/deeper", "file", "\udcff"]
)
def test_paths_that_no_directory_has(
    source: DirectorySource, root: Path, into: Path, path: str
) -> None:
    (root / "loop").symlink_to(root / "loop")
    (root / "file").touch()
    error = failure(source, path, into)
    assert error.reason is SourceReason.NOT_FOUND
    assert len(str(error)) < 600


@pytest.mark.parametrize("path", ["a\0b", "\ud800"])
def test_paths_that_cannot_be_asked_for(source: DirectorySource, path: str) -> None:
    with pytest.raises(InvalidRequest, match="characters that no file's name can have"):
        source.signature(path)


def test_names_that_are_no_text(root: Path, source: DirectorySource, into: Path) -> None:
    name = os.fsdecode(b"po\xffet")
    write_adapter(root / name)
    assert source.list().keys() == {"poet", name}
    assert fetched(source, name, into)[0] == ADAPTER
    (root / name / WEIGHTS_FILE).unlink()
    assert "po\\udcffet" in str(failure(source, name, into.with_name("again")))


def test_a_root_that_is_not_there_yet(tmp_path: Path, into: Path) -> None:
    source = DirectorySource(tmp_path / "later")
    assert failure(source, "poet", into).reason is SourceReason.NOT_FOUND
    with pytest.raises(SourceFailed, match="later: No such file or directory; check the path"):
        source.list()
    write_adapter(tmp_path / "later" / "poet")
    assert source.list().keys() == {"poet"}


@pytest.mark.parametrize("spared", [0, 1])
def test_the_limit_is_for_both_files(source: DirectorySource, into: Path, spared: int) -> None:
    into.mkdir()
    limits = FetchLimits(SIZE - spared, 20.0)
    if not spared:
        source.fetch("poet", into, limits)
        return
    error = failure(source, "poet", into, limits)
    assert error.reason is SourceReason.TOO_LARGE
    assert f"the limit of {SIZE - 1}" in str(error)
    assert not (into / WEIGHTS_FILE).exists()


def test_a_fetch_without_time(source: DirectorySource, into: Path) -> None:
    assert failure(source, "poet", into, FetchLimits(SIZE, 0.0)).reason is SourceReason.TIMEOUT


def while_reading(monkeypatch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
    """Run ``act`` before the first byte of the weights is read."""

    def chunks(descriptor: int, size: int, where: str) -> Iterator[bytes]:
        if where.endswith(WEIGHTS_FILE):
            act()
        yield from chunks_of(descriptor, size, where)

    monkeypatch.setattr("lorax_serve.sources.directory.chunks_of", chunks)


def test_a_file_that_shrinks_while_it_is_read(
    source: DirectorySource, root: Path, into: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    while_reading(monkeypatch, lambda: os.truncate(root / "poet" / WEIGHTS_FILE, 1000))
    error = failure(source, "poet", into)
    assert error.reason is SourceReason.TRUNCATED
    assert "307200 bytes were announced and 1000 came" in str(error)


@pytest.mark.parametrize("file", [CONFIG_FILE, WEIGHTS_FILE])
@pytest.mark.parametrize("how", ["append", "replace"])
def test_a_file_that_is_written_to_while_it_is_read(
    source: DirectorySource,
    root: Path,
    into: Path,
    monkeypatch: pytest.MonkeyPatch,
    file: str,
    how: str,
) -> None:
    target = root / "poet" / file

    def write() -> None:
        if how == "append":
            with target.open("ab") as opened:
                opened.write(b"more")
        else:
            shutil.copy(target, root / "new")
            (root / "new").rename(target)

    while_reading(monkeypatch, write)
    error = failure(source, "poet", into)
    assert error.reason is SourceReason.CHANGED
    assert error.retryable


def test_an_adapter_that_goes_while_it_is_read(
    source: DirectorySource, root: Path, into: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    while_reading(monkeypatch, lambda: shutil.rmtree(root / "poet"))
    assert failure(source, "poet", into).reason is SourceReason.NOT_FOUND


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        ("EACCES", SourceReason.DENIED),
        ("EIO", SourceReason.UNAVAILABLE),
        ("ETIMEDOUT", SourceReason.TIMEOUT),
        ("ESTALE", SourceReason.CHANGED),
    ],
)
def test_what_the_file_system_says(
    source: DirectorySource,
    into: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: str,
    reason: SourceReason,
) -> None:
    """Tests may run as root, whom no permission stops: the failing call is a fake."""
    code = getattr(errno, number)

    def read(descriptor: int, size: int) -> bytes:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("lorax_serve.sources.files.os.read", read)
    error = failure(source, "poet", into)
    assert error.reason is reason
    assert os.strerror(code) in str(error)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_files(source: DirectorySource, root: Path, into: Path) -> None:
    (root / "poet" / CONFIG_FILE).chmod(0)
    assert failure(source, "poet", into).reason is SourceReason.DENIED
    (root / "poet").chmod(0)
    assert failure(source, "poet", into).reason is SourceReason.DENIED
    assert source.list() == {}
    (root / "poet").chmod(0o755)


def test_a_copy_that_cannot_be_written(source: DirectorySource, tmp_path: Path) -> None:
    missing = tmp_path / "missing" / "into"
    with pytest.raises(SourceFailed, match="its copy cannot be written") as caught:
        source.fetch("poet", missing, LIMITS)
    assert caught.value.reason is SourceReason.UNAVAILABLE
    assert str(missing.parent) in str(caught.value)


def test_an_error_without_a_number() -> None:
    assert failure_of(OSError(), "here").reason is SourceReason.UNAVAILABLE


def test_no_file_stays_open(source: DirectorySource, root: Path, tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for number in range(3):
        fetched(source, "poet", tmp_path / f"into-{number}")
    (root / "poet" / WEIGHTS_FILE).unlink()
    os.mkfifo(root / "poet" / WEIGHTS_FILE)
    for _ in range(3):
        failure(source, "poet", tmp_path / "into-failed")
    assert len(os.listdir("/proc/self/fd")) == before
