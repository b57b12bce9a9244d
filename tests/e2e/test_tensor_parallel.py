"""A server whose engine is two processes."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from lorax_serve.client import AsyncClient
from lorax_serve.errors import LoraxError
from lorax_serve.server.app import Server
from tests.e2e.conftest import StartServer

PROMPT = "w10 w11 w12 w13"


def client_of(server: Server) -> AsyncClient:
    return AsyncClient(f"127.0.0.1:{server.port}")


def engine_of(server: Server) -> int:
    pid = server._engine._process.pid
    assert pid is not None
    return pid


def worker_of(server: Server) -> int:
    """The engine's one child."""
    tasks = Path(f"/proc/{engine_of(server)}/task").glob("*/children")
    (worker,) = [int(pid) for children in tasks for pid in children.read_text().split()]
    return worker


async def to_the_end(stream: AsyncIterator[object]) -> None:
    async for _ in stream:
        pass


def gone(pid: int) -> bool:
    """Whether a process ends within some seconds."""
    until = time.monotonic() + 20
    while time.monotonic() < until:
        if not Path(f"/proc/{pid}").exists():
            return True
        time.sleep(0.05)
    return False


async def test_two_processes_serve_and_end_together(
    start_server: StartServer, make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    make_adapter("a", 1, r=4, target_modules="all-linear")
    texts = []
    for ranks in (1, 2):
        server = await start_server(tmp_path, kernels="paged", tensor_parallel=ranks, threads=1)
        async with client_of(server) as client:
            answers = [
                await client.generate(PROMPT, adapter=name, max_new_tokens=8)
                for name in (None, "a")
            ]
            texts.append([answer.text for answer in answers])
    assert texts[0] == texts[1]
    worker = worker_of(server)
    assert server.info.device == "2 x cpu"
    async with client_of(server) as client:
        stream = client.stream(PROMPT, max_new_tokens=8000, ignore_eos=True)
        await anext(stream)
        os.kill(worker, signal.SIGKILL)
        with pytest.raises(LoraxError, match="rank 1 of 2: its process was ended by signal 9"):
            await asyncio.wait_for(to_the_end(stream), 20)
        # As if the engine had died itself.
        await asyncio.wait_for(server.failed.wait(), 20)


async def test_an_idle_engine_ends_with_its_worker_and_the_worker_with_it(
    start_server: StartServer,
) -> None:
    first = await start_server(kernels="paged", tensor_parallel=2, threads=1)
    os.kill(worker_of(first), signal.SIGKILL)
    await asyncio.wait_for(first.failed.wait(), 20)
    second = await start_server(kernels="paged", tensor_parallel=2, threads=1)
    worker = worker_of(second)
    os.kill(engine_of(second), signal.SIGKILL)
    assert await asyncio.to_thread(gone, worker)
