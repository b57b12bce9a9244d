"""Several adapters in one request, over a real gRPC server: who is named, and who has answered."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import grpc
import pytest
import pytest_asyncio

from lorax_serve.pb.lorax.v1 import generation_pb2 as pb
from tests.server.harness import Harness, stream_request, text_request, until

Scaled = dict[str, float | None]


@pytest_asyncio.fixture
async def loaded(harness: Harness) -> Harness:
    """With adapters ``poet`` and ``pilot``."""
    for name in ("poet", "pilot"):
        harness.write_adapter(name, name)
        await harness.client.load_adapter(name)
    return harness


def naming(message: Any, adapters: Scaled) -> Any:
    for name, scale in adapters.items():
        message.adapters.append(pb.AdapterScale(adapter_id=name, scale=scale))
    return message


async def generate(harness: Harness, adapters: Scaled, **stopping: Any) -> Any:
    request = text_request(**{"max_new_tokens": 2, **stopping})
    return await harness.generation.Generate(naming(request, adapters))


async def active(harness: Harness) -> dict[str, int]:
    return {each.name: each.active_requests for each in await harness.client.list_adapters()}


async def test_the_engine_is_told_what_to_add_up(loaded: Harness) -> None:
    await generate(loaded, {"poet": 0.5, "pilot": None})
    ((key, parts),) = loaded.engine.composed.items()
    assert [(part.name, part.scale) for part in parts] == [("poet", 0.5), ("pilot", 1.0)]
    assert [part.path for part in parts] == [str(loaded.adapters / n) for n in ("poet", "pilot")]
    assert loaded.engine.commands[0].adapter == key
    await generate(loaded, {"poet": 0.5, "pilot": 1})
    assert list(loaded.engine.composed) == [key], "it is there already"
    await generate(loaded, {"poet": 0.5, "pilot": -1})
    await generate(loaded, {"poet": -1})
    assert [command.adapter for command in loaded.engine.commands] == [
        *(key, key),
        *list(loaded.engine.composed)[1:],
    ]
    assert len(loaded.engine.composed) == 3


async def test_the_answer_names_all_versions_and_scales(loaded: Harness) -> None:
    versions = {each.name: each for each in await loaded.client.list_adapters()}
    wanted = [
        pb.AppliedAdapter(
            adapter_id=name,
            version=versions[name].version,
            digest=versions[name].digest,
            scale=scale,
        )
        for name, scale in (("poet", -0.25), ("pilot", 3))
    ]
    scales: Scaled = {"poet": -0.25, "pilot": 3}
    answer = await generate(loaded, scales)
    assert list(answer.adapters) == wanted
    assert not answer.HasField("adapter_id")
    assert not answer.HasField("adapter_digest")
    request = naming(stream_request(max_new_tokens=5), scales)
    first, *others = [message async for message in loaded.generation.GenerateStream(request)]
    assert list(first.adapters) == wanted
    assert not first.HasField("adapter_id")
    assert others
    assert not any(each.adapters for each in others)
    single = text_request(max_new_tokens=1)
    single.adapter_id = "poet"
    assert not (await loaded.generation.Generate(single)).adapters


async def test_one_version_may_be_named(loaded: Harness) -> None:
    (old,) = [each for each in await loaded.client.list_adapters() if each.name == "poet"]
    answer = await generate(loaded, {f"poet@{old.digest[:12]}": 2})
    assert (answer.adapters[0].adapter_id, answer.adapters[0].digest) == ("poet", old.digest)


@pytest.mark.parametrize(
    ("name", "there_is"),
    [
        ("nobody", "loaded: pilot, poet"),
        ("poet@0123456789ab", r"'poet' means \w{12} now, its earlier versions are: none"),
    ],
)
async def test_a_name_that_is_not_loaded(loaded: Harness, name: str, there_is: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await generate(loaded, {"poet": 1, name: 1})
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    message = f"adapter_id '{name}' is not loaded; {there_is}"
    assert re.search(message, str(caught.value.details()))
    assert await active(loaded) == {"poet": 0, "pilot": 0}
    assert not loaded.engine.composed


async def test_a_new_version_is_for_the_next_request(loaded: Harness) -> None:
    loaded.engine.paused = True
    scales: Scaled = {"poet": 1, "pilot": 1}
    running = asyncio.create_task(generate(loaded, scales))
    await until(lambda: loaded.engine.in_flight == 1)
    loaded.write_adapter("poet", "better")
    new = await loaded.client.load_adapter("poet")
    other = asyncio.create_task(generate(loaded, scales))
    await until(lambda: loaded.engine.in_flight == 2)
    assert not loaded.engine.dropped
    loaded.engine.paused = False
    assert (await running).adapters[0].version == 1
    assert (await other).adapters[0].version == new.version
    await until(lambda: len(loaded.engine.dropped) == 2)  # the old version and what was made of it
    assert set(loaded.engine.dropped) == {1, min(loaded.engine.composed)}


async def test_unloading_waits_for_what_is_made_of_it(loaded: Harness) -> None:
    loaded.engine.paused = True
    running = [asyncio.create_task(generate(loaded, {"poet": 1, "pilot": 2})) for _ in range(2)]
    await until(lambda: loaded.engine.in_flight == 2)
    assert await active(loaded) == {"poet": 2, "pilot": 2}
    unload = asyncio.create_task(loaded.client.unload_adapter("pilot"))
    await until(lambda: loaded.server.adapters[0].state.value != "ready")
    with pytest.raises(grpc.aio.AioRpcError, match="'pilot' is not loaded"):
        await generate(loaded, {"poet": 1, "pilot": 2})
    assert not unload.done()
    loaded.engine.paused = False
    await asyncio.gather(*running)
    await unload
    assert set(loaded.engine.dropped) == {2, *loaded.engine.composed}
    assert await active(loaded) == {"poet": 0}


async def test_a_request_that_goes_away_meanwhile_leaves_nothing(loaded: Harness) -> None:
    loaded.engine.loads_open.clear()
    call = loaded.generation.Generate(naming(text_request(), {"poet": 1, "pilot": 2}))
    waiting = asyncio.ensure_future(call)
    await until(lambda: len(loaded.engine.composed) == 1)
    waiting.cancel()
    await until(lambda: all(each.references == 0 for each in loaded.server.adapters))
    loaded.engine.loads_open.set()
    await loaded.client.unload_adapter("poet")
    assert set(loaded.engine.dropped) == {1, *loaded.engine.composed}
    assert not loaded.engine.commands


async def test_compositions_are_counted_under_one_label(loaded: Harness) -> None:
    await generate(loaded, {"poet": 1, "pilot": 2}, max_new_tokens=5)
    await generate(loaded, {"poet": 3}, max_new_tokens=4)

    def sample(name: str, **labels: str) -> float | None:
        return loaded.server.metrics.registry.get_sample_value(name, labels)

    assert sample("lorax_generated_tokens_total", adapter="_composed") == 9
    assert sample("lorax_prompt_tokens_total", adapter="_composed") == 6
    ended = {"adapter": "_composed", "stop_reason": "max_tokens"}
    assert sample("lorax_requests_total", **ended) == 2
    assert sample("lorax_generated_tokens_total", adapter="poet") is None
    assert sample("lorax_generated_tokens_total", adapter="poet+pilot") is None
    await loaded.client.unload_adapter("poet")
    assert sample("lorax_generated_tokens_total", adapter="_composed") == 9


async def test_it_weighs_what_its_heaviest_part_weighs(loaded: Harness) -> None:
    await loaded.client.load_adapter("pilot", weight=5)
    await generate(loaded, {"poet": 1, "pilot": 2})
    assert loaded.engine.commands[0].weight == 5
