"""AdapterService over gRPC: load, replace, unload, list."""

from __future__ import annotations

import asyncio

import pytest

from lorax_serve.core import Freed
from lorax_serve.errors import (
    AdapterConflict,
    AdapterNotFound,
    AdapterRejected,
    InvalidRequest,
    RejectReason,
)
from tests.server.harness import Harness, stream_request, until


async def test_load_use_and_unload(harness: Harness) -> None:
    harness.write_adapter("poet", "verses")
    loaded = await harness.client.load_adapter("poet")
    assert (loaded.name, loaded.version, loaded.state) == ("poet", 1, "ready")
    assert (loaded.rank, loaded.module_count, loaded.host_bytes) == (8, 14, len("verses"))
    result = await harness.client.generate("one </s>", adapter="poet")
    assert (result.adapter, result.adapter_version) == ("poet", 1)
    assert result.adapter_digest == loaded.digest
    assert harness.engine.commands[0].adapter == 1
    (listed,) = await harness.client.list_adapters()
    assert (listed.active_requests, listed.total_requests) == (0, 1)
    assert listed.last_used >= loaded.last_used
    assert await harness.client.unload_adapter("poet") == Freed(host=1001)
    assert await harness.client.list_adapters() == []
    with pytest.raises(AdapterNotFound, match="'poet' is not loaded"):
        await harness.client.generate("one", adapter="poet")


async def test_a_replacement_is_for_new_requests_only(harness: Harness) -> None:
    harness.write_adapter("poet", "old")
    harness.write_adapter("poet-2", "new")
    await harness.client.load_adapter("poet")
    harness.engine.paused = True
    request = stream_request(max_new_tokens=2)
    request.adapter_id = "poet"
    running = harness.generation.GenerateStream(request)
    await until(lambda: harness.engine.in_flight == 1)
    assert (await harness.client.load_adapter("poet", "poet-2")).version == 2
    states = {each.version: each.state for each in await harness.client.list_adapters()}
    assert states == {1: "draining", 2: "ready"}
    harness.engine.paused = False
    assert (await running.read()).adapter_version == 1
    assert (await harness.client.generate("one </s>", adapter="poet")).adapter_version == 2
    await until(lambda: harness.engine.dropped == [1])
    assert [each.version for each in await harness.client.list_adapters()] == [2]


async def test_unloading_waits_for_the_last_request(harness: Harness) -> None:
    harness.write_adapter("poet")
    await harness.client.load_adapter("poet")
    harness.engine.paused = True
    request = stream_request(max_new_tokens=3)
    request.adapter_id = "poet"
    running = harness.generation.GenerateStream(request)
    await until(lambda: harness.engine.in_flight == 1)
    unloading = asyncio.create_task(harness.client.unload_adapter("poet"))
    await until(lambda: harness.server.adapters[0].state.value == "draining")
    with pytest.raises(AdapterNotFound):
        await harness.client.generate("one", adapter="poet")
    assert not unloading.done()
    assert harness.engine.dropped == []
    harness.engine.paused = False
    messages = [message async for message in running]
    assert messages[-1].generated_token_count == 3
    assert await unloading == Freed(host=1001)


async def test_refusals(harness: Harness) -> None:
    harness.write_adapter("broken", "bad")
    with pytest.raises(AdapterRejected, match="rank 5") as caught:
        await harness.client.load_adapter("broken")
    assert caught.value.reason is RejectReason.SHAPE_MISMATCH
    with pytest.raises(AdapterRejected, match="no directory") as caught:
        await harness.client.load_adapter("missing")
    assert caught.value.reason is RejectReason.MISSING_FILE
    for path in ("..", "/etc", "a/../../b"):
        with pytest.raises(InvalidRequest, match="outside"):
            await harness.client.load_adapter("poet", path)
    for name in ("", "_base", "a/b", "ü", "x" * 129):
        with pytest.raises(InvalidRequest, match="not a valid name"):
            await harness.client.load_adapter(name)
    with pytest.raises(AdapterNotFound):
        await harness.client.unload_adapter("x" * 100_000)
    assert await harness.client.list_adapters() == []


async def test_a_name_that_is_loading_cannot_be_loaded(harness: Harness) -> None:
    harness.write_adapter("poet")
    harness.engine.loads_open.clear()
    first = asyncio.create_task(harness.client.load_adapter("poet"))
    await until(lambda: harness.engine.loads == ["poet"])
    with pytest.raises(AdapterConflict, match="being loaded by another call"):
        await harness.client.load_adapter("poet")
    harness.engine.loads_open.set()
    assert (await first).state == "ready"


async def test_a_weight_is_kept_until_it_is_changed(harness: Harness) -> None:
    harness.write_adapter("poet", "old")
    assert (await harness.client.load_adapter("poet")).weight == 1
    assert (await harness.client.load_adapter("poet", weight=3)).version == 1
    harness.write_adapter("poet", "new")
    replaced = await harness.client.load_adapter("poet")
    assert (replaced.version, replaced.weight) == (2, 3)
    await harness.client.generate("one </s>", adapter="poet")
    await harness.client.generate("one </s>")
    assert [command.weight for command in harness.engine.commands] == [3, 1]
    for weight in (0, 101):
        with pytest.raises(InvalidRequest, match=rf"weight must be in \[1, 100\], found {weight}"):
            await harness.client.load_adapter("poet", weight=weight)
    (listed,) = await harness.client.list_adapters()
    assert listed.weight == 3
