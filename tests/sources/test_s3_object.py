"""One object of a bucket: from a server that speaks S3, and from one that does everything wrong."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer

from lorax_serve.errors import SourceFailed, SourceReason
from lorax_serve.sources.s3 import S3Source
from lorax_serve.sources.s3_object import S3Object
from tests.sources.raw_server import Answer, RawServer, closed_port, raw_server

MOST = 1 << 20
CONTENT = bytes(range(256)) * 1000  # more than one chunk
RIGHT = Answer(CONTENT, headers={"ETag": '"one"'})


def read(wanted: S3Object, most: int = MOST, seconds: float = 20.0) -> bytes:
    return wanted.read(most, seconds)


def failure(wanted: S3Object, most: int = MOST, seconds: float = 20.0) -> SourceFailed:
    """How a read fails; its message must name the object."""
    with pytest.raises(SourceFailed) as caught:
        read(wanted, most, seconds)
    assert str(caught.value).startswith(f"{wanted.uri}: ")
    assert "secret-of-the-test" not in str(caught.value)
    return caught.value


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A client of a server with the bucket ``bkt``."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://{host}:{port}")
    client = boto3.client("s3")
    client.create_bucket(Bucket="bkt")
    yield client
    client.delete_object(Bucket="bkt", Key="a/b.yaml")
    client.delete_bucket(Bucket="bkt")
    client.close()
    server.stop()


def test_what_is_there_now(s3: Any) -> None:
    wanted = S3Object("bkt", "a/b.yaml")
    assert failure(wanted).reason is SourceReason.NOT_FOUND
    for content in (b"one", b"two", b""):
        s3.put_object(Bucket="bkt", Key="a/b.yaml", Body=content)
        assert [read(wanted), read(wanted)] == [content, content]
    s3.delete_object(Bucket="bkt", Key="a/b.yaml")
    error = failure(wanted)
    assert error.reason is SourceReason.NOT_FOUND
    assert "404 (NoSuchKey); check the bucket and the path" in str(error)
    assert "404 (NoSuchBucket)" in str(failure(S3Object("no-bucket", "a")))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[RawServer]:
    with raw_server(lambda method, path: RIGHT) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", server.url)
        yield server


def conditions(server: RawServer) -> list[str | None]:
    """What each request so far would not be sent again."""
    assert all((method, path) == ("GET", "/bkt/a.yaml") for method, path, _ in server.requests)
    return [headers.get("If-None-Match") for _, _, headers in server.requests]


def test_what_has_not_changed_is_not_sent_again(server: RawServer) -> None:
    wanted = S3Object("bkt", "a.yaml")
    assert read(wanted) == CONTENT
    server.script = lambda method, path: Answer(status=304)
    assert [read(wanted), read(wanted)] == [CONTENT, CONTENT]
    # A failure makes nothing forgotten, and a change is all that counts.
    server.script = lambda method, path: Answer(status=503)
    assert failure(wanted).reason is SourceReason.UNAVAILABLE
    server.script = lambda method, path: Answer(b"new", headers={"ETag": '"two"'})
    assert read(wanted) == b"new"
    server.script = lambda method, path: Answer(status=304)
    assert read(wanted) == b"new"
    assert conditions(server) == [None, '"one"', '"one"', '"one"', '"one"', '"two"']


def test_a_server_without_tags_is_asked_for_all_of_it(server: RawServer) -> None:
    wanted = S3Object("bkt", "a.yaml")
    for content in (b"one", b"two"):
        server.script = lambda method, path, content=content: Answer(content)  # type: ignore[misc]
        assert read(wanted) == content
    assert conditions(server) == [None, None]
    server.script = lambda method, path: Answer(status=304)  # which nobody has asked for
    assert failure(wanted).reason is SourceReason.UNAVAILABLE


def test_what_came_wrong_is_not_what_is_there(server: RawServer) -> None:
    wanted = S3Object("bkt", "a.yaml")
    server.script = lambda method, path: replace(RIGHT, then="cut")
    assert failure(wanted).reason is SourceReason.TRUNCATED
    server.script = lambda method, path: RIGHT
    assert read(wanted) == CONTENT
    assert conditions(server) == [None, None]


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (302, SourceReason.UNAVAILABLE),
        (400, SourceReason.DENIED),
        (403, SourceReason.DENIED),
        (404, SourceReason.NOT_FOUND),
        (429, SourceReason.UNAVAILABLE),
        (500, SourceReason.UNAVAILABLE),
        (503, SourceReason.UNAVAILABLE),
    ],
)
def test_statuses(server: RawServer, status: int, reason: SourceReason) -> None:
    server.script = lambda method, path: Answer(b"<oops", status)
    error = failure(S3Object("bkt", "a.yaml"))
    assert error.reason is reason
    assert f"answered {status}" in str(error)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (replace(RIGHT, then="cut"), SourceReason.TRUNCATED),
        (replace(RIGHT, announced=len(CONTENT) + 9), SourceReason.TRUNCATED),
        (
            replace(RIGHT, headers={"x-amz-checksum-crc32": "AAAAAA=="}),
            SourceReason.TRUNCATED,
        ),
        (  # more than was announced
            Answer(b"6\r\nabcdef\r\n", 200, {"Transfer-Encoding": "chunked"}, 3, "flood"),
            SourceReason.TRUNCATED,
        ),
        (replace(RIGHT, then="hang"), SourceReason.TIMEOUT),
        (replace(RIGHT, then="trickle"), SourceReason.TIMEOUT),
        (None, SourceReason.UNAVAILABLE),
    ],
)
def test_contents_that_do_not_come(
    server: RawServer, answer: Answer | None, reason: SourceReason
) -> None:
    server.script = lambda method, path: answer
    seconds = 1.0 if reason is SourceReason.TIMEOUT else 20.0
    began = time.monotonic()
    assert failure(S3Object("bkt", "a.yaml"), seconds=seconds).reason is reason
    assert time.monotonic() - began < 10


def test_a_length_is_needed(server: RawServer) -> None:
    """Without one, nobody could tell a part of a list from the whole of it."""
    server.script = lambda method, path: Answer(
        b"3\r\none\r\n0\r\n\r\n", headers={"Content-Length": "", "Transfer-Encoding": "chunked"}
    )
    error = failure(S3Object("bkt", "a.yaml"))
    assert error.reason is SourceReason.UNAVAILABLE
    assert "has no 'ContentLength'" in str(error)


def test_a_server_that_says_nothing(server: RawServer) -> None:
    def silent(method: str, path: str) -> None:
        server.stopping.wait()

    server.script = silent
    assert failure(S3Object("bkt", "a.yaml"), seconds=0.3).reason is SourceReason.TIMEOUT


def test_nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{closed_port()}")
    assert failure(S3Object("bkt", "a.yaml")).reason is SourceReason.UNAVAILABLE


def test_what_is_too_large_is_not_read(server: RawServer) -> None:
    wanted = S3Object("bkt", "a.yaml")
    assert read(wanted, most=len(CONTENT)) == CONTENT
    # A hundred gigabytes that never come: they are not waited for.
    server.script = lambda method, path: replace(RIGHT, announced=100 << 30, then="hang")
    error = failure(wanted, seconds=1000.0)
    assert error.reason is SourceReason.TOO_LARGE
    assert f"has {100 << 30} bytes, more than {MOST}" in str(error)
    server.script = lambda method, path: Answer(status=304)
    assert read(wanted) == CONTENT


@pytest.fixture
def secret(server: RawServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A Secret as the kubelet mounts it, with a file of credentials that boto3 is told of."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    mount = tmp_path / "secret"
    mount.mkdir()
    (mount / "credentials").symlink_to("..data/credentials")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(mount / "credentials"))
    return mount


def rotate(secret: Path, key: str) -> None:
    """Replace it as the kubelet does: a link to a directory."""
    version = secret / f"..{key}"
    version.mkdir()
    (version / "credentials").write_text(
        f"[default]\naws_access_key_id={key}\naws_secret_access_key=secret-of-the-test\n"
    )
    (secret / "..new").symlink_to(version.name)
    (secret / "..new").replace(secret / "..data")


def signers(server: RawServer) -> list[str]:
    """Whose keys have signed each request so far."""
    signatures = [headers["Authorization"] for _, _, headers in server.requests]
    return [each.partition("Credential=")[2].partition("/")[0] for each in signatures]


@pytest.mark.parametrize("kind", ["object", "source"])
def test_rotated_credentials_are_read_again(server: RawServer, secret: Path, kind: str) -> None:
    wanted, source = S3Object("bkt", "a.yaml"), S3Source("bkt", "")

    def ask() -> None:
        read(wanted) if kind == "object" else source.signature("poet")

    with pytest.raises(SourceFailed, match="there are no usable credentials") as caught:
        ask()
    assert caught.value.reason is SourceReason.DENIED
    for key in ("ONE", "TWO"):
        rotate(secret, key)
        ask()
        ask()
    assert list(dict.fromkeys(signers(server))) == ["ONE", "TWO"]
    # Written in place, as outside of Kubernetes.
    file = secret / "..data" / "credentials"
    file.write_text(file.read_text().replace("TWO", "THREE"))
    ask()
    assert signers(server)[-1] == "THREE"


def test_credentials_that_stay_are_read_once(
    server: RawServer, secret: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, make = list[object](), boto3.session.Session

    def counted(**given: object) -> object:
        made.append(given)
        return make(**given)

    monkeypatch.setattr(boto3.session, "Session", counted)
    rotate(secret, "ONE")
    wanted = S3Object("bkt", "a.yaml")
    server.script = lambda method, path: Answer(status=403)
    for _ in range(3):  # being denied is no reason: nothing would be different
        assert failure(wanted).reason is SourceReason.DENIED
    assert len(made) == 1
    rotate(secret, "TWO")
    failure(wanted)
    assert (len(made), signers(server)) == (2, ["ONE", "ONE", "ONE", "TWO"])
