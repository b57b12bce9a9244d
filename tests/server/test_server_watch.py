"""Watching adapters over gRPC, over a fake engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest

from lorax_serve.client import AdapterEvent, Unavailable
from lorax_serve.errors import AdapterRejected, Overloaded
from lorax_serve.registry import events
from lorax_serve.registry.events import AdapterWatchers
from tests.server.harness import Harness, until

Told = tuple[str, str, str | None, int | None]


async def take(watch: AsyncIterator[AdapterEvent], number: int) -> list[Told]:
    """Kind, name, state and version of the next events."""
    told: list[Told] = []
    async with asyncio.timeout(5):
        while len(told) < number:
            event = await anext(watch)
            each = event.adapter
            state, version = (each.state, each.version) if each else (None, None)
            told.append((event.kind, event.name, state, version))
    return told


async def test_all_that_is_there_then_every_change(harness: Harness) -> None:
    client = harness.client
    harness.write_adapter("poet", "1")
    await client.load_adapter("poet")
    async with aclosing(client.watch_adapters()) as watch:
        assert await take(watch, 2) == [
            ("present", "poet", "ready", 1),
            ("synced", "", None, None),
        ]
        harness.write_adapter("pilot", "2")
        await client.load_adapter("pilot")
        await client.update_adapter("pilot", weight=2, pinned=True)
        harness.write_adapter("poet", "3")
        await client.load_adapter("poet")
        await client.unload_adapter("pilot")
        harness.write_adapter("pilot", "bad")
        with pytest.raises(AdapterRejected):
            await client.load_adapter("pilot")
        told = await take(watch, 8)
        assert [each for each in told if each[1] == "pilot"] == [
            ("loaded", "pilot", "ready", 2),
            ("changed", "pilot", "ready", 2),
            ("changed", "pilot", "draining", 2),
            ("unloaded", "pilot", "draining", 2),
            ("refused", "pilot", None, None),
        ]
        assert [each for each in told if each[1] == "poet"] == [
            ("changed", "poet", "draining", 1),
            ("loaded", "poet", "ready", 3),
            ("unloaded", "poet", "draining", 1),
        ]


async def test_an_event_is_as_it_was_then(harness: Harness) -> None:
    async with aclosing(harness.client.watch_adapters()) as watch:
        await take(watch, 1)
        harness.write_adapter("poet", "1")
        await harness.client.load_adapter("poet", pinned=True)
        await harness.client.update_adapter("poet", weight=9, pinned=False)
        first, second = [(await anext(watch)).adapter for _ in range(2)]
        assert first is not None
        assert second is not None
        assert [(each.weight, each.pinned) for each in (first, second)] == [(1, True), (9, False)]


async def test_one_name_only(harness: Harness) -> None:
    for name in ("poet", "pilot"):
        harness.write_adapter(name, name)
        await harness.client.load_adapter(name)
    async with aclosing(harness.client.watch_adapters("pilot")) as watch:
        assert [name for _, name, *_ in await take(watch, 2)] == ["pilot", ""]
        await harness.client.unload_adapter("poet")
        await harness.client.unload_adapter("pilot")
        assert [name for _, name, *_ in await take(watch, 2)] == ["pilot", "pilot"]


async def test_why_a_load_was_refused(harness: Harness) -> None:
    async with aclosing(harness.client.watch_adapters()) as watch:
        await take(watch, 1)
        harness.write_adapter("poet", "bad")
        with pytest.raises(AdapterRejected):
            await harness.client.load_adapter("poet")
        event = await anext(watch)
    assert (event.kind, event.name, event.reason) == ("refused", "poet", "shape_mismatch")
    assert "rank 5" in event.message


async def test_a_watch_ends_with_its_caller_and_with_the_server(harness: Harness) -> None:
    watchers = harness.server._adapters.watchers
    watch = harness.client.watch_adapters()
    await take(watch, 1)
    assert len(watchers) == 1
    await watch.aclose()
    await until(lambda: len(watchers) == 0)
    watch = harness.client.watch_adapters()
    await take(watch, 1)
    stopping = asyncio.create_task(harness.server.stop())
    with pytest.raises(Unavailable, match="shutting down"):
        await take(watch, 1)
    await stopping


async def test_a_watcher_that_does_not_read_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "_MOST_UNREAD", 4)
    watchers = AdapterWatchers()
    slow, quick = watchers.watch([]), watchers.watch([])
    await anext(slow)
    await anext(quick)
    for number in range(6):
        watchers.refused(f"a{number}", Overloaded("full"))
        assert (await anext(quick)).name == f"a{number}"
    with pytest.raises(Overloaded, match="watch again"):
        await anext(slow)
    assert len(watchers) == 1
