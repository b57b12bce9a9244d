"""Start, health, reflection, drain, and the death of the engine."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from lorax_serve.config import EngineConfig
from lorax_serve.errors import AdapterRejected, InvalidRequest, ModelUnsupported, SourceFailed
from lorax_serve.pb.lorax.v1 import generation_pb2 as pb
from lorax_serve.pb.lorax.v1.generation_pb2_grpc import GenerationServiceStub
from lorax_serve.server import run as run_module
from lorax_serve.server.app import SERVICES, Server
from lorax_serve.store.digest import CONFIG_FILE, WEIGHTS_FILE
from tests.server.fake_engine import FakeEngine
from tests.server.harness import Harness, config, serving, stream_request, text_request, until

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def health_of(channel: grpc.aio.Channel) -> set[int]:
    stub = health_pb2_grpc.HealthStub(channel)
    requests = [health_pb2.HealthCheckRequest(service=name) for name in ("", *SERVICES)]
    return {(await stub.Check(request)).status for request in requests}


async def test_health_and_its_services(harness: Harness) -> None:
    assert SERVICES == ("lorax.v1.GenerationService", "lorax.v1.AdapterService")
    assert await health_of(harness.channel) == {SERVING}
    stub = health_pb2_grpc.HealthStub(harness.channel)
    call = stub.Check(health_pb2.HealthCheckRequest(service="nothing"))
    assert await call.code() is grpc.StatusCode.NOT_FOUND


async def test_reflection_lists_the_services(harness: Harness) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(harness.channel)
    call = stub.ServerReflectionInfo()
    await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
    await call.done_writing()
    answer = await call.read()
    names = {service.name for service in answer.list_services_response.service}
    assert names >= {*SERVICES, "grpc.health.v1.Health"}
    await call.code()


async def test_not_serving_until_the_model_and_the_adapters_are_loaded(
    tokenizer_dir: Path, tmp_path: Path
) -> None:
    model_loaded = asyncio.Event()
    engines: list[FakeEngine] = []

    async def start_engine(engine_config: EngineConfig) -> FakeEngine:
        await model_loaded.wait()
        engines.append(FakeEngine(tokenizer_dir))
        engines[0].loads_open.clear()
        return engines[0]

    (tmp_path / "poet").mkdir()
    (tmp_path / "poet" / "adapter_config.json").write_text("verses")
    server = Server(config(tmp_path), start_engine)
    starting = asyncio.create_task(server.start())
    await until(lambda: server.port > 0)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        call = GenerationServiceStub(channel).Generate(text_request())
        assert await call.code() is grpc.StatusCode.UNAVAILABLE
        assert await call.details() == "the server is starting; try again later"
        assert await health_of(channel) == {NOT_SERVING}
        model_loaded.set()
        await until(lambda: bool(engines and engines[0].loads))
        assert await health_of(channel) == {NOT_SERVING}
        engines[0].loads_open.set()
        await starting
        assert await health_of(channel) == {SERVING}
        assert [adapter.name for adapter in server.adapters] == ["poet"]
        watching = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert (await watching.read()).status == SERVING
        stopping = asyncio.create_task(server.stop())
        assert (await watching.read()).status == NOT_SERVING
        watching.cancel()
        await stopping
    assert engines[0].closed


async def test_a_refused_adapter_holds_up_nothing(tokenizer_dir: Path, tmp_path: Path) -> None:
    for name, content in (("a-bad", "bad"), ("poet", "verses"), ("_x", "verses")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(content)
    (tmp_path / "notes").mkdir()
    (tmp_path / "README.md").write_text("not an adapter")
    async with serving(tokenizer_dir, tmp_path) as harness:
        assert [adapter.name for adapter in harness.server.adapters] == ["poet"]
        refused = harness.server.refused
        assert {name: type(error) for name, error in refused.items()} == {
            "a-bad": AdapterRejected,
            "_x": InvalidRequest,
        }
        registry = harness.server.metrics.registry
        for reason in ("shape_mismatch", "invalid_request"):
            labels = {"reason": reason}
            assert registry.get_sample_value("lorax_adapter_rejects_total", labels) == 1
        # Whoever asks later is told, too, until it is mended.
        failed = harness.client.list_failed_adapters
        assert [each.name for each in await failed()] == ["_x", "a-bad"]
        assert registry.get_sample_value("lorax_adapters_failed") == 2
        (tmp_path / "a-bad/adapter_config.json").write_text("verses")
        await harness.client.load_adapter("a-bad")
        assert [each.name for each in await failed()] == ["_x"]
        assert registry.get_sample_value("lorax_adapters_failed") == 1


async def test_a_server_that_cannot_start_leaves_nothing(
    tokenizer_dir: Path, tmp_path: Path
) -> None:
    async def no_engine(engine_config: EngineConfig) -> FakeEngine:
        raise ModelUnsupported("no such model")

    server = Server(config(tmp_path, metrics_port=0), no_engine)
    with pytest.raises(ModelUnsupported, match="no such model"):
        await server.start()
    assert server.metrics_port is not None
    for port in (server.port, server.metrics_port):
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", port)) != 0

    engines: list[FakeEngine] = []

    async def engine_without_tokenizer(engine_config: EngineConfig) -> FakeEngine:
        engines.append(FakeEngine(tmp_path))
        return engines[0]

    with pytest.raises(ModelUnsupported, match="no usable tokenizer"):
        await Server(config(tmp_path), engine_without_tokenizer).start()
    assert engines[0].closed


async def test_settings_that_cannot_work_are_named(tokenizer_dir: Path, tmp_path: Path) -> None:
    async def start_engine(engine_config: EngineConfig) -> FakeEngine:
        raise AssertionError("too late")

    with pytest.raises(InvalidRequest, match="adapters: no such directory"):
        await Server(config(tmp_path / "missing"), start_engine).start()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InvalidRequest, match=r"^port: cannot listen on"):
            await Server(config(tmp_path, port=port), start_engine).start()
        with pytest.raises(InvalidRequest, match=r"^metrics_port: cannot listen on"):
            await Server(config(tmp_path, metrics_port=port), start_engine).start()


async def test_what_was_loaded_is_served_though_its_directory_is_gone(
    tokenizer_dir: Path, tmp_path: Path
) -> None:
    adapters, state = tmp_path / "adapters", tmp_path / "state"
    with pytest.raises(InvalidRequest, match="adapters: no such directory"):
        async with serving(tokenizer_dir, adapters, state=state):
            pass
    (adapters / "poet").mkdir(parents=True)
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        (adapters / "poet" / file).write_bytes(b"good")
    async with serving(tokenizer_dir, adapters, state=state) as harness:
        (loaded,) = await harness.client.list_adapters()
    adapters.rename(tmp_path / "elsewhere")
    async with serving(tokenizer_dir, adapters, state=state) as harness:
        (served,) = await harness.client.list_adapters()
        assert (served.name, served.digest) == ("poet", loaded.digest)
        assert isinstance(harness.server.refused[adapters.as_uri()], SourceFailed)


async def test_draining_finishes_what_runs_and_takes_nothing_new(harness: Harness) -> None:
    harness.engine.paused = True
    running = harness.generation.GenerateStream(stream_request(max_new_tokens=20))
    await until(lambda: harness.engine.in_flight == 1)
    stopping = asyncio.create_task(harness.server.stop())
    while await health_of(harness.channel) == {SERVING}:  # noqa: ASYNC110 - no event crosses over
        await asyncio.sleep(0.001)
    late = harness.generation.Generate(text_request())
    assert await late.code() is grpc.StatusCode.UNAVAILABLE
    assert not stopping.done()
    harness.engine.paused = False
    messages = [message async for message in running]
    assert messages[-1].stop_reason == pb.STOP_REASON_MAX_TOKENS
    assert messages[-1].generated_token_count == 20
    await stopping


async def test_a_server_that_stops_refuses_calls_until_proxies_have_noticed(
    tokenizer_dir: Path, tmp_path: Path
) -> None:
    async with serving(tokenizer_dir, tmp_path, linger_seconds=0.3) as harness:
        began = asyncio.get_running_loop().time()
        stopping = asyncio.create_task(harness.server.stop())
        await asyncio.sleep(0.2)
        assert await health_of(harness.channel) == {NOT_SERVING}
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await harness.generation.Generate(text_request(max_new_tokens=1))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "lorax-replica" in dict(caught.value.trailing_metadata() or ())
        await stopping
        assert asyncio.get_running_loop().time() - began >= 0.3


async def test_draining_ends_in_time(tokenizer_dir: Path, tmp_path: Path) -> None:
    async with serving(tokenizer_dir, tmp_path, drain_seconds=0.1) as harness:
        harness.engine.paused = True
        running = harness.generation.GenerateStream(stream_request())
        await until(lambda: harness.engine.in_flight == 1)
        async with asyncio.timeout(5):
            await harness.server.stop()
        assert await running.code() is not grpc.StatusCode.OK
        assert harness.engine.in_flight == 0


async def test_a_dead_engine_ends_the_server(harness: Harness) -> None:
    harness.engine.die()
    await asyncio.wait_for(harness.server.failed.wait(), 5)
    await asyncio.sleep(0)
    assert await health_of(harness.channel) == {NOT_SERVING}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_drains_and_exits_with_0(
    tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    _use_fake_engine(monkeypatch, tokenizer_dir)
    finished: list[Any] = []

    async def use(server: Server) -> None:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            call = GenerationServiceStub(channel).GenerateStream(stream_request(max_new_tokens=30))
            async for message in call:
                if not finished:
                    os.kill(os.getpid(), number)
                finished.append(message)

    tasks: list[asyncio.Task[None]] = []
    code = await run_module.run(
        config(tmp_path), lambda server: tasks.append(asyncio.create_task(use(server)))
    )
    await tasks[0]
    assert code == 0
    assert finished[-1].generated_token_count == 30


async def test_a_signal_while_starting_exits_with_0(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def start_engine(engine_config: EngineConfig) -> FakeEngine:
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(60)
        raise AssertionError("too late")

    monkeypatch.setattr(run_module, "Server", lambda settings: Server(settings, start_engine))
    async with asyncio.timeout(5):
        code = await run_module.run(config(tmp_path), lambda server: pytest.fail("not ready"))
    assert code == 0


async def test_a_dead_engine_exits_with_1(
    tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines = _use_fake_engine(monkeypatch, tokenizer_dir)
    async with asyncio.timeout(5):
        assert await run_module.run(config(tmp_path), lambda server: engines[0].die()) == 1


def _use_fake_engine(monkeypatch: pytest.MonkeyPatch, tokenizer: Path) -> list[FakeEngine]:
    engines: list[FakeEngine] = []

    async def start_engine(engine_config: EngineConfig) -> FakeEngine:
        engines.append(FakeEngine(tokenizer))
        return engines[-1]

    monkeypatch.setattr(run_module, "Server", lambda settings: Server(settings, start_engine))
    return engines
