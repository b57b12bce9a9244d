"""Adapters loaded, swapped and unloaded under running requests, over real gRPC."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from lorax_serve.client import AsyncClient, Generation, StopReason
from lorax_serve.errors import AdapterNotFound, AdapterRejected
from lorax_serve.server.app import Server
from tests.e2e.conftest import StartServer

PROMPT = "w10 w11 w12 w13"
ALL = "all-linear"
# Tokens of a request that outlives what a test does beside it: at least half a second, and for one
# that is not waited for, more than the tests' deadlines and delays by an order of magnitude.
LONG = 2000
ENDLESS = 8000


def client_of(server: Server) -> AsyncClient:
    return AsyncClient(f"127.0.0.1:{server.port}")


async def integrity(server: Server) -> tuple[str, ...]:
    return await server._engine.check_integrity()


async def until_idle(server: Server) -> None:
    async with asyncio.timeout(20):
        while server.stats.running or server.stats.waiting or server._engine.in_flight:
            await integrity(server)  # a round trip brings fresh gauges
            await asyncio.sleep(0.02)


async def text_of(stream: object) -> str:
    return "".join([chunk.text async for chunk in stream])  # type: ignore[attr-defined]


async def test_inspecting_finds_what_a_load_would(
    start_server: StartServer, make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    make_adapter("good", r=4, target_modules=["q_proj"])
    (make_adapter("bad", target_modules=["q_proj"]) / "adapter_model.safetensors").write_bytes(b"?")
    server = await start_server(tmp_path)
    async with client_of(server) as client:
        await client.unload_adapter("good")
        dry = await client.inspect_adapter("good")
        assert (dry.applied, dry.num_matched, len(dry.modules)) == (True, 4, 2)
        assert await client.list_adapters() == []
        loaded = await client.load_adapter("good")
        assert loaded.report == dry.brief()
        assert (dry.digest, dry.host_bytes) == (loaded.digest, loaded.host_bytes)
        bad = await client.inspect_adapter("bad")
        with pytest.raises(AdapterRejected) as caught:
            await client.load_adapter("bad")
        assert caught.value.report == bad
        assert bad.reason is caught.value.reason


async def test_tokens_do_not_depend_on_the_batch(
    start_server: StartServer, make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    make_adapter("a", 1, r=4, target_modules=ALL)
    make_adapter("b", 2, r=9, target_modules=["q_proj", "down_proj"])
    server = await start_server(tmp_path)
    requests = [
        (name, seed, length)
        for seed, name in enumerate([None, "a", "b", "a", None, "b", "a", "b", None, "a"])
        for length in (3, 17)
    ]

    async def ask(client: AsyncClient, name: str | None, seed: int, length: int) -> Generation:
        prompt = [3 + (seed * 7 + k) % 100 for k in range(length)]
        return await client.generate(
            prompt,
            adapter=name,
            seed=seed,
            temperature=0.9,
            top_p=0.8,
            max_new_tokens=40,
            ignore_eos=True,
            return_tokens=True,
        )

    async with client_of(server) as client:
        alone = [await ask(client, *request) for request in requests]
        together = await asyncio.gather(*(ask(client, *request) for request in requests))
    assert [g.tokens for g in alone] == [g.tokens for g in together]
    assert len({g.tokens for g in alone}) == len(requests)
    assert all(g.adapter == name for g, (name, _, _) in zip(alone, requests, strict=True))


async def test_cancelled_streams_leave_nothing_behind(
    start_server: StartServer, make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    for seed, name in enumerate("abcd"):
        make_adapter(name, seed, r=2 + seed, target_modules=ALL)
    server = await start_server(tmp_path, adapter_slots=2, max_batch_size=6, max_batch_tokens=16)
    chance = random.Random(5)

    async def cancelled(client: AsyncClient, name: str | None) -> None:
        stream = client.stream(PROMPT, adapter=name, max_new_tokens=ENDLESS, ignore_eos=True)

        async def read() -> None:
            async for _ in stream:
                pass

        task = asyncio.create_task(read())
        await asyncio.sleep(chance.choice((0.0, 0.01, 0.05, 0.2)) * chance.random())
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async with client_of(server) as client:
        names = [chance.choice((None, "a", "b", "c", "d")) for _ in range(200)]
        await asyncio.gather(*(cancelled(client, name) for name in names))
        await until_idle(server)
        assert await integrity(server) == ()
        assert server.stats.kv_tokens == 0
        for name in "abcd":  # nothing holds a reference any more
            assert (await asyncio.wait_for(client.unload_adapter(name), 10)).host > 0
        assert server.stats.adapters.host == server.stats.adapters.host_bytes == 0


CLIENT_THAT_DIES = """
import os, sys
from lorax_serve.client import Client
client = Client(sys.argv[1])
streams = [client.stream("w10 w11", adapter="a", max_new_tokens=8000, ignore_eos=True)
           for _ in range(4)]
for stream in streams:
    next(stream)
os.kill(os.getpid(), 9)
"""


async def test_a_client_that_dies_leaves_nothing_behind(
    start_server: StartServer, make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    make_adapter("a", r=2, target_modules=ALL)
    server = await start_server(tmp_path)
    command = [sys.executable, "-c", CLIENT_THAT_DIES, f"127.0.0.1:{server.port}"]
    died = await asyncio.to_thread(subprocess.run, command, check=False, timeout=60)
    assert died.returncode == -9
    await until_idle(server)
    assert await integrity(server) == ()
    async with client_of(server) as client:
        await asyncio.wait_for(client.unload_adapter("a"), 10)


async def test_a_deadline_frees_the_request(start_server: StartServer) -> None:
    from lorax_serve.client import TimedOut

    server = await start_server()
    async with client_of(server) as client:
        with pytest.raises(TimedOut):
            await client.generate(PROMPT, max_new_tokens=ENDLESS, ignore_eos=True, timeout=0.1)
        await until_idle(server)
    assert await integrity(server) == ()


async def test_unload_waits_for_the_last_request(
    start_server: StartServer, make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    make_adapter("a", r=4, target_modules=ALL)
    server = await start_server(tmp_path)
    async with client_of(server) as client:
        whole = await client.generate(PROMPT, adapter="a", max_new_tokens=LONG, ignore_eos=True)
        stream = client.stream(PROMPT, adapter="a", max_new_tokens=LONG, ignore_eos=True)
        first = await anext(stream)
        unload = asyncio.create_task(client.unload_adapter("a"))
        await asyncio.sleep(0.05)
        assert not unload.done()
        with pytest.raises(AdapterNotFound):
            await client.generate(PROMPT, adapter="a")
        (draining,) = await client.list_adapters()
        assert (draining.state, draining.active_requests) == ("draining", 1)
        assert first.text + await text_of(stream) == whole.text
        assert (await unload).host > 0
        assert await client.list_adapters() == []


async def test_replacing_a_name_keeps_running_requests_on_their_version(
    start_server: StartServer, make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    make_adapter("one", 1, r=4, target_modules=ALL)
    make_adapter("two", 2, r=4, target_modules=ALL)
    server = await start_server(tmp_path)
    options = {"max_new_tokens": LONG, "ignore_eos": True}
    async with client_of(server) as client:
        old = await client.generate(PROMPT, adapter="one", **options)  # type: ignore[arg-type]
        new = await client.generate(PROMPT, adapter="two", **options)  # type: ignore[arg-type]
        stream = client.stream(PROMPT, adapter="one", **options)  # type: ignore[arg-type]
        first = await anext(stream)
        replaced = await client.load_adapter("one", "two")
        after = await client.generate(PROMPT, adapter="one", **options)  # type: ignore[arg-type]
        assert first.text + await text_of(stream) == old.text != new.text
        assert after.text == new.text
        assert after.adapter_digest == replaced.digest == new.adapter_digest
        assert first.adapter_version != after.adapter_version


async def test_a_bad_adapter_is_refused_and_disturbs_nobody(
    start_server: StartServer, make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    make_adapter("good", r=4, target_modules=ALL)
    make_adapter("olora", r=4, init_lora_weights="olora", target_modules=["q_proj"])
    server = await start_server(tmp_path)
    assert list(server.refused) == ["olora"]
    async with client_of(server) as client:
        with pytest.raises(AdapterRejected, match="init_lora_weights"):
            await client.load_adapter("olora")
        assert [adapter.name for adapter in await client.list_adapters()] == ["good"]
        with pytest.raises(AdapterNotFound):
            await client.generate(PROMPT, adapter="olora")
        assert (await client.generate(PROMPT, adapter="good")).stop_reason is not StopReason.ERROR
        page = await asyncio.to_thread(
            lambda: urllib.request.urlopen(f"http://127.0.0.1:{server.metrics_port}/metrics").read()
        )
    assert b'lorax_adapter_rejects_total{reason="unsupported"} 2.0' in page


async def test_an_overflowing_adapter_fails_alone(
    start_server: StartServer, make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    make_adapter("huge", r=4, lora_alpha=10**38, target_modules=ALL)
    make_adapter("fine", r=4, target_modules=ALL)
    from lorax_serve.errors import EngineFailed

    server = await start_server(tmp_path, max_batch_size=4)
    options = {"max_new_tokens": 60, "ignore_eos": True}
    async with client_of(server) as client:
        alone = await client.generate(PROMPT, adapter="fine", **options)  # type: ignore[arg-type]
        answers = await asyncio.gather(
            *(
                client.generate(PROMPT, adapter=name, **options)  # type: ignore[arg-type]
                for name in ("fine", "huge", "huge", "fine", "huge", "fine")
            ),
            return_exceptions=True,
        )
    failed = [answer for answer in answers if isinstance(answer, EngineFailed)]
    assert len(failed) == 3
    assert "not finite" in str(failed[0])
    fine = [answer.text for answer in answers if isinstance(answer, Generation)]
    assert fine == [alone.text] * 3


async def test_requests_end_when_the_engine_dies(start_server: StartServer) -> None:
    from lorax_serve.client import Unavailable

    server = await start_server()
    async with client_of(server) as client:
        stream = client.stream(PROMPT, max_new_tokens=ENDLESS, ignore_eos=True)
        await anext(stream)
        server._engine._process.kill()
        with pytest.raises(Unavailable):
            await text_of(stream)
        await asyncio.wait_for(server.failed.wait(), 5)


async def test_loading_and_unloading_leave_running_streams_alone(
    start_server: StartServer, make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    """How long a load delays a token is measured by benchmarks/load_disturbance.py."""
    make_adapter("a", 1, r=4, target_modules=ALL)
    make_adapter("b", 2, r=8, target_modules=ALL)
    server = await start_server(tmp_path)
    options = {"max_new_tokens": LONG, "ignore_eos": True}
    async with client_of(server) as client:
        alone = await client.generate(PROMPT, adapter="a", **options)  # type: ignore[arg-type]
        streams = [client.stream(PROMPT, adapter="a", **options) for _ in range(4)]  # type: ignore[arg-type]
        firsts = [await anext(stream) for stream in streams]
        await client.unload_adapter("b")
        await client.load_adapter("b")
        assert server.stats.running == 4  # neither waited for them
        texts = [f.text + await text_of(s) for f, s in zip(firsts, streams, strict=True)]
    assert texts == [alone.text] * 4
