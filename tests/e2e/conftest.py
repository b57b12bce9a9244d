"""A real server with a real engine process, on free ports."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from lorax_serve.config import EngineConfig, ServerConfig
from lorax_serve.server.app import Server
from tests.helpers import TINY_LLAMA, save_tiny_model

StartServer = Callable[..., Awaitable[Server]]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a long context: a step takes it 0.1 ms, and some tests need a request
    that is still running while something else happens."""
    config: Any = LlamaConfig
    directory: Path = tmp_path_factory.mktemp("long-llama")
    long = {"max_position_embeddings": 8192}
    save_tiny_model(directory, config(**{**TINY_LLAMA.to_diff_dict(), **long}))
    return directory


@pytest.fixture
async def start_server(tiny_model: Path) -> AsyncIterator[StartServer]:
    """Start servers of the tiny model (or ``model``) in float32; all stop after the test. Other
    keywords are the engine's settings, ``server`` has the server's."""
    async with AsyncExitStack() as stack:

        async def start(
            adapters: Path | None = None,
            model: Path | str = tiny_model,
            state: Path | None = None,
            clock: Callable[[], float] = time.monotonic,
            server: dict[str, Any] | None = None,
            **engine: Any,
        ) -> Server:
            settings = {
                "model": str(model),
                "dtype": "float32",
                "threads": 2,
                "max_sequence_length": None if model != tiny_model else 8192,
                **engine,
            }
            config = ServerConfig(
                engine=EngineConfig(**settings),
                host="127.0.0.1",
                port=0,
                metrics_port=0,
                adapters=adapters,
                state=state,
                drain_seconds=20,
                **(server or {}),
            )
            return await stack.enter_async_context(Server(config, clock=clock))

        yield start
