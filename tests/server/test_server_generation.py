"""GenerationService over a real gRPC server: content, provenance, merging, cancellation."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest

from lorax_serve.core import StopReason
from lorax_serve.pb.lorax.v1 import generation_pb2 as pb
from tests.frontend.toy_tokenizers import WORDS
from tests.server.harness import Harness, serving, stream_request, text_request, until


async def collect(call: Any) -> list[Any]:
    return [message async for message in call]


async def test_generate_returns_text_counts_and_seed(harness: Harness) -> None:
    answer = await harness.generation.Generate(text_request(max_new_tokens=5))
    assert answer.text.split() == ["one", "two", "three", "one", "two"]
    assert answer.stop_reason == pb.STOP_REASON_MAX_TOKENS
    assert (answer.input_token_count, answer.generated_token_count) == (3, 5)
    assert answer.seed == harness.engine.commands[0].sampling.seed
    assert not answer.HasField("adapter_id")
    assert not answer.HasField("stop_sequence")
    assert not answer.tokens


async def test_defaults_are_the_engines(harness: Harness) -> None:
    await harness.generation.Generate(text_request("one </s>"))
    command = harness.engine.commands[0]
    assert (command.max_new_tokens, command.min_new_tokens) == (256, 0)
    assert command.sampling.greedy
    assert command.sampling.logprobs is None


@pytest.mark.parametrize(
    ("sampling", "temperature"),
    [({"top_p": 0.5}, 1.0), ({"top_k": 3}, 1.0), ({"seed": 7}, 0.0), ({"temperature": 0.0}, 0.0)],
)
async def test_sampling_is_on_when_a_filter_is_given(
    harness: Harness, sampling: dict[str, Any], temperature: float
) -> None:
    request = text_request("one </s>")
    request.parameters.sampling.MergeFrom(pb.SamplingParameters(**sampling))
    await harness.generation.Generate(request)
    assert harness.engine.commands[0].sampling.temperature == temperature


async def test_a_given_seed_is_used_and_a_missing_one_is_drawn(harness: Harness) -> None:
    request = text_request(max_new_tokens=1)
    drawn = {(await harness.generation.Generate(request)).seed for _ in range(3)}
    assert len(drawn) == 3
    request.parameters.sampling.seed = 0
    assert (await harness.generation.Generate(request)).seed == 0


async def test_end_of_text_and_stop_sequences(harness: Harness) -> None:
    answer = await harness.generation.Generate(text_request("one two </s>"))
    assert (answer.text.split(), answer.stop_reason) == (["one", "two"], pb.STOP_REASON_EOS_TOKEN)
    request = text_request("one stop here", stop_sequences=["stop here", "nine"])
    answer = await harness.generation.Generate(request)
    assert (answer.text.strip(), answer.stop_sequence) == ("one", "stop here")
    assert answer.stop_reason == pb.STOP_REASON_STOP_SEQUENCE
    request.parameters.stopping.include_stop_sequence = True
    answer = await harness.generation.Generate(request)
    assert answer.text.split() == ["one", "stop", "here"]


async def test_token_limit(harness: Harness) -> None:
    answer = await harness.generation.Generate(text_request())
    assert answer.stop_reason == pb.STOP_REASON_TOKEN_LIMIT
    assert answer.input_token_count + answer.generated_token_count == 64


async def test_token_ids_and_chat_prompts(harness: Harness) -> None:
    request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[7, 2]))
    assert (await harness.generation.Generate(request)).text.strip() == WORDS[7]
    message = pb.ChatMessage(role="user", content="one two")
    request = pb.GenerateRequest(chat=pb.ChatMessages(messages=[message]))
    await harness.generation.Generate(request)
    words = [WORDS[token] for token in harness.engine.commands[-1].tokens]
    assert words == ["<s>", "user", "one", "two", "</s>", "<s>", "assistant"]


async def test_token_details(harness: Harness) -> None:
    request = text_request("seven eight </s>")
    request.parameters.response.generated_tokens = True
    answer = await harness.generation.Generate(request)
    assert [token.piece for token in answer.tokens] == ["seven", "eight", "</s>"]
    assert not answer.tokens[0].HasField("logprob")
    request.parameters.response.ClearField("generated_tokens")
    request.parameters.response.logprobs = 2
    first = (await harness.generation.Generate(request)).tokens[0]
    assert (first.piece, first.logprob) == ("seven", -0.5)
    assert [(top.piece, top.logprob) for top in first.top] == [("seven", -0.5), ("eight", -1.5)]


async def test_stream_gives_provenance_first_and_the_reason_last(harness: Harness) -> None:
    harness.write_adapter("poet")
    loaded = await harness.client.load_adapter("poet")
    request = stream_request(max_new_tokens=6)
    request.adapter_id = "poet"
    messages = await collect(harness.generation.GenerateStream(request))
    first, *others = messages
    assert (first.adapter_id, first.adapter_version) == ("poet", loaded.version)
    assert first.adapter_digest == loaded.digest
    assert first.input_token_count == 3
    assert first.HasField("seed")
    assert not any(each.HasField("seed") or each.HasField("adapter_id") for each in others)
    assert "".join(each.text for each in messages).split() == ["one", "two", "three"] * 2
    assert [each.stop_reason for each in messages[:-1]] == [0] * (len(messages) - 1)
    assert messages[-1].stop_reason == pb.STOP_REASON_MAX_TOKENS
    assert messages[-1].generated_token_count == 6


async def test_tokens_that_come_together_travel_in_one_message(harness: Harness) -> None:
    harness.engine.paused = True
    call = harness.generation.GenerateStream(stream_request(max_new_tokens=20))
    await until(lambda: harness.engine.in_flight == 1)
    for _ in range(20):
        harness.engine.step()  # without a turn of the event loop in between: nobody can read
    messages = await collect(call)
    assert len(messages) == 1
    assert messages[0].generated_token_count == 20
    assert messages[0].stop_reason == pb.STOP_REASON_MAX_TOKENS


async def test_a_client_that_does_not_read_delays_nobody(
    tokenizer_dir: Path, tmp_path: Path
) -> None:
    async with serving(tokenizer_dir, tmp_path) as harness:
        lazy = harness.generation.GenerateStream(stream_request(max_new_tokens=50))
        answer = await harness.generation.Generate(text_request(max_new_tokens=50))
        assert answer.generated_token_count == 50
        assert (await collect(lazy))[-1].generated_token_count == 50


async def test_tokenize(harness: Harness) -> None:
    answer = await harness.generation.Tokenize(pb.TokenizeRequest(text="one three"))
    assert list(answer.tokens) == ["one", "three"]
    assert [WORDS[token] for token in answer.token_ids] == ["one", "three"]
    assert answer.token_count == 2


async def test_model_info(harness: Harness) -> None:
    answer = await harness.generation.ModelInfo(pb.ModelInfoRequest())
    assert (answer.model, answer.vocab_size, answer.max_sequence_length) == ("fake", len(WORDS), 64)
    assert list(answer.eos_token_ids) == [2]


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("after_tokens", [True, False])
async def test_cancelling_reaches_the_engine_within_a_step(
    harness: Harness, streaming: bool, after_tokens: bool
) -> None:
    harness.engine.paused = True
    call = (
        harness.generation.GenerateStream(stream_request())
        if streaming
        else harness.generation.Generate(text_request())
    )
    await until(lambda: harness.engine.in_flight == 1)
    if after_tokens:
        harness.engine.step()
        harness.engine.step()
        if streaming:
            assert (await call.read()).text
    steps = harness.engine.steps
    call.cancel()
    await until(lambda: harness.engine.in_flight == 0)
    assert harness.engine.aborted == [(1, steps)]
    assert _ended(harness, StopReason.CANCELLED) == 1


async def test_cancelling_while_the_server_writes(harness: Harness) -> None:
    call = harness.generation.GenerateStream(stream_request(max_new_tokens=60))
    await call.read()
    call.cancel()
    await until(lambda: harness.engine.in_flight == 0)
    await until(lambda: _ended(harness, StopReason.CANCELLED) == 1)


@pytest.mark.parametrize("streaming", [True, False])
async def test_a_deadline_reaches_the_engine(harness: Harness, streaming: bool) -> None:
    harness.engine.paused = True
    call = (
        harness.generation.GenerateStream(stream_request(), timeout=0.2)
        if streaming
        else harness.generation.Generate(text_request(), timeout=0.2)
    )
    assert await call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await until(lambda: harness.engine.in_flight == 0)
    assert len(harness.engine.aborted) == 1


async def test_a_lost_connection_frees_its_requests(harness: Harness) -> None:
    harness.engine.paused = True
    async with grpc.aio.insecure_channel(f"127.0.0.1:{harness.server.port}") as channel:
        call = channel.unary_stream(
            "/lorax.v1.GenerationService/GenerateStream",
            request_serializer=pb.GenerateStreamRequest.SerializeToString,
            response_deserializer=pb.GenerateStreamResponse.FromString,
        )(stream_request())
        await until(lambda: harness.engine.in_flight == 1)
        assert not call.done()
    await until(lambda: harness.engine.in_flight == 0)


async def test_many_cancels_leave_nothing(tokenizer_dir: Path, tmp_path: Path) -> None:
    async with serving(tokenizer_dir, tmp_path, limit=1000) as harness:
        harness.write_adapter("poet")
        await harness.client.load_adapter("poet")

        async def one(delay: float) -> None:
            request = stream_request(max_new_tokens=60)
            request.adapter_id = "poet"
            call = harness.generation.GenerateStream(request)
            await asyncio.sleep(delay)
            call.cancel()

        await asyncio.gather(*(one(i % 20 / 1000) for i in range(100)))
        # Unloading waits for the last reference: it returns only if none has leaked.
        assert await harness.client.unload_adapter("poet", timeout=5)
        assert harness.engine.in_flight == 0


def _ended(harness: Harness, reason: StopReason) -> float:
    labels = {"adapter": "_base", "stop_reason": reason.name.lower()}
    registry = harness.server.metrics.registry
    return registry.get_sample_value("lorax_requests_total", labels) or 0.0
