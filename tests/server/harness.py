"""A real server over a fake engine, and ways to talk to it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from lorax_serve.client import AsyncClient
from lorax_serve.config import EngineConfig, ServerConfig
from lorax_serve.pb.lorax.v1 import generation_pb2 as pb
from lorax_serve.pb.lorax.v1.adapter_pb2_grpc import AdapterServiceStub
from lorax_serve.pb.lorax.v1.generation_pb2_grpc import GenerationServiceStub
from lorax_serve.server.app import Server
from tests.server.fake_engine import FakeEngine


@dataclass
class Harness:
    """One running server."""

    server: Server
    engine: FakeEngine
    channel: grpc.aio.Channel
    client: AsyncClient
    adapters: Path

    @property
    def generation(self) -> Any:
        return GenerationServiceStub(self.channel)

    @property
    def administration(self) -> Any:
        return AdapterServiceStub(self.channel)

    def write_adapter(self, name: str, content: str = "good") -> None:
        (self.adapters / name).mkdir(exist_ok=True)
        (self.adapters / name / "adapter_config.json").write_text(content)


def config(adapters: Path | None, **settings: Any) -> ServerConfig:
    """A free port on the loopback, and no metrics over HTTP."""
    return ServerConfig(
        **{"host": "127.0.0.1", "port": 0, "metrics_port": None, "adapters": adapters, **settings}
    )


@contextlib.asynccontextmanager
async def serving(
    tokenizer: Path, adapters: Path | None, limit: int = 8, **settings: Any
) -> AsyncIterator[Harness]:
    engines: list[FakeEngine] = []

    async def start_engine(engine_config: EngineConfig) -> FakeEngine:
        engines.append(FakeEngine(tokenizer, limit=limit))
        return engines[0]

    server = Server(config(adapters, **settings), start_engine)
    async with server:
        address = f"127.0.0.1:{server.port}"
        async with grpc.aio.insecure_channel(address) as channel, AsyncClient(address) as client:
            yield Harness(server, engines[0], channel, client, adapters or Path())
        # Nothing that a test did may leave a request behind.
        await until(lambda: engines[0].in_flight == 0)
    assert engines[0].closed


async def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    """Wait for ``condition``, which must become true in time."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.001)


def text_request(text: str = "one two three", **stopping: Any) -> Any:
    """A ``GenerateRequest`` for ``text``."""
    criteria = pb.StoppingCriteria(**stopping)
    return pb.GenerateRequest(text=text, parameters=pb.Parameters(stopping=criteria))


def stream_request(text: str = "one two three", **stopping: Any) -> Any:
    """The same as a ``GenerateStreamRequest``."""
    message = text_request(text, **stopping)
    return pb.GenerateStreamRequest(text=message.text, parameters=message.parameters)
