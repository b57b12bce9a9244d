"""What the clients do without a server: arguments, retries, imports."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import AsyncIterator
from types import MappingProxyType
from typing import Any

import grpc
import pytest
import pytest_asyncio

from lorax_serve.client import AsyncClient, Client, ServerError, Unavailable, failures
from lorax_serve.client.requests import channel_options, generate_fields, metadata, prompt
from lorax_serve.errors import (
    EngineFailed,
    InvalidRequest,
    LoraxError,
    SourceFailed,
    SourceReason,
)
from lorax_serve.pb.lorax.v1 import generation_pb2 as pb
from lorax_serve.pb.lorax.v1 import generation_pb2_grpc
from lorax_serve.server import status
from lorax_serve.server.app import SERVICES


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": -1}, "seed cannot be -1"),
        ({"seed": 2**64}, "seed cannot be"),
        ({"max_new_tokens": 1 << 40}, "max_new_tokens cannot be"),
        ({"top_k": 1.5}, "top_k cannot be 1.5"),
        ({"temperature": "hot"}, "temperature cannot be 'hot'"),
        ({"temprature": 1}, "temprature is no option; there are max_new_tokens"),
    ],
)
def test_options_that_cannot_be_sent_are_named(options: Any, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        generate_fields("one", None, options)


@pytest.mark.parametrize("bad", [[1.5], [-1], ["one"], [{"role": "user", "text": "hi"}], [None]])
def test_prompts_that_cannot_be_sent(bad: Any) -> None:
    with pytest.raises(InvalidRequest, match="prompt must be a string, token ids, or messages"):
        prompt(bad)


def test_priority_is_a_field_of_the_request_itself() -> None:
    fields = generate_fields("one", None, {"priority": -2, "seed": 5})
    assert pb.GenerateRequest(**fields).priority == -2
    assert pb.GenerateStreamRequest(**fields).parameters.sampling.seed == 5
    assert not pb.GenerateRequest(**generate_fields("one", None, {})).HasField("priority")


def test_one_adapter_or_several() -> None:
    several = generate_fields("one", {"poet": 0.5, "pilot@0123456789ab": -1}, {})
    for kind in (pb.GenerateRequest, pb.GenerateStreamRequest):
        message = kind(**several)
        assert [(each.adapter_id, each.scale) for each in message.adapters] == [
            ("poet", 0.5),
            ("pilot@0123456789ab", -1.0),
        ]
        assert not message.HasField("adapter_id")
    alone = pb.GenerateRequest(**generate_fields("one", MappingProxyType({"poet": 2}), {}))
    assert [(each.adapter_id, each.scale) for each in alone.adapters] == [("poet", 2.0)]
    named = pb.GenerateRequest(**generate_fields("one", "poet", {}))
    assert (named.adapter_id, len(named.adapters)) == ("poet", 0)
    base = pb.GenerateRequest(**generate_fields("one", None, {}))
    assert not base.adapters
    assert not base.HasField("adapter_id")


@pytest.mark.parametrize(
    ("adapters", "message"),
    [
        ({}, "adapter: names no adapter; None is the base model"),
        ({"poet": "loud"}, "adapter: names and scales cannot be {'poet': 'loud'}"),
        ({"poet": 10**400}, "adapter: names and scales cannot be .* too large"),
        ({7: 1.0}, "adapter: names and scales cannot be {7: 1.0}"),
        ({"poet": [1]}, r"adapter: names and scales cannot be {'poet': \[1\]}"),
        (["poet"], r"adapter must be a name, or scales by name, found \['poet'\]"),
        (7, "adapter must be a name, or scales by name, found 7"),
    ],
)
def test_adapters_that_cannot_be_sent(adapters: Any, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        generate_fields("one", adapters, {})


def test_metadata_is_sent_where_it_can_be() -> None:
    assert metadata("poet") == metadata("poet@" + 12 * "a") == (("lorax-adapter", "poet"),)
    # The order and the scales say nothing of where the parts are.
    both = (("lorax-adapter", "pilot+poet"),)
    assert (
        metadata({"poet": 1, "pilot@" + 64 * "b": -1}) == metadata({"pilot": 2, "poet": 1}) == both
    )
    assert metadata(None) == metadata("ü") == metadata("a\nb") == metadata({"ü": 1}) == ()


@pytest.mark.parametrize("retries", [-1, 5])
def test_retries_are_bounded(retries: int) -> None:
    with pytest.raises(InvalidRequest, match=r"retries must be in \[0, 4\]"):
        Client(retries=retries)


def test_retries_are_for_services_that_exist() -> None:
    config = str(dict(channel_options(2))["grpc.service_config"])
    assert all(service in config for service in SERVICES)
    assert '"maxAttempts": 3' in config
    assert "UnloadAdapter" not in config


def test_the_client_s_copies_of_the_reasons_names() -> None:
    assert failures._REJECT_REASON == status.REJECT_REASON
    assert failures._SOURCE_REASON == status.SOURCE_REASON


class Flaky(generation_pb2_grpc.GenerationServiceServicer):  # type: ignore[misc]
    """Fails with ``code`` the first ``failures`` times."""

    def __init__(self) -> None:
        self.calls = 0
        self.failures = 0
        self.code = grpc.StatusCode.UNAVAILABLE
        self.port = 0

    async def ModelInfo(self, request: Any, context: Any) -> Any:
        self.calls += 1
        if self.calls <= self.failures:
            await context.abort(self.code, "not now")
        return pb.ModelInfoResponse(model="m")

    async def GenerateStream(self, request: Any, context: Any) -> None:
        self.calls += 1
        await context.write(pb.GenerateStreamResponse(text="one"))
        await context.abort(self.code, "lost")


@pytest_asyncio.fixture
async def flaky() -> AsyncIterator[Flaky]:
    servicer = Flaky()
    server = grpc.aio.server()
    generation_pb2_grpc.add_GenerationServiceServicer_to_server(servicer, server)
    servicer.port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield servicer
    await server.stop(None)


async def test_unavailable_servers_are_tried_again(flaky: Flaky) -> None:
    flaky.failures = 1
    async with AsyncClient(f"127.0.0.1:{flaky.port}", retries=1) as client:
        assert (await client.model_info()).model == "m"
    assert flaky.calls == 2


async def test_no_retries_if_none_are_wanted(flaky: Flaky) -> None:
    flaky.failures = 1
    async with AsyncClient(f"127.0.0.1:{flaky.port}", retries=0) as client:
        with pytest.raises(Unavailable, match="not now"):
            await client.model_info()
    assert flaky.calls == 1


async def test_other_errors_are_not_tried_again(flaky: Flaky) -> None:
    flaky.failures = 1
    flaky.code = grpc.StatusCode.INTERNAL
    async with AsyncClient(f"127.0.0.1:{flaky.port}") as client:
        with pytest.raises(EngineFailed, match="not now"):
            await client.model_info()
    assert flaky.calls == 1


async def test_a_stream_that_has_begun_is_not_tried_again(flaky: Flaky) -> None:
    async with AsyncClient(f"127.0.0.1:{flaky.port}") as client:
        pieces = client.stream("one")
        assert (await anext(pieces)).text == "one"
        with pytest.raises(Unavailable, match="lost"):
            await anext(pieces)
    assert flaky.calls == 1


class FailedCall:
    """What gRPC raises, as far as ``error_of`` looks at it."""

    def __init__(
        self, error: LoraxError, trailing: tuple[tuple[str, str | bytes], ...] = ()
    ) -> None:
        code, message, own = status.status_of(error)
        self._parts = code, message, (*own, *trailing)

    def code(self) -> grpc.StatusCode:
        return self._parts[0]

    def details(self) -> str:
        return self._parts[1]

    def trailing_metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        return self._parts[2]


@pytest.mark.parametrize("reason", SourceReason)
def test_failed_sources_keep_their_reason(reason: SourceReason) -> None:
    error = failures.error_of(FailedCall(SourceFailed(reason, "hf://org/one: no")), "here")
    assert isinstance(error, SourceFailed)
    assert (error.reason, str(error)) == (reason, "hf://org/one: no")


def test_a_stream_that_a_proxy_has_reset_is_unavailable() -> None:
    reset = EngineFailed("Received RST_STREAM with error code 2")
    assert isinstance(failures.error_of(FailedCall(reset), "here"), Unavailable)
    # What a server says itself is what it says.
    ours = FailedCall(reset, (("lorax-replica", "replica-0"),))
    assert isinstance(failures.error_of(ours, "here"), EngineFailed)


async def test_statuses_without_an_error_of_ours_keep_their_name(flaky: Flaky) -> None:
    async with AsyncClient(f"127.0.0.1:{flaky.port}") as client:
        with pytest.raises(ServerError, match="UNIMPLEMENTED"):
            await client.list_adapters()


def test_the_client_imports_nothing_heavy() -> None:
    script = (
        "import sys, lorax_serve.client, lorax_serve.cli.client\n"
        "heavy = {'torch', 'transformers', 'numpy', 'prometheus_client'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("module", ["lorax_serve.cli.client", "lorax_serve.cli.serve"])
def test_help_is_quick(module: str) -> None:
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", module, "--help"], check=True, capture_output=True)
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 0.5
