"""Errors as gRPC statuses."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import grpc
import pytest

from lorax_serve import errors
from lorax_serve.errors import (
    AdapterRejected,
    InvalidRequest,
    LoraxError,
    RejectReason,
    SourceFailed,
    SourceReason,
)
from lorax_serve.pb.lorax.v1 import adapter_pb2
from lorax_serve.pb.lorax.v1 import generation_pb2 as pb
from lorax_serve.server.status import REJECT_REASON, SOURCE_REASON, status_of
from tests.server.harness import Harness, serving, stream_request, text_request, until

EXPECTED = {
    "InvalidRequest": "INVALID_ARGUMENT",
    "AdapterRejected": "INVALID_ARGUMENT",
    "AdapterNotFound": "NOT_FOUND",
    "AdapterConflict": "FAILED_PRECONDITION",
    "SourceFailed": "NOT_FOUND",  # for the reason that it is made with below
    "ModelUnsupported": "FAILED_PRECONDITION",
    "Overloaded": "RESOURCE_EXHAUSTED",
    "Draining": "UNAVAILABLE",
    "EngineFailed": "INTERNAL",
    "StoreFailed": "INTERNAL",
    "TrainingError": "INTERNAL",  # the server raises none
}

REASONS: dict[type[LoraxError], tuple[Any, ...]] = {
    AdapterRejected: (RejectReason.BAD_FILE,),
    SourceFailed: (SourceReason.NOT_FOUND,),
}


async def failure(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


def test_every_error_has_its_code() -> None:
    kinds = {kind.__name__: kind for kind in LoraxError.__subclasses__()}
    kinds = {name: kind for name, kind in kinds.items() if name in errors.__all__}
    assert kinds.keys() == EXPECTED.keys()
    for name, kind in kinds.items():
        error = kind(*REASONS[kind], "why") if kind in REASONS else kind("why")
        code, message, trailing = status_of(error)
        assert (code.name, message) == (EXPECTED[name], "why")
        assert bool(trailing) == (kind in REASONS)


SOURCE_CODES = {
    SourceReason.NOT_FOUND: "NOT_FOUND",
    SourceReason.UNAVAILABLE: "UNAVAILABLE",
    SourceReason.TIMEOUT: "UNAVAILABLE",
    SourceReason.TRUNCATED: "UNAVAILABLE",
    SourceReason.TOO_LARGE: "RESOURCE_EXHAUSTED",
    SourceReason.DENIED: "PERMISSION_DENIED",
    SourceReason.CHANGED: "UNAVAILABLE",
}


@pytest.mark.parametrize("reason", SourceReason)
def test_a_failed_source_has_the_code_of_its_reason(reason: SourceReason) -> None:
    code, message, trailing = status_of(SourceFailed(reason, "s3://b: no"))
    assert (code.name, message) == (SOURCE_CODES[reason], "s3://b: no")
    assert trailing == ((SOURCE_REASON, reason.value),)


def test_what_may_be_retried_is_unavailable_to_grpc_too() -> None:
    for reason in SourceReason:
        error = SourceFailed(reason, "no")
        assert error.retryable == (status_of(error)[0] is grpc.StatusCode.UNAVAILABLE)


def test_a_failed_source_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(SourceFailed(SourceReason.CHANGED, "again")))
    assert (type(error), error.reason, str(error)) == (SourceFailed, SourceReason.CHANGED, "again")


def test_messages_fit_into_headers() -> None:
    _, message, _ = status_of(InvalidRequest("x" * 100_000))
    assert len(message) < 1100
    assert status_of(InvalidRequest("a\udc80b"))[1] == "a?b"


async def test_unknown_adapter(harness: Harness) -> None:
    request = text_request()
    request.adapter_id = "nobody"
    error = await failure(harness.generation.Generate(request))
    assert error.code() is grpc.StatusCode.NOT_FOUND
    assert error.details() == "adapter_id 'nobody' is not loaded; no adapter is loaded"


async def test_rejected_adapter_carries_its_reason(harness: Harness) -> None:
    harness.write_adapter("poet", "bad")
    request = adapter_pb2.LoadAdapterRequest(adapter_id="poet")
    error = await failure(harness.administration.LoadAdapter(request))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert dict(error.trailing_metadata())[REJECT_REASON] == "shape_mismatch"
    assert error.details() == "lora_A of layer 3 has rank 5"


async def test_overload(tokenizer_dir: Path, tmp_path: Path) -> None:
    async with serving(tokenizer_dir, tmp_path, limit=2) as harness:
        harness.engine.paused = True
        running = [harness.generation.GenerateStream(stream_request()) for _ in range(2)]
        await until(lambda: harness.engine.in_flight == 2)
        error = await failure(harness.generation.Generate(text_request()))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        running[0].cancel()
        await until(lambda: harness.engine.in_flight == 1)
        harness.engine.paused = False
        await harness.generation.Generate(text_request(max_new_tokens=1))
        running[1].cancel()


@pytest.mark.parametrize("streaming", [True, False])
async def test_a_failed_step_is_internal(harness: Harness, streaming: bool) -> None:
    harness.engine.paused = True
    call = (
        harness.generation.GenerateStream(stream_request())
        if streaming
        else harness.generation.Generate(text_request())
    )
    await until(lambda: harness.engine.in_flight == 1)
    harness.engine.fail("out of memory")
    assert await call.code() is grpc.StatusCode.INTERNAL
    assert await call.details() == "out of memory"
    harness.engine.paused = False
    assert (await harness.generation.Generate(text_request(max_new_tokens=1))).text


async def test_a_dead_engine_is_unavailable(harness: Harness) -> None:
    harness.engine.paused = True
    running = harness.generation.GenerateStream(stream_request())
    await until(lambda: harness.engine.in_flight == 1)
    harness.engine.die()
    assert await running.code() is grpc.StatusCode.UNAVAILABLE
    error = await failure(harness.generation.ModelInfo(pb.ModelInfoRequest()))
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert error.details() == "the engine has died; the server must be restarted"


async def test_an_unexpected_error_tells_nothing(
    harness: Harness, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*arguments: object) -> None:
        raise RuntimeError("secret")

    monkeypatch.setattr(harness.engine, "submit", broken)
    harness.write_adapter("poet")
    await harness.client.load_adapter("poet")
    request = text_request()
    request.adapter_id = "poet"
    error = await failure(harness.generation.Generate(request))
    assert (error.code(), error.details()) == (grpc.StatusCode.INTERNAL, "internal error")
    assert "RuntimeError: secret" in caplog.text
    assert await harness.client.unload_adapter("poet", timeout=5)  # it was released


async def test_unknown_methods_are_unimplemented(harness: Harness) -> None:
    method = harness.channel.unary_unary(
        "/lorax.v1.GenerationService/Nothing", request_serializer=None, response_deserializer=None
    )
    assert (await failure(method(b""))).code() is grpc.StatusCode.UNIMPLEMENTED


async def test_garbage_is_refused_and_the_server_lives(
    harness: Harness, caplog: pytest.LogCaptureFixture
) -> None:
    method = harness.channel.unary_unary(
        "/lorax.v1.GenerationService/Generate", request_serializer=None, response_deserializer=None
    )
    for garbage in (b"\xff" * 10, b"\x0a\xff\xff\xff\xff\x0f", b"\x08"):
        error = await failure(method(garbage))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert not caplog.records
    assert (await harness.generation.Generate(text_request(max_new_tokens=1))).text
