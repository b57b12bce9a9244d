"""A manifest in a file or in a bucket: what it said last, and what is told if it cannot be read."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from lorax_serve.errors import InvalidRequest, SourceFailed, SourceReason
from lorax_serve.registry import manifest_reader
from lorax_serve.registry.manifest import parse_manifest
from lorax_serve.registry.manifest_reader import ManifestReader
from tests.sources.accounts import forget_accounts
from tests.sources.raw_server import Answer, RawServer, closed_port, raw_server

ONE = "adapters: [{name: poet, source: poet}]"
TWO = "adapters: [{name: pilot, source: pilot}]"
PLACE = "s3://bkt/config/adapters.yaml"


class Bucket:
    """Has one object, ``text``, or none; answers as S3 does, conditions included."""

    def __init__(self) -> None:
        self.text: str | None = ONE
        self.sent: list[int] = []
        self.server: RawServer

    def __call__(self, method: str, path: str) -> Answer:
        if self.text is None or path != "/bkt/config/adapters.yaml":
            return self._send(Answer(b"<Error><Code>NoSuchKey</Code></Error>", status=404))
        data = self.text.encode()
        tag = f'"{hashlib.md5(data).hexdigest()}"'
        if self.server.requests[-1][2].get("If-None-Match") == tag:
            return self._send(Answer(status=304, headers={"ETag": tag}))
        return self._send(Answer(data, headers={"ETag": tag}))

    def _send(self, answer: Answer) -> Answer:
        self.sent.append(answer.status)
        return answer


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Bucket]:
    forget_accounts(monkeypatch, tmp_path)
    bucket = Bucket()
    with raw_server(bucket) as bucket.server:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", bucket.server.url)
        yield bucket


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What has been parsed so far."""
    parsed, parse = list[bytes](), parse_manifest

    def counted(text: bytes, where: str) -> object:
        parsed.append(text)
        return parse(text, where)

    monkeypatch.setattr(manifest_reader, "parse_manifest", counted)
    return parsed


async def test_a_file_is_another_one_each_time(tmp_path: Path, parsed: list[bytes]) -> None:
    file = tmp_path / "adapters.yaml"
    reader = ManifestReader(str(file))
    assert (reader.where, reader.last) == (str(file), None)
    for text, name in ((ONE, "poet"), (TWO, "pilot")):
        file.write_text(text)
        found = await reader.read()
        assert found.names == {name}
        assert await reader.read() is found is reader.last
    assert parsed == [ONE.encode(), TWO.encode()]
    file.unlink()
    with pytest.raises(InvalidRequest, match=f"manifest {file} cannot be read: No such file"):
        await reader.read()
    assert reader.last is found


async def test_a_file_that_is_too_large(tmp_path: Path) -> None:
    file = tmp_path / "adapters.yaml"
    file.write_text(ONE.ljust(4 << 20))
    reader = ManifestReader(str(file))
    assert (await reader.read()).names == {"poet"}
    file.write_text(ONE.ljust((4 << 20) + 1))
    with pytest.raises(InvalidRequest, match=f"manifest {file} has more than 4194304 bytes"):
        await reader.read()


async def test_home_is_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "adapters.yaml").write_text(ONE)
    assert (await ManifestReader("~/adapters.yaml").read()).names == {"poet"}


async def test_an_object_is_downloaded_and_parsed_once(bucket: Bucket, parsed: list[bytes]) -> None:
    reader = ManifestReader(PLACE)
    assert reader.where == PLACE
    first = await reader.read()
    assert first.names == {"poet"}
    assert await reader.read() is await reader.read() is first
    bucket.text = TWO
    second = await reader.read()
    assert second.names == {"pilot"}
    assert await reader.read() is second
    assert bucket.sent == [200, 304, 304, 200, 304]
    assert parsed == [ONE.encode(), TWO.encode()]


async def test_what_it_said_last_is_kept(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = ManifestReader(PLACE)
    last = await reader.read()
    bucket.text = None
    with pytest.raises(SourceFailed, match=rf"manifest {PLACE}: the server answered 404 .*check"):
        await reader.read()
    with monkeypatch.context() as down:
        down.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{closed_port()}")
        with pytest.raises(SourceFailed, match=f"manifest {PLACE}: .*check AWS_ENDPOINT_URL_S3"):
            await reader.read()
    assert reader.last is last
    bucket.text = ONE
    assert await reader.read() is last


async def test_a_broken_object_is_told_of_each_time(bucket: Bucket, parsed: list[bytes]) -> None:
    """Alerts count how often, also if there is nothing to download."""
    reader = ManifestReader(PLACE)
    bucket.text = "adapters: [\n"
    for _ in range(3):
        with pytest.raises(InvalidRequest, match=f"manifest {PLACE} line 2: not valid YAML"):
            await reader.read()
    assert (bucket.sent, len(parsed), reader.last) == ([200, 304, 304], 1, None)
    bucket.text = ONE
    assert (await reader.read()).names == {"poet"}


async def test_an_object_that_is_too_large(bucket: Bucket) -> None:
    bucket.text = ONE.ljust((4 << 20) + 1)
    with pytest.raises(SourceFailed) as caught:
        await ManifestReader(PLACE).read()
    assert caught.value.reason is SourceReason.TOO_LARGE
    assert f"manifest {PLACE}: has 4194305 bytes, more than 4194304" in str(caught.value)


async def test_a_mount_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest_reader, "_SECONDS", 0.05)
    monkeypatch.setattr(manifest_reader, "_GRACE_SECONDS", 0.05)
    file, release, asked = tmp_path / "adapters.yaml", threading.Event(), list[Path]()
    file.write_text(ONE)
    opening = Path.open

    def hanging(path: Path, mode: str = "r") -> object:
        asked.append(path)
        release.wait()
        return opening(path, mode)

    monkeypatch.setattr(Path, "open", hanging)
    reader = ManifestReader(str(file))
    for _ in range(3):
        with pytest.raises(SourceFailed, match=f"manifest {file}: nothing came within 0.1 s"):
            await reader.read()
    assert asked == [file]  # one waits, not one more at each pass
    release.set()
    async with asyncio.timeout(5):
        while reader.last is None:
            try:
                await reader.read()
            except SourceFailed:
                await asyncio.sleep(0.01)
    assert reader.last.names == {"poet"}


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("", "manifest '' names nothing; give --manifest PATH"),
        ("a\0b", "names nothing"),
        ("https://host/adapters.yaml", "give --manifest PATH or --manifest s3://bucket/path"),
        ("hf://org/repo", "manifest hf://...: is read from a file or a bucket only"),
        ("s3://bucket", "names no file in the bucket"),
    ],
)
def test_what_is_no_place(written: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        ManifestReader(written)
