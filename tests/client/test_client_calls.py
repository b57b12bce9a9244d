"""Both clients against a real server over a fake engine."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

import pytest

from lorax_serve.client import (
    AppliedAdapter,
    AsyncClient,
    Client,
    StopReason,
    TimedOut,
    Unavailable,
)
from lorax_serve.core import Freed
from lorax_serve.errors import (
    AdapterConflict,
    AdapterNotFound,
    AdapterRejected,
    EngineFailed,
    InvalidRequest,
    Overloaded,
    RejectReason,
)
from tests.frontend.toy_tokenizers import WORDS
from tests.server.harness import Harness, until

_T = TypeVar("_T")


async def synchronous(harness: Harness, work: Callable[[Client], _T], **settings: Any) -> _T:
    """Run ``work`` on a thread, with a synchronous client."""

    def run() -> _T:
        with Client(f"127.0.0.1:{harness.server.port}", **settings) as client:
            return work(client)

    return await asyncio.to_thread(run)


async def test_generate(harness: Harness) -> None:
    result = await synchronous(
        harness,
        lambda client: client.generate(
            "one two three",
            max_new_tokens=4,
            min_new_tokens=2,
            temperature=0.5,
            top_k=5,
            top_p=0.9,
            seed=11,
            repetition_penalty=1.1,
            logprobs=1,
        ),
    )
    assert result == await harness.client.generate(
        "one two three",
        max_new_tokens=4,
        min_new_tokens=2,
        temperature=0.5,
        top_k=5,
        top_p=0.9,
        seed=11,
        repetition_penalty=1.1,
        logprobs=1,
    )
    assert result.text.split() == ["one", "two", "three", "one"]
    assert result.stop_reason is StopReason.MAX_TOKENS
    assert (result.input_token_count, result.generated_token_count, result.seed) == (3, 4, 11)
    assert (result.adapter, result.adapter_version, result.adapter_digest) == (None, None, None)
    assert result.tokens[1].piece == "two"
    assert result.tokens[1].top[0].logprob == -0.5
    first, second = harness.engine.commands
    assert first.sampling == second.sampling
    sampling = first.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.5, 5, 0.9)
    assert (sampling.repetition_penalty, sampling.seed, sampling.logprobs) == (1.1, 11, 1)
    assert (first.max_new_tokens, first.min_new_tokens) == (4, 2)


async def test_stop_options(harness: Harness) -> None:
    one = await harness.client.generate("one stop here", stop="stop here")
    assert (one.text.strip(), one.stop_sequence) == ("one", "stop here")
    many = await harness.client.generate("one two", stop=["nine", "two"], include_stop=True)
    assert many.text.split() == ["one", "two"]
    past = await harness.client.generate("one </s>", ignore_eos=True, max_new_tokens=4)
    assert past.generated_token_count == 4
    none = await harness.client.generate("one </s>", stop=None, top_k=None)
    assert none.stop_reason is StopReason.EOS_TOKEN


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("one two", "one two"),
        ([7, 8], f"{WORDS[7]} {WORDS[8]}"),
        ((7,), WORDS[7]),
        ([{"role": "user", "content": "one"}], "<s> user one </s> <s> assistant"),
    ],
)
async def test_kinds_of_prompts(
    harness: Harness, prompt: str | Sequence[int] | Sequence[Mapping[str, str]], words: str
) -> None:
    tokens = await harness.client.tokenize(prompt)
    assert " ".join(tokens.pieces) == words
    assert await synchronous(harness, lambda client: client.tokenize(prompt)) == tokens


async def test_streams_carry_provenance_in_every_piece(harness: Harness) -> None:
    harness.write_adapter("poet")
    loaded = await harness.client.load_adapter("poet")
    stream = harness.client.stream("one two", adapter="poet", max_new_tokens=5, return_tokens=True)
    pieces = [piece async for piece in stream]
    assert "".join(piece.text for piece in pieces).split() == ["one", "two", "one", "two", "one"]
    assert [piece.generated_token_count for piece in pieces][-1] == 5
    assert sum(len(piece.tokens) for piece in pieces) == 5
    assert {(p.adapter, p.adapter_version, p.adapter_digest, p.seed) for p in pieces} == {
        ("poet", loaded.version, loaded.digest, pieces[0].seed)
    }
    assert [piece.stop_reason for piece in pieces][-1] is StopReason.MAX_TOKENS
    again = await synchronous(
        harness, lambda client: list(client.stream("one two", adapter="poet", max_new_tokens=5))
    )
    assert "".join(piece.text for piece in again) == "".join(piece.text for piece in pieces)


async def test_adapters_added_up(harness: Harness) -> None:
    for name in ("poet", "pilot"):
        harness.write_adapter(name, name)
        await harness.client.load_adapter(name)
    pilot, poet = await harness.client.list_adapters()
    scales = {"poet": 0.5, "pilot": -2}
    result = await harness.client.generate("one two", adapter=scales, seed=1, max_new_tokens=3)
    assert result.adapters == (
        AppliedAdapter("poet", poet.version, poet.digest, 0.5),
        AppliedAdapter("pilot", pilot.version, pilot.digest, -2.0),
    )
    assert (result.adapter, result.adapter_version, result.adapter_digest) == (None, None, None)
    assert result == await synchronous(
        harness,
        lambda client: client.generate("one two", adapter=scales, seed=1, max_new_tokens=3),
    )
    pieces = [piece async for piece in harness.client.stream("one two", adapter=scales)]
    pieces += await synchronous(
        harness, lambda client: list(client.stream("one two", adapter=scales))
    )
    assert {piece.adapters for piece in pieces} == {result.adapters}
    one = await harness.client.generate("one", adapter={"poet": 3}, max_new_tokens=1)
    assert one.adapters == (AppliedAdapter("poet", poet.version, poet.digest, 3.0),)
    alone = await harness.client.generate("one", adapter="poet", max_new_tokens=1)
    assert (alone.adapter, alone.adapters) == ("poet", ())
    with pytest.raises(InvalidRequest, match="names no adapter"):
        await harness.client.generate("one", adapter={})
    with pytest.raises(InvalidRequest, match="scale of 'poet' must be in"):
        await synchronous(harness, lambda client: client.generate("one", adapter={"poet": 101}))
    with pytest.raises(AdapterNotFound, match="'nobody' is not loaded"):
        await harness.client.generate("one", adapter={"poet": 1, "nobody": 1})


async def test_leaving_a_stream_cancels_it(harness: Harness) -> None:
    async with contextlib.aclosing(harness.client.stream("one")) as stream:
        async for _ in stream:
            break
    await until(lambda: harness.engine.in_flight == 0)
    harness.engine.aborted.clear()

    def leave(client: Client) -> None:
        for _ in client.stream("one"):
            break

    await synchronous(harness, leave)
    await until(lambda: harness.engine.in_flight == 0)
    assert len(harness.engine.aborted) == 1


async def test_cancelling_a_task_cancels_its_request(harness: Harness) -> None:
    harness.engine.paused = True
    task = asyncio.create_task(harness.client.generate("one"))
    await until(lambda: harness.engine.in_flight == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: harness.engine.in_flight == 0)


async def test_timeouts(harness: Harness) -> None:
    harness.engine.paused = True
    with pytest.raises(TimedOut, match="did not answer in time"):
        await harness.client.generate("one", timeout=0.1)
    with pytest.raises(TimedOut):
        await synchronous(harness, lambda client: list(client.stream("one")), timeout=0.1)
    await until(lambda: harness.engine.in_flight == 0)


async def test_the_server_s_errors_come_back(harness: Harness) -> None:
    client = harness.client
    with pytest.raises(InvalidRequest, match="top_p must be in"):
        await client.generate("one", top_p=2)
    with pytest.raises(InvalidRequest, match="adapter_id is empty"):
        await client.generate("one", adapter="")
    for name in ("nobody", "ünknown", "line\nbreak"):
        with pytest.raises(AdapterNotFound, match="is not loaded"):
            await client.generate("one", adapter=name)
    with pytest.raises(AdapterNotFound, match="'nobody' is not loaded"):
        await synchronous(harness, lambda client: list(client.stream("one", adapter="nobody")))
    harness.write_adapter("bad", "bad")
    with pytest.raises(AdapterRejected, match="rank 5") as rejected:
        await synchronous(harness, lambda client: client.load_adapter("bad"))
    assert rejected.value.reason is RejectReason.SHAPE_MISMATCH
    harness.engine.paused = True
    running = [asyncio.create_task(client.generate("one")) for _ in range(8)]
    await until(lambda: harness.engine.in_flight == 8)
    with pytest.raises(Overloaded):
        await client.generate("one")
    harness.engine.fail("out of memory")
    for task in running:
        with pytest.raises(EngineFailed, match="out of memory"):
            await task


async def test_adapters(harness: Harness) -> None:
    harness.write_adapter("poet")
    harness.write_adapter("other-name")
    before = datetime.now(UTC) - timedelta(seconds=1)
    poet = await synchronous(harness, lambda client: client.load_adapter("poet"))
    pilot = await harness.client.load_adapter("pilot", "other-name")
    assert await synchronous(harness, lambda client: client.list_adapters()) == [pilot, poet]
    assert before < poet.last_used < datetime.now(UTC) + timedelta(seconds=1)
    assert await synchronous(harness, lambda client: client.unload_adapter("poet")) == Freed(
        host=1001
    )
    harness.engine.loads_open.clear()
    loading = asyncio.create_task(harness.client.load_adapter("poet"))
    await until(lambda: harness.engine.loads[-1] == "poet" and len(harness.engine.loads) == 3)
    with pytest.raises(AdapterConflict):
        await harness.client.load_adapter("poet")
    harness.engine.loads_open.set()
    assert (await loading).version == 3


async def test_model_info(harness: Harness) -> None:
    model = await synchronous(harness, lambda client: client.model_info())
    assert model == await harness.client.model_info()
    assert (model.model, model.num_parameters, model.eos_token_ids) == ("fake", 123, (2,))


async def test_a_missing_server_is_unavailable() -> None:
    async with AsyncClient("127.0.0.1:1", retries=0) as client:
        with pytest.raises(Unavailable, match=r"127\.0\.0\.1:1: "):
            await client.model_info()
