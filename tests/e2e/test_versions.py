"""Versions of an adapter under running requests, across restarts and crashes, over real gRPC."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from lorax_serve.client import AsyncClient
from lorax_serve.errors import AdapterConflict, LoraxError
from lorax_serve.store.digest import digest_of
from tests.e2e.conftest import StartServer
from tests.e2e.process import start_process
from tests.e2e.test_serving import client_of

ALL = "all-linear"
PROMPT = "w10 w11 w12 w13"
TOKENS = 12
STREAMS = 16


@pytest.mark.parametrize(
    "swaps", [40, pytest.param(1000, marks=[pytest.mark.slow, pytest.mark.timeout(900)])]
)
async def test_hot_swaps_never_mix_versions(
    start_server: StartServer, make_adapter: Callable[..., Path], tmp_path: Path, swaps: int
) -> None:
    """Each stream's text is that of exactly the version that its answer names."""
    versions = [make_adapter(f"v{n}", n, r=2 + n, target_modules=ALL) for n in range(4)]
    server = await start_server(tmp_path, state=tmp_path / "state", adapter_slots=3)
    async with client_of(server) as client:
        texts = {}
        for version in versions:
            alone = await client.generate(PROMPT, adapter=version.name, max_new_tokens=TOKENS)
            texts[digest_of(version)] = alone.text
        assert len(set(texts.values())) == len(versions)
        await client.load_adapter("live", "v0")
        done = asyncio.Event()
        seen: list[tuple[str | None, str]] = []

        async def ask() -> None:
            while not done.is_set():
                answer = await client.generate(PROMPT, adapter="live", max_new_tokens=TOKENS)
                seen.append((answer.adapter_digest, answer.text))

        streams = [asyncio.create_task(ask()) for _ in range(STREAMS)]
        for version in itertools.islice(itertools.cycle(versions[1:] + versions[:1]), swaps):
            await client.load_adapter("live", version.name)
        done.set()
        await asyncio.gather(*streams)
    wrong = [(digest, text) for digest, text in seen if texts[str(digest)] != text]
    assert wrong == []
    assert len({digest for digest, _ in seen}) > 1
    assert len(seen) >= STREAMS
    assert await server._engine.check_integrity() == ()


async def test_a_request_may_ask_for_one_version_and_rolling_back_is_one_call(
    start_server: StartServer, make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    one, two = (make_adapter(f"v{n}", n, r=4, target_modules=ALL) for n in range(2))
    state = tmp_path / "state"
    server = await start_server(tmp_path, state=state)
    async with client_of(server) as client:
        await client.load_adapter("live", "v0")
        first = await client.generate(PROMPT, adapter="live", max_new_tokens=TOKENS)
        await client.load_adapter("live", "v1")
        second = await client.generate(PROMPT, adapter="live", max_new_tokens=TOKENS)
        old = f"live@{digest_of(one)[:12]}"
        again = await client.generate(PROMPT, adapter=old, max_new_tokens=TOKENS)
        assert (again.text, again.adapter_digest) == (first.text, digest_of(one))
        assert again.adapter_version == first.adapter_version
        assert second.text != first.text
        back = await client.roll_back_adapter("live")
        assert back.digest == digest_of(one)
        now = await client.generate(PROMPT, adapter="live", max_new_tokens=TOKENS)
        assert (now.text, now.adapter_version) == (first.text, back.version)
        states = {each.digest: each.state for each in await client.list_adapters()}
        assert states[digest_of(two)] in ("ready", "superseded")
    await server.stop()
    server = await start_server(tmp_path, state=state)
    async with client_of(server) as client:
        after = await client.generate(PROMPT, adapter="live", max_new_tokens=TOKENS)
        assert (after.text, after.adapter_version) == (first.text, back.version)


@pytest.mark.parametrize(
    "kills", [3, pytest.param(100, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])]
)
async def test_what_was_acknowledged_survives_kill_9(
    tiny_model: Path, make_adapter: Callable[..., Path], tmp_path: Path, kills: int
) -> None:
    """A server is killed at random points of loads, uploads, rollbacks and unloads."""
    adapters = tmp_path / "source"
    adapters.mkdir()
    digests = {}
    for n in range(3):
        directory = make_adapter(f"v{n}", n, r=2 + n, target_modules=ALL)
        directory.rename(adapters / directory.name)
        digests[f"v{n}"] = digest_of(adapters / directory.name)
    state = tmp_path / "state"
    choose = random.Random(4)
    expected: dict[str, set[str | None]] = {}
    for _ in range(kills):
        process, client = await start_process(tiny_model, adapters, state)
        try:
            async with client:
                await _check(client, expected, state)
                work = asyncio.create_task(_work(client, choose, adapters, digests, expected))
                await asyncio.sleep(choose.uniform(0.02, 0.4))
                os.killpg(process.pid, signal.SIGKILL)
                with contextlib.suppress(LoraxError):
                    await work
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    process, client = await start_process(tiny_model, adapters, state)
    async with client:
        await _check(client, expected, state)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


async def _work(
    client: AsyncClient,
    choose: random.Random,
    adapters: Path,
    digests: dict[str, str],
    expected: dict[str, set[str | None]],
) -> None:
    """Load, upload, roll back and unload at random; ``expected`` has what each name may mean, more
    than one thing while a call is not answered."""
    while True:
        name = choose.choice(["poet", "pilot"])
        now = expected.get(name, {None})
        if now != {None} and choose.random() < 0.3:
            expected[name] = now | {None}
            await client.unload_adapter(name)
            expected[name] = {None}
        elif now != {None} and choose.random() < 0.2:
            expected[name] = now | {*digests.values()}
            try:
                expected[name] = {(await client.roll_back_adapter(name)).digest}
            except AdapterConflict:  # it has no earlier version
                expected[name] = now
        else:
            path = choose.choice(sorted(digests))
            expected[name] = now | {digests[path]}
            if choose.random() < 0.5:
                await client.load_adapter(name, path)
            else:
                await client.upload_adapter(name, adapters / path)
            expected[name] = {digests[path]}


async def _check(client: AsyncClient, expected: dict[str, set[str | None]], state: Path) -> None:
    served = {
        each.name: each.digest for each in await client.list_adapters() if each.state == "ready"
    }
    for name, possible in expected.items():
        assert served.get(name) in possible, name
        expected[name] = {served.get(name)}
    entries = list((state / "adapters").iterdir())
    assert all(digest_of(entry) == entry.name for entry in entries)
    assert set(served.values()) <= {entry.name for entry in entries}
