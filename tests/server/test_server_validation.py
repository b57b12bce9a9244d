"""Bad requests: each is refused with INVALID_ARGUMENT and a message that names the field."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import grpc
import pytest
from google.protobuf import json_format

from lorax_serve.pb.lorax.v1 import generation_pb2 as pb
from tests.server.harness import Harness, text_request

BAD: list[tuple[dict[str, Any], str]] = [
    ({}, "prompt is missing: set one of text, token_ids and chat"),
    ({"text": ""}, "prompt is empty"),
    ({"tokenIds": {}}, "token_ids.ids is empty"),
    ({"tokenIds": {"ids": [999]}}, "token_ids must be in [0, 19), found 999"),
    ({"chat": {}}, "chat.messages is empty"),
    ({"chat": {"messages": [{"content": "hi"}]}}, "chat.messages: role is missing"),
    ({"chat": {"messages": [{"role": "robot"}]}}, "chat: the chat template refuses"),
    ({"text": "one " * 64}, "prompt has 64 tokens"),
    ({"text": "one", "priority": 3}, "priority must be in [-2, 2], found 3"),
    ({"text": "one", "priority": -3}, "priority must be in [-2, 2], found -3"),
    ({"text": "one", "adapterId": ""}, "adapter_id is empty: leave it out for the base model"),
    ({"text": "one", "adapterId": "x" * 129}, "adapter_id has 129 characters"),
]
BAD_PARAMETERS: list[tuple[dict[str, Any], str]] = [
    ({"sampling": {"temperature": -1}}, "temperature must be in [0, 100]"),
    ({"sampling": {"temperature": "NaN"}}, "temperature must be in [0, 100]"),
    ({"sampling": {"topP": 0}}, "top_p must be in (0, 1]"),
    ({"sampling": {"topP": 1.5}}, "top_p must be in (0, 1]"),
    ({"sampling": {"topK": -1}}, "top_k must be 0 (off) or more"),
    ({"decoding": {"repetitionPenalty": 0}}, "repetition_penalty must be in [0.01, 100]"),
    ({"stopping": {"maxNewTokens": 0}}, "max_new_tokens must be at least 1"),
    ({"stopping": {"maxNewTokens": -5}}, "max_new_tokens must be at least 1"),
    ({"stopping": {"minNewTokens": 257}}, "min_new_tokens must be in [0, max_new_tokens]"),
    ({"stopping": {"stopSequences": [""]}}, "stop_sequences must be strings of 1 to 256"),
    ({"stopping": {"stopSequences": ["x"] * 17}}, "stop_sequences must be at most 16"),
    ({"response": {"logprobs": 21}}, "logprobs must be in [0, 20]"),
]
BAD += [({"text": "one", "parameters": bad}, message) for bad, message in BAD_PARAMETERS]
A, NINE = {"adapterId": "a"}, [{"adapterId": name} for name in "abcdefghi"]
BAD_ADAPTERS: list[tuple[list[dict[str, Any]], str]] = [
    ([{}], "adapters[0].adapter_id is missing: name an adapter"),
    ([A, {"scale": 1}], "adapters[1].adapter_id is missing: name an adapter"),
    ([A, {"adapterId": ""}], "adapters[1].adapter_id is missing: name an adapter"),
    ([{"adapterId": "x" * 129}], "adapters[0].adapter_id has 129 characters"),
    ([A, {"adapterId": "b"}, A], "adapters: 'a' is named twice; give it one scale"),
    (NINE, "adapters must be at most 8, found 9"),
    ([A | {"scale": "NaN"}], "adapters: scale of 'a' must be in [-100, 100], found nan"),
    ([A | {"scale": "-Infinity"}], "adapters: scale of 'a' must be in [-100, 100], found -inf"),
    ([A | {"scale": 1000}], "adapters: scale of 'a' must be in [-100, 100], found 1000.0"),
    ([A | {"scale": -100.001}], "adapters: scale of 'a' must be in [-100, 100], found -100.001"),
]
BAD += [({"text": "one", "adapters": bad}, message) for bad, message in BAD_ADAPTERS]
BAD += [
    (
        {"text": "one", "adapterId": "poet", "adapters": [A]},
        "adapter_id must be left out beside adapters, found 'poet'",
    )
]


async def refusal(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


async def test_refusals_name_the_field(harness: Harness) -> None:
    for content, message in BAD:
        request = json_format.ParseDict(content, pb.GenerateRequest())
        error = await refusal(harness.generation.Generate(request))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT, content
        assert message in (error.details() or ""), content
        streamed = json_format.ParseDict(content, pb.GenerateStreamRequest())
        error = await refusal(harness.generation.GenerateStream(streamed).read())
        assert message in (error.details() or ""), content
    assert not harness.engine.commands


@pytest.mark.parametrize(
    "parameters",
    [
        {"sampling": {"temperature": 0.001, "topP": 1, "topK": 0}},
        {"sampling": {"temperature": 100, "seed": str(2**64 - 1)}},
        {"decoding": {"repetitionPenalty": 0.01}},
        {"stopping": {"maxNewTokens": 2147483647, "minNewTokens": 1}},
        {"response": {"logprobs": 0}},
    ],
)
async def test_limits_themselves_are_allowed(harness: Harness, parameters: dict[str, Any]) -> None:
    content = {"text": "one </s>", "parameters": parameters}
    await harness.generation.Generate(json_format.ParseDict(content, pb.GenerateRequest()))


@pytest.mark.parametrize(
    ("adapter_id", "metadata", "allowed"),
    [
        ("poet", [("lorax-adapter", "poet")], True),
        ("poet", [], True),
        (None, [], True),
        ("poet", [("lorax-adapter", "other")], False),
        ("poet", [("lorax-adapter", "poet"), ("lorax-adapter", "other")], False),
        (None, [("lorax-adapter", "poet")], False),
        (None, [("lorax-adapter", "")], False),
    ],
)
async def test_the_metadata_must_name_the_same_adapter(
    harness: Harness, adapter_id: str | None, metadata: Sequence[tuple[str, str]], allowed: bool
) -> None:
    harness.write_adapter("poet")
    await harness.client.load_adapter("poet")
    request = text_request(max_new_tokens=1)
    if adapter_id is not None:
        request.adapter_id = adapter_id
    call = harness.generation.Generate(request, metadata=metadata)
    if allowed:
        assert (await call).generated_token_count == 1
    else:
        error = await refusal(call)
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "but the metadata lorax-adapter is" in (error.details() or "")


async def test_the_metadata_of_a_composition_names_its_parts(harness: Harness) -> None:
    request = text_request(max_new_tokens=1)
    for name in ("poet", "pilot"):
        harness.write_adapter(name, name)
        await harness.client.load_adapter(name)
        request.adapters.append(pb.AdapterScale(adapter_id=name))
    for value in ("poet", "", "poet+pilot"):
        error = await refusal(
            harness.generation.Generate(request, metadata=[("lorax-adapter", value)])
        )
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert f"adapters is 'pilot+poet', but the metadata lorax-adapter is {value!r}" in str(
            error.details()
        )
    metadata = [("lorax-adapter", "pilot+poet")]
    answer = await harness.generation.Generate(request, metadata=metadata)
    assert [part.scale for part in answer.adapters] == [1, 1]


async def test_the_metadata_names_no_version(harness: Harness) -> None:
    harness.write_adapter("poet")
    adapter = await harness.client.load_adapter("poet")
    request = text_request(max_new_tokens=1)
    request.adapter_id = f"poet@{adapter.digest}"
    for value in ("poet", request.adapter_id):
        await harness.generation.Generate(request, metadata=[("lorax-adapter", value)])
    other = [("lorax-adapter", f"poet@{'0' * 64}")]
    error = await refusal(harness.generation.Generate(request, metadata=other))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    # Our clients send what the server expects.
    name = request.adapter_id
    assert (await harness.client.generate("one", adapter=name, max_new_tokens=1)).adapter == "poet"


async def test_eight_adapters_and_the_largest_scales_are_allowed(harness: Harness) -> None:
    request = text_request(max_new_tokens=1)
    for name in "abcdefgh":
        harness.write_adapter(name)
        await harness.client.load_adapter(name)
        scale = -100 if name < "e" else 100
        request.adapters.append(pb.AdapterScale(adapter_id=name, scale=scale))
    assert len((await harness.generation.Generate(request)).adapters) == 8


async def test_tokenize_checks_its_prompt(harness: Harness) -> None:
    error = await refusal(harness.generation.Tokenize(pb.TokenizeRequest()))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_huge_message_is_refused_and_the_server_lives(harness: Harness) -> None:
    error = await refusal(harness.generation.Generate(pb.GenerateRequest(text="x" * (5 << 20))))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert (await harness.generation.Generate(text_request(max_new_tokens=1))).text
