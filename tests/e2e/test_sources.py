"""A source that fails in every way, under a real server: what is told, and whom it disturbs."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import boto3
import grpc
import pytest
from moto.server import ThreadedMotoServer

from lorax_serve.client import AsyncClient, Unavailable
from lorax_serve.errors import RejectReason, SourceFailed, SourceReason
from lorax_serve.pb.lorax.v1 import generation_pb2 as pb
from lorax_serve.pb.lorax.v1.generation_pb2_grpc import GenerationServiceStub
from lorax_serve.server.app import Server
from lorax_serve.sources.source import ADAPTER_FILES, WEIGHTS_FILE
from lorax_serve.store.digest import digest_of
from tests.e2e.conftest import StartServer
from tests.e2e.process import start_process
from tests.e2e.test_serving import client_of, integrity
from tests.server.harness import until
from tests.sources.accounts import forget_accounts
from tests.sources.raw_server import Answer, RawServer, closed_port, raw_server

PROMPT = "w10 w11 w12 w13"
ALL = "all-linear"
HTML = b"<html><body>Welcome to the hotel. Room number, please.</body></html>"

Wrong = Callable[[str, Answer], "Answer | None"]
"""From a method with a file, and the right answer, to a wrong one."""


@dataclass(frozen=True)
class Told:
    """What a request is answered with: a status, and a reason in the trailing metadata."""

    code: grpc.StatusCode
    reason: SourceReason | RejectReason | None


UNAVAILABLE = Told(grpc.StatusCode.UNAVAILABLE, SourceReason.UNAVAILABLE)
TIMEOUT = Told(grpc.StatusCode.UNAVAILABLE, SourceReason.TIMEOUT)
TRUNCATED = Told(grpc.StatusCode.UNAVAILABLE, SourceReason.TRUNCATED)
TOO_LARGE = Told(grpc.StatusCode.RESOURCE_EXHAUSTED, SourceReason.TOO_LARGE)
DENIED = Told(grpc.StatusCode.PERMISSION_DENIED, SourceReason.DENIED)


class Bucket:
    """Answers as S3 does for adapters in a directory, or as ``wrong`` says, by adapter."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.wrong: dict[str, Wrong] = {}
        self.asked: list[str] = []
        self.server: RawServer

    def __call__(self, method: str, path: str) -> Answer | None:
        name, _, file = path.partition("?")[0].removeprefix("/bkt/").partition("/")
        self.asked.append(name)
        source = self._root / name.partition(".")[0] / file
        if not source.is_file():
            return Answer(status=404)
        data = source.read_bytes()
        right = Answer(data, headers={"ETag": f'"{hashlib.md5(data).hexdigest()}"'})
        return self.wrong[name](f"{method} {file}", right) if name in self.wrong else right

    def hang(self, asked: str, right: Answer) -> None:
        """Accept, and say nothing."""
        self.server.stopping.wait()


def in_the_body(change: Callable[[Answer], Answer]) -> Wrong:
    """All is right but the weights."""
    return lambda asked, right: change(right) if asked == f"GET {WEIGHTS_FILE}" else right


TRICKLES = in_the_body(lambda right: replace(right, then="trickle"))


def always(answer: Answer) -> Wrong:
    return lambda asked, right: answer


def failures(bucket: Bucket) -> dict[str, tuple[Wrong, Told]]:
    """By the name of the adapter that meets them; what is before the dot is its directory."""
    tag = {"ETag": '"html"', "Content-Type": "text/html"}
    return {
        "poet.hangs-up": (lambda asked, right: None, UNAVAILABLE),
        "poet.says-nothing": (bucket.hang, TIMEOUT),
        "poet.says-nothing-more": (in_the_body(lambda it: replace(it, then="hang")), TIMEOUT),
        "poet.trickles": (TRICKLES, TIMEOUT),
        "poet.is-cut": (in_the_body(lambda it: replace(it, then="cut")), TRUNCATED),
        "poet.announces-more": (
            in_the_body(lambda it: replace(it, announced=len(it.body) + 9)),
            TRUNCATED,
        ),
        "poet.announces-less": (
            in_the_body(lambda it: replace(it, announced=len(it.body) - 9)),
            TRUNCATED,
        ),
        "poet.is-shorter": (in_the_body(lambda it: replace(it, body=it.body[9:])), TRUNCATED),
        "poet.is-longer": (in_the_body(lambda it: replace(it, body=it.body * 2)), TRUNCATED),
        "poet.is-too-large": (
            lambda asked, right: replace(right, announced=1 << 40),
            TOO_LARGE,
        ),
        "poet.500": (always(Answer(HTML, 500)), UNAVAILABLE),
        "poet.503": (always(Answer(HTML, 503)), UNAVAILABLE),
        "poet.403": (always(Answer(HTML, 403)), DENIED),
        "poet.404": (always(Answer(HTML, 404)), Told(grpc.StatusCode.NOT_FOUND, None)),
        "poet.moved": (always(Answer(HTML, 302, {"Location": "/login"})), UNAVAILABLE),
        "poet.html": (always(Answer(HTML, headers={"Content-Type": "text/html"})), UNAVAILABLE),
        "poet.html-with-a-tag": (
            always(Answer(HTML, headers=tag)),
            Told(grpc.StatusCode.INVALID_ARGUMENT, RejectReason.BAD_CONFIG),
        ),
    }


@pytest.fixture
def bucket(
    make_adapter: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Bucket]:
    """With the adapters ``steady``, ``other`` and ``poet``, each of which has as many names as
    there are ends to put behind a dot."""
    forget_accounts(monkeypatch, tmp_path)
    for seed, name in enumerate(("steady", "other", "poet")):
        make_adapter(name, seed, r=2 + seed, target_modules=ALL)
    bucket = Bucket(tmp_path)
    with raw_server(bucket) as bucket.server:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", bucket.server.url)
        yield bucket


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Case:
    """A server on a bucket."""

    server: Server
    client: AsyncClient
    channel: grpc.aio.Channel
    clock: Clock
    state: Path

    async def ask(self, adapter: str) -> tuple[int, ...]:
        """The tokens of a request for an adapter."""
        answer = await self.client.generate(
            PROMPT,
            adapter=adapter,
            max_new_tokens=60,
            temperature=0.9,
            seed=5,
            ignore_eos=True,
            return_tokens=True,
        )
        return tuple(token.id for token in answer.tokens)

    async def told(self, adapter: str) -> tuple[Told, str]:
        """What a request for an adapter is refused with, as it is on the wire; and the message."""
        request = pb.GenerateRequest(text=PROMPT, adapter_id=adapter)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await GenerationServiceStub(self.channel).Generate(request, timeout=60)
        trailing: Any = dict(caught.value.trailing_metadata() or ())
        reason = trailing.get("lorax-source-reason") or trailing.get("lorax-reject-reason")
        kind: Any = RejectReason if "lorax-reject-reason" in trailing else SourceReason
        return Told(caught.value.code(), reason and kind(reason)), caught.value.details() or ""

    @contextlib.asynccontextmanager
    async def streams(self, adapter: str) -> AsyncIterator[list[tuple[int, ...]]]:
        """Two streams of an adapter at all times; their tokens."""
        seen: list[tuple[int, ...]] = []
        over = asyncio.Event()

        async def follow() -> None:
            while not over.is_set():
                seen.append(await self.ask(adapter))

        following = [asyncio.create_task(follow()) for _ in range(2)]
        yield seen
        over.set()
        await asyncio.gather(*following)

    @property
    def staged(self) -> list[Path]:
        return list((self.state / "staging").iterdir())


@pytest.fixture
async def start_case(
    start_server: StartServer, bucket: Bucket, tmp_path: Path
) -> AsyncIterator[Callable[[float], Awaitable[Case]]]:
    async with contextlib.AsyncExitStack() as stack:

        async def start(fetch_seconds: float) -> Case:
            clock, state = Clock(), tmp_path / "state"
            settings = {
                "source": "s3://bkt",
                "load_on_demand": True,
                "fetch_seconds": fetch_seconds,
            }
            server = await start_server(state=state, clock=clock, server=settings)
            client = await stack.enter_async_context(client_of(server))
            address = f"127.0.0.1:{server.port}"
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(address))
            return Case(server, client, channel, clock, state)

        yield start


async def test_each_failure_is_told_and_disturbs_nobody(
    bucket: Bucket,
    start_case: Callable[[float], Awaitable[Case]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = await start_case(4.0)  # enough for what comes as it should, on a busy machine too
    steady, poet = await case.ask("steady"), await case.ask("poet")
    assert steady != poet
    wrong = failures(bucket)
    bucket.wrong = {name: how for name, (how, _) in wrong.items()}
    async with case.streams("steady") as seen:
        answers = dict(zip(wrong, await asyncio.gather(*map(case.told, wrong)), strict=True))
        with monkeypatch.context() as nobody_listens:
            nobody_listens.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{closed_port()}")
            answers["poet.refuses"] = await case.told("poet.refuses")
        expected = {name: told for name, (_, told) in wrong.items()}
        expected["poet.refuses"] = UNAVAILABLE
        assert {name: told for name, (told, _) in answers.items()} == expected
        for name, (_, message) in answers.items():
            assert name in message
            assert any(word in message for word in ("try again", "check", "raise", "copy")), name
        await until(lambda: case.staged == [])
        # Each is left alone for a while, also when its source is well again.
        asked = len(bucket.asked)
        bucket.wrong = {}
        assert await asyncio.gather(*map(case.told, answers)) == list(answers.values())
        assert len(bucket.asked) == asked
        case.clock.now = 1.0
        assert set(await asyncio.gather(*map(case.ask, answers))) == {poet}
    assert set(seen) == {steady}
    assert len(seen) > 4
    kept = {each.name for each in (case.state / "adapters").iterdir()}
    assert kept == {digest_of(tmp_path / name) for name in ("steady", "poet")}
    assert await integrity(case.server) == ()


async def test_what_hangs_holds_up_nothing_else(
    bucket: Bucket, start_case: Callable[[float], Awaitable[Case]]
) -> None:
    case = await start_case(600.0)
    steady, other = await case.ask("steady"), await case.ask("other")
    hanging = [f"poet.{number}" for number in range(8)]
    bucket.wrong = dict.fromkeys(hanging, TRICKLES)
    async with case.streams("steady") as seen:
        asking = [asyncio.create_task(case.ask(name)) for name in hanging]
        await until(lambda: set(hanging) <= set(bucket.asked))
        # What the source gives, what is on the disk, and what is written there.
        assert await case.ask("other.anew") == other
        await case.client.load_adapter("swapped", "steady")
        await case.client.load_adapter("swapped", "other")
        assert await case.ask("swapped") == other
        await case.client.roll_back_adapter("swapped")
        assert await case.ask("swapped") == steady
        assert (await case.client.unload_adapter("swapped")).host > 0
        assert not any(task.done() for task in asking)
        for task in asking:
            task.cancel()
        await asyncio.wait(asking)
    assert set(seen) == {steady}


async def test_a_restart_needs_no_source(
    start_server: StartServer,
    make_adapter: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And what the source has anew is served when it is there again."""
    forget_accounts(monkeypatch, tmp_path)
    moto = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    moto.start()
    _, port = moto.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{port}")
    s3 = boto3.client("s3")
    s3.create_bucket(Bucket="restart")

    def put(name: str, seed: int) -> None:
        directory = make_adapter(name, seed, r=4, target_modules=ALL)
        for file in ADAPTER_FILES:
            s3.upload_file(str(directory / file), "restart", f"{name}/{file}")

    async def start(clock: Clock) -> Server:
        settings = {"source": "s3://restart", "watch_seconds": 0.01}
        return await start_server(state=tmp_path / "state", clock=clock, server=settings)

    put("poet", 1)
    server = await start(Clock())
    async with client_of(server) as client:
        before = await client.generate(PROMPT, adapter="poet", max_new_tokens=20)
    await server.stop()
    moto.stop()

    clock = Clock()
    server = await start(clock)
    async with client_of(server) as client:
        after = await client.generate(PROMPT, adapter="poet", max_new_tokens=20)
        assert (after.text, after.adapter_version) == (before.text, before.adapter_version)
        (error,) = server.refused.values()
        assert isinstance(error, SourceFailed)
        assert error.reason is SourceReason.UNAVAILABLE
        moto = ThreadedMotoServer("127.0.0.1", port, verbose=False)
        moto.start()
        put("pilot", 2)
        clock.now = 1.0
        await until(lambda: {each.name for each in server.adapters} == {"poet", "pilot"})
        assert server.refused == {}
        assert (await client.generate(PROMPT, adapter="pilot", max_new_tokens=20)).text
    s3.close()
    moto.stop()


async def test_a_server_stops_though_its_source_hangs(
    bucket: Bucket, tiny_model: Path, tmp_path: Path
) -> None:
    bucket.wrong = {"poet": TRICKLES}
    process, client = await start_process(
        tiny_model, "s3://bkt", tmp_path / "state", "--fetch-seconds", "3000"
    )
    try:
        async with client:
            asking = asyncio.create_task(client.generate(PROMPT, adapter="poet"))
            await until(lambda: "poet" in bucket.asked)
            process.send_signal(signal.SIGTERM)
            with pytest.raises(Unavailable):
                await asking
            assert await asyncio.to_thread(process.wait, 60) == 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert list((tmp_path / "state" / "staging").iterdir()) == []
