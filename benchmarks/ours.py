"""lorax as a system under measurement: its engine alone, and its server over gRPC."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import grpc
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc

from benchmarks.measure import Trace
from benchmarks.peers.worker import TEMPERATURE, TOP_P
from benchmarks.workloads import Request
from lorax_serve.cli.flags import OFF, ON
from lorax_serve.client import AsyncClient
from lorax_serve.config import EngineConfig
from lorax_serve.core import EngineStats, SamplingParams, StopReason, TokenOutput
from lorax_serve.engine.messages import Submit
from lorax_serve.frontend.async_engine import AsyncEngine

__all__ = ["GrpcServer", "OfflineEngine"]

_START_SECONDS = 600.0
_STOP_SECONDS = 40.0


class OfflineEngine:
    """The engine in its own process, given token ids: no gRPC, no text."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._versions: dict[str, int] = {}
        self._ids = itertools.count(1)
        # Nothing but a benchmark needs to know the engine's process: it does not tell it.
        self._process = psutil.Process(engine._process.pid)

    @classmethod
    async def start(
        cls, config: EngineConfig | None = None, adapters: Mapping[str, Path] | None = None
    ) -> Self:
        """Start one and load the adapters."""
        system = cls(await AsyncEngine.start(config or EngineConfig()))
        try:
            await system.load(adapters or {})
        except BaseException:
            await system.close()
            raise
        return system

    async def load(self, adapters: Mapping[str, Path]) -> None:
        """Make adapters known by name."""
        for name, path in adapters.items():
            version = len(self._versions) + 1
            await self._engine.load_adapter(version, str(path))
            self._versions[name] = version

    async def generate(self, request: Request) -> Trace:
        """See ``System``."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        trace = Trace(request, time.perf_counter())

        def receive(output: TokenOutput) -> None:
            if output.token_id is None:
                done.set_exception(RuntimeError(output.error))
                return
            trace.tokens.append(time.perf_counter())
            trace.token_ids.append(output.token_id)
            if output.stop_reason is not StopReason.NOT_FINISHED:
                done.set_result(None)

        command = Submit(
            request_id=next(self._ids),
            tokens=request.prompt,
            adapter=None if request.adapter is None else self._versions[request.adapter],
            sampling=SamplingParams(
                temperature=_temperature(request), top_p=TOP_P, seed=request.seed
            ),
            max_new_tokens=request.new_tokens,
            min_new_tokens=0,
            eos_token_ids=frozenset(),
        )
        self._engine.submit(command, receive)
        await done
        return trace

    @property
    def stats(self) -> EngineStats:
        """The engine's gauges after its last step."""
        return self._engine.stats

    @property
    def vocab_size(self) -> int:
        """Of the base model."""
        return self._engine.info.vocab_size

    @property
    def memory_bytes(self) -> int:
        """Resident memory of the engine's process."""
        nbytes: int = self._process.memory_info().rss
        return nbytes

    def pause(self) -> None:
        """See ``System``."""
        self._process.suspend()

    def resume(self) -> None:
        """See ``System``."""
        self._process.resume()

    async def close(self) -> None:
        """Stop the process."""
        if self._process.is_running():
            self.resume()
        await self._engine.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()


class GrpcServer:
    """``lorax-serve`` as a command, and a client in this process.

    Attributes:
        start_seconds: from the start of the process until its health is SERVING.
    """

    def __init__(self, process: asyncio.subprocess.Process, port: int) -> None:
        self._process = process
        self._address = f"127.0.0.1:{port}"
        self._client = AsyncClient(self._address)
        self.start_seconds = 0.0

    @classmethod
    async def start(
        cls,
        config: EngineConfig | None = None,
        adapters: Path | None = None,
        state: Path | None = None,
        *,
        on_demand: bool = False,
    ) -> Self:
        """Start one with the adapters in a directory, and wait until it serves.

        Raises:
            RuntimeError: it ended instead, or took too long; its own words are on stderr.
        """
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        flags = {"--host": "127.0.0.1", "--port": str(port), "--metrics-port": OFF}
        if adapters is not None:
            flags["--adapters"] = str(adapters)
        if state is not None:
            flags |= {"--state": str(state), "--load-on-demand": ON if on_demand else OFF}
        command = [sys.executable, "-m", "lorax_serve.cli.serve", *itertools.chain(*flags.items())]
        started = time.perf_counter()
        process = await asyncio.create_subprocess_exec(
            *command,
            *_engine_flags(config or EngineConfig()),
            stdout=asyncio.subprocess.DEVNULL,
            # A group of its own, so that it can be paused with its engine.
            process_group=0,
        )
        server = cls(process, port)
        try:
            await asyncio.wait_for(server._serving(), _START_SECONDS)
        except BaseException:
            await server.close()
            raise
        server.start_seconds = time.perf_counter() - started
        return server

    async def _serving(self) -> None:
        async with grpc.aio.insecure_channel(self._address) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            while self._process.returncode is None:
                try:
                    answer = await health.Check(
                        health_pb2.HealthCheckRequest(), wait_for_ready=False, timeout=5
                    )
                    if answer.status == health_pb2.HealthCheckResponse.SERVING:
                        return
                except grpc.aio.AioRpcError:
                    # It does not listen yet; the channel alone would wait a second and more.
                    await _until_listening(self._address)
                await asyncio.sleep(0.01)
        raise RuntimeError(f"lorax-serve ended with exit code {self._process.returncode}")

    async def generate(self, request: Request) -> Trace:
        """See ``System``."""
        trace = Trace(request, time.perf_counter())
        stream = self._client.stream(
            request.prompt,
            adapter=request.adapter,
            max_new_tokens=request.new_tokens,
            temperature=_temperature(request),
            top_p=TOP_P,
            seed=request.seed,
            ignore_eos=True,
        )
        async for chunk in stream:
            new = chunk.generated_token_count - len(trace.tokens)
            trace.tokens += [time.perf_counter()] * new
        return trace

    @property
    def client(self) -> AsyncClient:
        """Connected to it."""
        return self._client

    @property
    def memory_bytes(self) -> tuple[int, int]:
        """Resident memory of the server's process and of its engine's."""
        server, engine = self._processes()
        return server.memory_info().rss, engine.memory_info().rss

    @property
    def cpu_seconds(self) -> float:
        """Processor time that both processes have taken."""
        used = [process.cpu_times() for process in self._processes()]
        return float(sum(each.user + each.system for each in used))

    def _processes(self) -> tuple[psutil.Process, psutil.Process]:
        server = psutil.Process(self._process.pid)
        # The other child, multiprocessing's own, is small.
        return server, max(server.children(), key=lambda child: child.memory_info().rss)

    def pause(self) -> None:
        """See ``System``."""
        os.killpg(self._process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """See ``System``."""
        os.killpg(self._process.pid, signal.SIGCONT)

    async def close(self) -> None:
        """Stop the server."""
        await self._client.close()
        if self._process.returncode is not None:
            return
        self.resume()
        self._process.terminate()
        try:
            await asyncio.wait_for(self._process.wait(), _STOP_SECONDS)
        except TimeoutError:
            os.killpg(self._process.pid, signal.SIGKILL)
            await self._process.wait()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()


def _temperature(request: Request) -> float:
    return 0.0 if request.greedy else TEMPERATURE


def _engine_flags(config: EngineConfig) -> list[str]:
    """The command line's flags for what differs from the defaults."""
    default = EngineConfig()
    flags = []
    for setting in dataclasses.fields(config):
        value = getattr(config, setting.name)
        if value != getattr(default, setting.name):
            if value is None or isinstance(value, bool):
                value = ON if value else OFF
            flags += [f"--{setting.name.replace('_', '-')}", str(value)]
    return flags


async def _until_listening(address: str) -> None:
    host, _, port = address.rpartition(":")
    for _ in range(100):
        try:
            _, writer = await asyncio.open_connection(host, int(port))
        except OSError:
            await asyncio.sleep(0.01)
        else:
            writer.close()
            return
