"""Adapters in a bucket: from a server that speaks S3, and from one that does everything wrong."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer

from lorax_serve.errors import InvalidRequest, SourceFailed, SourceReason
from lorax_serve.sources import CONFIG_FILE, WEIGHTS_FILE, FetchLimits, WatchableSource
from lorax_serve.sources.s3 import S3Source
from tests.sources.fetching import ADAPTER, HASTE, LIMITS, SIZE, WEIGHTS, failure, fetched
from tests.sources.raw_server import Answer, RawServer, closed_port, raw_server

# The first client of a session costs half a second. The endpoint is read for every client.
SOURCE = S3Source("bkt", "")
SESSION = boto3.session.Session()


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A client of a server with one empty bucket."""
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
    client = SESSION.client("s3")
    client.create_bucket(Bucket="bkt")
    yield client
    for page in client.get_paginator("list_objects_v2").paginate(Bucket="bkt"):
        for entry in page.get("Contents", ()):
            client.delete_object(Bucket="bkt", Key=entry["Key"])
    client.delete_bucket(Bucket="bkt")
    client.close()


def put(s3: Any, directory: str, weights: bytes = WEIGHTS) -> None:
    for name, data in (ADAPTER | {WEIGHTS_FILE: weights}).items():
        s3.put_object(Bucket="bkt", Key=f"{directory}/{name}", Body=data)


@pytest.fixture
def into(tmp_path: Path) -> Path:
    return tmp_path / "into"


@pytest.mark.parametrize("prefix", ["", "tenants/one"])
def test_fetches_what_it_lists(s3: Any, into: Path, prefix: str) -> None:
    put(s3, f"{prefix}/poet".lstrip("/"))
    source = S3Source("bkt", prefix)
    assert source.uri == f"s3://bkt/{prefix}".rstrip("/")
    assert isinstance(source, WatchableSource)
    files, signature = fetched(source, "poet", into)
    assert files == ADAPTER
    assert source.list() == {"poet": signature}
    assert source.signature("poet") == signature


def test_the_prefix_itself_is_the_empty_path(s3: Any, into: Path) -> None:
    put(s3, "tenants/poet")
    assert fetched(S3Source("bkt", "tenants/poet"), "", into)[0] == ADAPTER


def test_odd_keys(s3: Any, into: Path) -> None:
    name = "a b+c%2F&ü'"
    put(s3, name)
    assert SOURCE.list().keys() == {name}
    assert fetched(SOURCE, name, into)[0] == ADAPTER


def test_lists_only_adapters(s3: Any) -> None:
    put(s3, "p/poet")
    put(s3, "p/.hidden")
    put(s3, "p/poet/checkpoint-10")
    put(s3, "p")
    put(s3, "p-2/other")
    s3.put_object(Bucket="bkt", Key="p/notes/readme.md", Body=b"")
    s3.put_object(Bucket="bkt", Key=f"p/weights/{WEIGHTS_FILE}", Body=b"")
    assert S3Source("bkt", "p").list().keys() == {"poet"}
    assert S3Source("bkt", "none").list() == {}


def test_lists_beyond_one_page(s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "3")
    names = {f"a{number}" for number in range(8)}
    for name in names:
        s3.put_object(Bucket="bkt", Key=f"{name}/{CONFIG_FILE}", Body=b"")
    assert SOURCE.list().keys() == names


def test_a_half_written_adapter_is_listed_and_changes(s3: Any, into: Path) -> None:
    s3.put_object(Bucket="bkt", Key=f"poet/{CONFIG_FILE}", Body=b"{}")
    before = SOURCE.list()
    error = failure(SOURCE, "poet", into)
    assert error.reason is SourceReason.NOT_FOUND
    assert WEIGHTS_FILE in str(error)
    put(s3, "poet")
    assert SOURCE.list()["poet"] != before["poet"]


@pytest.mark.parametrize("file", [CONFIG_FILE, WEIGHTS_FILE])
def test_signatures_change_with_either_file(s3: Any, file: str) -> None:
    put(s3, "poet")
    before = SOURCE.signature("poet")
    s3.put_object(Bucket="bkt", Key=f"poet/{file}", Body=b"new")
    assert SOURCE.signature("poet") != before
    assert SOURCE.list() == {"poet": SOURCE.signature("poet")}


def test_what_is_not_there(s3: Any, into: Path) -> None:
    error = failure(SOURCE, "nobody", into)
    assert error.reason is SourceReason.NOT_FOUND
    assert f"s3://bkt/nobody/{CONFIG_FILE}" in str(error)
    assert failure(S3Source("no-bucket", ""), "poet", into).reason is SourceReason.NOT_FOUND
    with pytest.raises(SourceFailed, match="NoSuchBucket"):
        S3Source("no-bucket", "").list()


def test_the_limit_is_for_both_files(s3: Any, into: Path) -> None:
    put(s3, "poet")
    error = failure(SOURCE, "poet", into, FetchLimits(SIZE - 1, 20.0))
    assert error.reason is SourceReason.TOO_LARGE
    assert not (into / WEIGHTS_FILE).exists()


def test_one_source_serves_many_threads(s3: Any, tmp_path: Path) -> None:
    put(s3, "poet")
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda n: fetched(SOURCE, "poet", tmp_path / str(n)), range(16)))
    assert all(files == ADAPTER for files, _ in results)


def test_without_credentials(s3: Any, into: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    error = failure(S3Source("bkt", ""), "poet", into)
    assert error.reason is SourceReason.DENIED
    assert "AWS_ACCESS_KEY_ID" in str(error)


def test_a_profile_that_is_not_there(into: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    assert failure(S3Source("bkt", ""), "poet", into).reason is SourceReason.DENIED


def test_a_server_that_is_down(into: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://user:pass@127.0.0.1:{closed_port()}")
    error = failure(SOURCE, "poet", into)
    assert error.reason is SourceReason.UNAVAILABLE
    assert "pass@" not in str(error)
    with pytest.raises(SourceFailed, match="s3://bkt: the server could not be asked"):
        SOURCE.list()


@pytest.mark.parametrize("url", ["nonsense", "http://", "http://[x"])
def test_an_endpoint_that_is_none(into: Path, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", url)
    assert failure(SOURCE, "poet", into).reason is SourceReason.UNAVAILABLE


@pytest.mark.parametrize(
    "path", ["..", "a/../b", "/etc", "a//b", "a/", ".", "a\0b", "\udcff", "x" * 600]
)
def test_malformed_paths(path: str) -> None:
    with pytest.raises(InvalidRequest, match="path "):
        SOURCE.signature(path)


def right(method: str, path: str) -> Answer:
    """As S3 answers for an adapter "poet" in the bucket."""
    data = ADAPTER.get(path.partition("?")[0].removeprefix("/bkt/poet/"))
    if data is None:
        return Answer(status=404)
    return Answer(data, headers={"ETag": f'"{hashlib.md5(data).hexdigest()}"'})


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[RawServer]:
    with raw_server(right) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", server.url)
        yield server


def wrong_at(
    method: str, file: str, change: Callable[[Answer], Answer | None]
) -> Callable[[str, str], Answer | None]:
    """Answers rightly but for one method and file."""

    def script(asked: str, path: str) -> Answer | None:
        answer = right(asked, path)
        return change(answer) if (asked, file in path) == (method, True) else answer

    return script


def test_the_raw_server_is_right_unless_told_otherwise(server: RawServer, into: Path) -> None:
    assert fetched(SOURCE, "poet", into)[0] == ADAPTER
    asked = [(method, path.rpartition("/")[2]) for method, path, _ in server.requests]
    assert asked == [(method, file) for method in ("HEAD", "GET") for file in ADAPTER]


@pytest.mark.parametrize("method", ["HEAD", "GET"])
@pytest.mark.parametrize("file", [CONFIG_FILE, WEIGHTS_FILE])
@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (400, SourceReason.DENIED),
        (401, SourceReason.DENIED),
        (403, SourceReason.DENIED),
        (404, SourceReason.NOT_FOUND),
        (412, SourceReason.CHANGED),
        (429, SourceReason.UNAVAILABLE),
        (500, SourceReason.UNAVAILABLE),
        (503, SourceReason.UNAVAILABLE),
    ],
)
def test_statuses(
    server: RawServer, into: Path, method: str, file: str, status: int, reason: SourceReason
) -> None:
    server.script = wrong_at(method, file, lambda _: Answer(b"<oops", status))
    error = failure(SOURCE, "poet", into)
    assert error.reason is reason
    assert file in str(error)
    assert str(status) in str(error)
    assert "secret-of-the-test" not in str(error)
    assert [m for m, path, _ in server.requests if file in path].count(method) == 1  # no retries


@pytest.mark.parametrize("method", ["HEAD", "GET"])
@pytest.mark.parametrize("status", [301, 302, 307, 308])
@pytest.mark.parametrize("region", [{}, {"x-amz-bucket-region": "eu-west-1"}])
def test_redirects(
    server: RawServer, into: Path, method: str, status: int, region: dict[str, str]
) -> None:
    # As a proxy does that sends everything elsewhere, what is asked of the bucket too.
    to = {"Location": "http://127.0.0.1:1/login"} | region

    def script(asked: str, path: str) -> Answer | None:
        wanted = asked == method or path == "/bkt"
        return Answer(status=status, headers=to) if wanted else right(asked, path)

    server.script = script
    error = failure(SOURCE, "poet", into)
    assert error.reason is SourceReason.UNAVAILABLE
    assert f"answered {status}" in str(error)
    assert len(server.requests) <= 4  # what it wanted, and once more what the bucket's region is


def test_a_bucket_of_another_region(server: RawServer, into: Path) -> None:
    def script(method: str, path: str) -> Answer | None:
        if path == "/bkt":
            return Answer(status=301, headers={"x-amz-bucket-region": "eu-west-1"})
        elsewhere = "/eu-west-1/" in server.requests[-1][2]["Authorization"]
        return right(method, path) if elsewhere else Answer(status=301)

    server.script = script
    assert fetched(SOURCE, "poet", into)[0] == ADAPTER


CUT = {
    "cut off": lambda answer: replace(answer, then="cut"),
    "announces too much": lambda answer: replace(answer, announced=len(answer.body) + 9),
    "shorter than its head": lambda answer: replace(answer, body=answer.body[:-1]),
    "longer than its head": lambda answer: replace(answer, body=answer.body + b"x"),
    "damaged": lambda answer: replace(
        answer, headers=answer.headers | {"x-amz-checksum-crc32": "AAAAAA=="}
    ),
}


@pytest.mark.parametrize("file", [CONFIG_FILE, WEIGHTS_FILE])
@pytest.mark.parametrize("how", CUT)
def test_broken_contents(server: RawServer, into: Path, file: str, how: str) -> None:
    server.script = wrong_at("GET", file, CUT[how])
    error = failure(SOURCE, "poet", into, FetchLimits(SIZE + 9, 20.0))
    assert error.reason is SourceReason.TRUNCATED
    assert file in str(error)


@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_a_server_that_hangs_up(server: RawServer, into: Path, method: str) -> None:
    server.script = wrong_at(method, WEIGHTS_FILE, lambda _: None)
    assert failure(SOURCE, "poet", into).reason is SourceReason.UNAVAILABLE


@pytest.mark.parametrize(
    ("file", "then"),
    [(CONFIG_FILE, "hang"), (WEIGHTS_FILE, "hang"), (WEIGHTS_FILE, "trickle")],
)
def test_a_server_that_does_not_come_to_an_end(
    server: RawServer, into: Path, file: str, then: Any
) -> None:
    server.script = wrong_at("GET", file, lambda answer: replace(answer, then=then))
    error = failure(SOURCE, "poet", into, HASTE)
    assert error.reason is SourceReason.TIMEOUT


def test_a_server_that_says_nothing(server: RawServer, into: Path) -> None:
    def silent(method: str, path: str) -> None:
        server.stopping.wait()

    server.script = silent
    assert failure(SOURCE, "poet", into, HASTE).reason is SourceReason.TIMEOUT


def test_a_head_without_a_tag(server: RawServer, into: Path) -> None:
    server.script = wrong_at("HEAD", CONFIG_FILE, lambda answer: replace(answer, headers={}))
    error = failure(SOURCE, "poet", into)
    assert error.reason is SourceReason.UNAVAILABLE
    assert "ETag" in str(error)


def test_what_is_read_is_what_was_looked_at(server: RawServer, into: Path) -> None:
    SOURCE.fetch("poet", _made(into), LIMITS)
    conditions = [headers["If-Match"] for method, _, headers in server.requests if method == "GET"]
    assert conditions == [right("GET", f"/bkt/poet/{file}").headers["ETag"] for file in ADAPTER]


def _made(directory: Path) -> Path:
    directory.mkdir()
    return directory


def test_an_object_that_is_replaced_while_it_is_fetched(
    s3: Any, into: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(s3, "poet")
    download = SOURCE._download

    def replaced(*arguments: Any) -> None:
        s3.put_object(Bucket="bkt", Key=f"poet/{WEIGHTS_FILE}", Body=b"new")
        download(*arguments)

    monkeypatch.setattr(SOURCE, "_download", replaced)
    error = failure(SOURCE, "poet", into)
    assert error.reason is SourceReason.CHANGED
    assert error.retryable


def test_a_listing_that_is_no_xml(server: RawServer) -> None:
    server.script = lambda method, path: Answer(b"<html>welcome to the hotel")
    with pytest.raises(SourceFailed) as caught:
        SOURCE.list()
    assert caught.value.reason is SourceReason.UNAVAILABLE
