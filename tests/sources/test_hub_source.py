"""Adapters on the Hub: from its cache without a network, and from a server that plays the Hub."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from lorax_serve.errors import InvalidRequest, SourceFailed, SourceReason
from lorax_serve.sources import CONFIG_FILE, WEIGHTS_FILE, FetchLimits, WatchableSource, open_source
from tests.sources.fetching import ADAPTER, HASTE, SIZE, failure, fetched
from tests.sources.raw_server import Answer, RawServer, closed_port, raw_server

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER = "f" * 40
ELSEWHERE = {"url": ""}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hub cache, offline."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


@pytest.fixture
def into(tmp_path: Path) -> Path:
    return tmp_path / "into"


def write_cache(cache: Path, repo: str, revision: str, folder: str = "") -> None:
    """As huggingface_hub leaves it: a ref to a snapshot, whose files are links to blobs."""
    root = cache / f"models--{repo.replace('/', '--')}"
    snapshot = root / "snapshots" / COMMIT / folder
    for directory in (root / "blobs", root / "refs", snapshot):
        directory.mkdir(parents=True, exist_ok=True)
    (root / "refs" / revision).write_text(COMMIT)
    for name, data in ADAPTER.items():
        (root / "blobs" / name[:12]).write_bytes(data)
        (snapshot / name).symlink_to(root / "blobs" / name[:12])


@pytest.mark.parametrize(
    ("uri", "path", "revision", "folder"),
    [
        ("hf://org", "poet", "main", ""),
        ("hf://org", "poet/a/b", "main", "a/b"),
        ("hf://org/poet", "", "main", ""),
        ("hf://org/poet@v1", "", "v1", ""),
        (f"hf://org/poet@{COMMIT}", "", "v1", ""),
        ("hf://org/poet/a", "b", "main", "a/b"),
        ("hf://org/poet@v1/a/b", "", "v1", "a/b"),
    ],
)
def test_offline_the_cache_answers(
    cache: Path, into: Path, uri: str, path: str, revision: str, folder: str
) -> None:
    write_cache(cache, "org/poet", revision, folder)
    source = open_source(uri)
    assert source.uri == uri
    assert fetched(source, path, into) == (ADAPTER, COMMIT)
    assert source.signature(path) == COMMIT
    assert not isinstance(source, WatchableSource)


def test_offline_without_a_cache(into: Path) -> None:
    error = failure(open_source("hf://org/poet"), "", into)
    assert error.reason is SourceReason.NOT_FOUND
    assert "HF_HUB_OFFLINE is set" in str(error)


@pytest.mark.parametrize("file", [CONFIG_FILE, WEIGHTS_FILE])
def test_offline_with_half_a_cache(cache: Path, into: Path, file: str) -> None:
    write_cache(cache, "org/poet", "main")
    (cache / "models--org--poet" / "blobs" / file[:12]).unlink()
    error = failure(open_source("hf://org/poet"), "", into)
    assert error.reason is SourceReason.NOT_FOUND
    assert file in str(error)


def test_what_the_cache_has_is_limited_too(cache: Path, into: Path) -> None:
    write_cache(cache, "org/poet", "main")
    error = failure(open_source("hf://org/poet"), "", into, FetchLimits(SIZE - 1, 20.0))
    assert error.reason is SourceReason.TOO_LARGE


def test_an_organisation_needs_a_repo() -> None:
    with pytest.raises(InvalidRequest, match="must begin with a repo of hf://org"):
        open_source("hf://org").signature("")


@pytest.mark.parametrize("path", ["..", "../other", "a/../b", "/etc", "a//b"])
def test_malformed_paths(path: str) -> None:
    with pytest.raises(InvalidRequest, match="leads outside hf://org/poet"):
        open_source("hf://org/poet").signature(path)


@pytest.mark.parametrize("repo", ["a--b", "x" * 200, "ü", "-"])
def test_names_that_no_repo_has(repo: str) -> None:
    with pytest.raises(SourceFailed, match="no repo can have this name") as caught:
        open_source("hf://org").signature(repo)
    assert caught.value.reason is SourceReason.NOT_FOUND


def right(method: str, path: str) -> Answer:
    """As the Hub answers for the adapter "poet" of "org": the weights are kept elsewhere."""
    path, _, _ = path.partition("?")
    file = path.rpartition("/")[2]
    known = [f"/org/poet/resolve/{at}/{file}" for at in ("main", "v1", "refs%2Fpr%2F1", COMMIT)]
    if path.startswith("/elsewhere/"):
        return Answer(ADAPTER[file])
    if path not in known or file not in ADAPTER:
        return Answer(status=404, headers={"X-Error-Code": "EntryNotFound"})
    headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{file}"'}
    if file == CONFIG_FILE:
        return Answer(ADAPTER[file], headers=headers)
    # Another name of the same server is another host to whoever sends credentials.
    moved = {"Location": f"{ELSEWHERE['url']}/elsewhere/{file}?signature=of-the-test"}
    linked = {"X-Linked-Size": str(len(ADAPTER[file])), "X-Linked-Etag": '"linked"'}
    return Answer(b"moved", 302, headers | moved | linked)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[RawServer]:
    with raw_server(right) as server:
        point_at(server.url, monkeypatch)
        monkeypatch.setitem(ELSEWHERE, "url", server.url.replace("127.0.0.1", "localhost"))
        yield server


def point_at(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def wrong_at(
    method: str, part: str, change: Callable[[Answer], Answer | None]
) -> Callable[[str, str], Answer | None]:
    """Answers rightly but for one method and paths that have ``part``."""

    def script(asked: str, path: str) -> Answer | None:
        answer = right(asked, path)
        return change(answer) if (asked, part in path) == (method, True) else answer

    return script


@pytest.mark.parametrize(
    ("uri", "path"),
    [
        ("hf://org", "poet"),
        ("hf://org/poet", ""),
        ("hf://org/poet@v1", ""),
        ("hf://org/poet@refs%2Fpr%2F1", ""),
    ],
)
def test_fetches(server: RawServer, into: Path, uri: str, path: str) -> None:
    source = open_source(uri)
    assert source.uri == uri
    assert fetched(source, path, into) == (ADAPTER, COMMIT)
    assert source.signature(path) == COMMIT


def test_the_token_goes_to_the_hub_only(server: RawServer, into: Path) -> None:
    fetched(open_source("hf://org/poet"), "", into)
    elsewhere = [path.startswith("/elsewhere/") for _, path, _ in server.requests]
    assert any(elsewhere)
    for (_, _, headers), away in zip(server.requests, elsewhere, strict=True):
        assert ("hf_token-of-the-test" in str(headers)) == (not away)


def test_what_the_cache_has_is_not_fetched(server: RawServer, cache: Path, into: Path) -> None:
    write_cache(cache, "org/poet", "main")
    assert fetched(open_source("hf://org/poet"), "", into) == (ADAPTER, COMMIT)
    assert [method for method, _, _ in server.requests] == ["HEAD"]


def test_an_older_commit_in_the_cache_is_not_used(
    server: RawServer, cache: Path, into: Path
) -> None:
    write_cache(cache, "org/poet", "main")
    root = cache / "models--org--poet"
    (root / "refs" / "main").write_text(OTHER)
    (root / "snapshots" / COMMIT).rename(root / "snapshots" / OTHER)
    for blob in (root / "blobs").iterdir():
        blob.write_bytes(b"old")
    assert fetched(open_source("hf://org/poet"), "", into) == (ADAPTER, COMMIT)


def test_the_commit_is_one_for_both_files(server: RawServer, into: Path) -> None:
    fetched(open_source("hf://org/poet"), "", into)
    paths = [path for method, path, _ in server.requests if method == "GET"]
    assert paths[:2] == [f"/org/poet/resolve/{COMMIT}/{name}" for name in ADAPTER]


def test_the_limit_is_for_both_files(server: RawServer, into: Path) -> None:
    error = failure(open_source("hf://org/poet"), "", into, FetchLimits(SIZE - 1, 20.0))
    assert error.reason is SourceReason.TOO_LARGE
    assert not (into / WEIGHTS_FILE).exists()


def test_what_is_not_there(server: RawServer, into: Path) -> None:
    for uri in ("hf://org/nobody", "hf://org/poet@nothing", "hf://org/poet/folder"):
        error = failure(open_source(uri), "", into)
        assert error.reason is SourceReason.NOT_FOUND
        assert CONFIG_FILE in str(error)


@pytest.mark.parametrize(
    ("method", "part"),
    [("HEAD", CONFIG_FILE), ("GET", CONFIG_FILE), ("HEAD", WEIGHTS_FILE), ("GET", "/elsewhere/")],
)
@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (400, SourceReason.DENIED),
        (401, SourceReason.DENIED),
        (403, SourceReason.DENIED),
        (404, SourceReason.NOT_FOUND),
        (429, SourceReason.UNAVAILABLE),
        (500, SourceReason.UNAVAILABLE),
        (503, SourceReason.UNAVAILABLE),
    ],
)
def test_statuses(
    server: RawServer, into: Path, method: str, part: str, status: int, reason: SourceReason
) -> None:
    server.script = wrong_at(method, part, lambda _: Answer(b"oops", status))
    error = failure(open_source("hf://org/poet"), "", into)
    assert error.reason is reason
    assert str(status) in str(error)
    assert "of-the-test" not in str(error)


@pytest.mark.parametrize("status", [403, 404])
def test_a_refusal_is_not_made_up_for_by_the_cache(
    server: RawServer, cache: Path, into: Path, status: int
) -> None:
    write_cache(cache, "org/poet", "main")
    server.script = lambda method, path: Answer(status=status)
    assert not failure(open_source("hf://org/poet"), "", into).retryable


def test_a_hub_that_is_down(
    server: RawServer, cache: Path, into: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    point_at(f"http://127.0.0.1:{closed_port()}", monkeypatch)
    source = open_source("hf://org/poet")
    error = failure(source, "", into)
    assert error.reason is SourceReason.UNAVAILABLE
    write_cache(cache, "org/poet", "main")
    assert fetched(source, "", into.with_name("again")) == (ADAPTER, COMMIT)


@pytest.mark.parametrize("url", ["nonsense", "http://[x", "ftp://host"])
def test_an_endpoint_that_is_none(into: Path, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    point_at(url, monkeypatch)
    assert failure(open_source("hf://org/poet"), "", into).reason is SourceReason.UNAVAILABLE


CUT = {
    "cut off": lambda answer: replace(answer, then="cut"),
    "announces too much": lambda answer: replace(answer, announced=len(answer.body) + 9),
    "shorter than its head": lambda answer: replace(answer, body=answer.body[:-1]),
    "longer than its head": lambda answer: replace(answer, body=answer.body + b"x"),
    "damaged": lambda answer: replace(answer, headers={"Content-Encoding": "gzip"}),
}


@pytest.mark.parametrize("part", [CONFIG_FILE, "/elsewhere/"])
@pytest.mark.parametrize("how", CUT)
def test_broken_contents(server: RawServer, into: Path, part: str, how: str) -> None:
    server.script = wrong_at("GET", part, CUT[how])
    error = failure(open_source("hf://org/poet"), "", into, FetchLimits(SIZE + 9, 20.0))
    assert error.reason is SourceReason.TRUNCATED


@pytest.mark.parametrize("then", ["hang", "trickle"])
def test_a_hub_that_does_not_come_to_an_end(server: RawServer, into: Path, then: Any) -> None:
    server.script = wrong_at("GET", "/elsewhere/", lambda answer: replace(answer, then=then))
    error = failure(open_source("hf://org/poet"), "", into, HASTE)
    assert error.reason is SourceReason.TIMEOUT


def test_a_hub_that_says_nothing(server: RawServer, into: Path) -> None:
    def silent(method: str, path: str) -> None:
        server.stopping.wait()

    server.script = silent
    error = failure(open_source("hf://org/poet"), "", into, HASTE)
    assert error.reason is SourceReason.TIMEOUT


@pytest.mark.parametrize(
    ("method", "part"), [("HEAD", CONFIG_FILE), ("GET", CONFIG_FILE), ("GET", "/elsewhere/")]
)
def test_a_hub_that_hangs_up(server: RawServer, into: Path, method: str, part: str) -> None:
    server.script = wrong_at(method, part, lambda _: None)
    error = failure(open_source("hf://org/poet"), "", into)
    assert error.reason is SourceReason.UNAVAILABLE


def test_a_server_that_is_no_hub(server: RawServer, into: Path) -> None:
    server.script = lambda method, path: Answer(b"<html>welcome to the hotel")
    error = failure(open_source("hf://org/poet"), "", into)
    assert error.reason is SourceReason.UNAVAILABLE
    assert "check HF_ENDPOINT" in str(error)
