"""Adapters that clients send, over a fake engine and a real state directory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio

from lorax_serve.config import EngineConfig
from lorax_serve.errors import (
    AdapterConflict,
    AdapterRejected,
    InvalidRequest,
    RejectReason,
    SourceFailed,
    SourceReason,
)
from lorax_serve.pb.lorax.v1 import adapter_pb2 as pb
from lorax_serve.store.digest import CONFIG_FILE, WEIGHTS_FILE, digest_of, digest_of_bytes
from tests.server.harness import Harness, serving, until

CONFIG, WEIGHTS = b'{"r": 8}', b"weights" * 10


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """An adapter on the client's side, of more than one message."""
    return write(tmp_path / "mine", b"w" * 3_000_000)


def write(directory: Path, weights: bytes, config: bytes = CONFIG) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / CONFIG_FILE).write_bytes(config)
    (directory / WEIGHTS_FILE).write_bytes(weights)
    return directory


@pytest_asyncio.fixture
async def keeping(tokenizer_dir: Path, tmp_path: Path) -> AsyncIterator[Harness]:
    """A server with a state directory and no source."""
    async with start(tokenizer_dir, tmp_path) as harness:
        yield harness


def start(tokenizer: Path, tmp_path: Path, **settings: Any) -> Any:
    return serving(tokenizer, None, **{"state": tmp_path / "state", "fetch_seconds": 2, **settings})


def left_in(tmp_path: Path, part: str) -> list[str]:
    return [each.name for each in (tmp_path / "state" / part).iterdir()]


def header(**fields: Any) -> pb.UploadAdapterRequest:
    whole = {
        "adapter_id": "poet",
        "digest": digest_of_bytes(CONFIG, WEIGHTS),
        "config_bytes": len(CONFIG),
        "weights_bytes": len(WEIGHTS),
    }
    return pb.UploadAdapterRequest(header=pb.UploadHeader(**{**whole, **fields}))


def data(content: bytes) -> pb.UploadAdapterRequest:
    return pb.UploadAdapterRequest(data=content)


async def send(harness: Harness, messages: Iterable[Any]) -> tuple[grpc.StatusCode, str]:
    try:
        await harness.administration.UploadAdapter(iter(messages))
    except grpc.aio.AioRpcError as error:
        return error.code(), error.details() or ""
    return grpc.StatusCode.OK, ""


async def test_what_is_sent_is_served_and_survives(
    keeping: Harness, directory: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    loaded = await keeping.client.upload_adapter("poet", directory, weight=3, pinned=True)
    assert (loaded.name, loaded.digest, loaded.weight) == ("poet", digest_of(directory), 3)
    assert loaded.pinned
    assert loaded.report is not None
    assert (await keeping.client.generate("one </s>", adapter="poet")).adapter_digest == (
        loaded.digest
    )
    assert left_in(tmp_path, "staging") == []
    await keeping.server.stop()
    async with start(tokenizer_dir, tmp_path) as again:
        (listed,) = await again.client.list_adapters()
        same = (listed.version, listed.digest, listed.weight, listed.pinned)
        assert same == (loaded.version, loaded.digest, 3, True)
        assert again.engine.pinned == {1}


@pytest.mark.parametrize("cut", [1, len(CONFIG) - 1, len(CONFIG), len(CONFIG) + 3, 1000])
async def test_messages_may_be_cut_anywhere(keeping: Harness, tmp_path: Path, cut: int) -> None:
    whole = CONFIG + WEIGHTS
    parts = [whole[start : start + cut] for start in range(0, len(whole), cut)]
    assert await send(keeping, [header(), data(b""), *map(data, parts)]) == (
        grpc.StatusCode.OK,
        "",
    )
    (digest,) = left_in(tmp_path, "adapters")
    entry = tmp_path / "state" / "adapters" / digest
    assert (entry / CONFIG_FILE).read_bytes() == CONFIG
    assert (entry / WEIGHTS_FILE).read_bytes() == WEIGHTS


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([], "header is missing"),
        ([data(b"x")], "header is missing"),
        ([header(), header()], "data is missing"),
        ([header(), pb.UploadAdapterRequest()], "data is missing"),
        ([header(), data(CONFIG)], "announced 78 bytes, but 8 came"),
        ([header(), data(CONFIG + WEIGHTS + b"x")], "but more came"),
        ([header(config_bytes=0)], "config_bytes must be at least 1"),
        ([header(weights_bytes=0)], "weights_bytes must be at least 1"),
        ([header(digest="abc")], "digest 'abc' must be the 64"),
        ([header(weight=101), data(CONFIG + WEIGHTS)], r"weight must be in [1, 100]"),
        ([header(adapter_id="../x"), data(CONFIG + WEIGHTS)], "'../x' is not a valid name"),
        ([header(), data(CONFIG + WEIGHTS[::-1])], "digest"),
    ],
)
async def test_what_is_not_as_announced_is_refused(
    keeping: Harness, tmp_path: Path, messages: list[Any], says: str
) -> None:
    code, message = await send(keeping, messages)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert says in message
    assert left_in(tmp_path, "staging") == left_in(tmp_path, "adapters") == []
    assert await keeping.client.list_adapters() == []
    assert await send(keeping, [header(), data(CONFIG + WEIGHTS)]) == (grpc.StatusCode.OK, "")


async def test_a_refusal_of_the_engine_leaves_what_was_loaded(
    keeping: Harness, tmp_path: Path
) -> None:
    old = await keeping.client.upload_adapter("poet", write(tmp_path / "a", b"1"))
    with pytest.raises(AdapterRejected) as caught:
        await keeping.client.upload_adapter("poet", write(tmp_path / "b", b"2", b"bad"))
    assert caught.value.reason is RejectReason.SHAPE_MISMATCH
    assert await keeping.client.list_adapters() == [old]
    assert left_in(tmp_path, "adapters") == [old.digest]


async def test_a_client_that_goes_away_leaves_nothing(keeping: Harness, tmp_path: Path) -> None:
    call = keeping.administration.UploadAdapter()
    await call.write(header())
    await call.write(data(CONFIG))
    await until(lambda: left_in(tmp_path, "staging") != [])
    with pytest.raises(AdapterConflict, match="being loaded by another call"):
        await keeping.client.upload_adapter("poet", write(tmp_path / "a", b"1"))
    call.cancel()
    await until(lambda: left_in(tmp_path, "staging") == [])
    await keeping.client.upload_adapter("poet", write(tmp_path / "a", b"1"))


async def test_a_client_that_goes_away_at_the_end_does_not_stop_the_load(
    keeping: Harness, directory: Path
) -> None:
    keeping.engine.loads_open.clear()
    upload = asyncio.create_task(keeping.client.upload_adapter("poet", directory))
    await until(lambda: keeping.engine.loads != [])
    upload.cancel()
    await asyncio.wait([upload])
    keeping.engine.loads_open.set()
    await until(lambda: keeping.server.adapters != [])
    assert keeping.server.adapters[0].info.digest == digest_of(directory)


async def test_one_that_does_not_come_in_time(tokenizer_dir: Path, tmp_path: Path) -> None:
    async with start(tokenizer_dir, tmp_path, fetch_seconds=0.2) as harness:
        call = harness.administration.UploadAdapter()
        await call.write(header())
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "--fetch-seconds" in (caught.value.details() or "")
        assert left_in(tmp_path, "staging") == []


async def test_one_that_is_too_large(tokenizer_dir: Path, tmp_path: Path, directory: Path) -> None:
    small = EngineConfig(max_adapter_bytes=1000)
    async with start(tokenizer_dir, tmp_path, engine=small) as harness:
        with pytest.raises(SourceFailed, match="--max-adapter-bytes") as caught:
            await harness.client.upload_adapter("poet", directory)
        assert caught.value.reason is SourceReason.TOO_LARGE
        assert left_in(tmp_path, "staging") == []


async def test_a_server_that_keeps_nothing_takes_none(harness: Harness, directory: Path) -> None:
    with pytest.raises(AdapterConflict, match="start it with --state DIR"):
        await harness.client.upload_adapter("poet", directory)


async def test_a_directory_without_an_adapter(harness: Harness, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"No such file or directory: .*adapter_config"):
        await harness.client.upload_adapter("poet", tmp_path)
