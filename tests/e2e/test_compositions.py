"""Several adapters in one request, over real gRPC, against the sum that PEFT writes as one."""

from __future__ import annotations

import asyncio
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lorax_serve.client import AppliedAdapter, AsyncClient, Generation
from lorax_serve.core import Freed
from lorax_serve.errors import AdapterNotFound, AdapterRejected, RejectReason
from lorax_serve.store.digest import digest_of
from tests.e2e.conftest import StartServer
from tests.e2e.test_serving import ALL, LONG, PROMPT, client_of, integrity, text_of, until_idle

Make = Callable[..., Path]
Scales = dict[str, float]
AB: Scales = {"a": 0.8, "b": -0.6}
FEW: dict[str, Any] = {"max_new_tokens": 24, "ignore_eos": True}
MANY: dict[str, Any] = {"max_new_tokens": LONG, "ignore_eos": True}


def save_sum(model: Path, parts: dict[Path, float], place: Path) -> None:
    """Have PEFT write the weighted sum of adapters as one adapter ``place``."""
    auto: Any = AutoModelForCausalLM
    base = auto.from_pretrained(model, dtype=torch.float32)
    names = [path.name for path in parts]
    first, *others = parts
    peft_model = PeftModel.from_pretrained(base, first, adapter_name=first.name)
    for path in others:
        peft_model.load_adapter(path, adapter_name=path.name)
    scales = list(parts.values())
    peft_model.add_weighted_adapter(names, scales, place.name, combination_type="cat")
    peft_model.save_pretrained(place.parent, selected_adapters=[place.name])


@pytest.fixture
def a(make_adapter: Make) -> Path:
    return make_adapter("a", 1, r=4, lora_alpha=6, target_modules=ALL)


@pytest.fixture
def b(make_adapter: Make) -> Path:
    return make_adapter("b", 2, r=9, use_rslora=True, target_modules=["q_proj", "down_proj"])


def parts_of(answer: Generation) -> list[tuple[str, str, float]]:
    return [(each.name, each.digest, each.scale) for each in answer.adapters]


async def test_tokens_are_those_of_the_sum_that_peft_writes(
    start_server: StartServer, tiny_model: Path, a: Path, b: Path, tmp_path: Path
) -> None:
    scales: list[Scales] = [AB, {"a": 1, "b": 1}, {"a": -2, "b": 0.5}]
    for n, each in enumerate(scales):
        save_sum(tiny_model, {a: each["a"], b: each["b"]}, tmp_path / f"sum{n}")
    server = await start_server(tmp_path)
    assert server.refused == {}
    async with client_of(server) as client:
        singles: list[Any] = [None, "a", "b", {"a": 1}, {"a": -1}, {"b": 0}]
        named: list[Any] = [*scales, *(f"sum{n}" for n in range(3)), *singles]
        alone = [await client.generate(PROMPT, adapter=each, **FEW) for each in named]
        streams = [client.stream(PROMPT, adapter=each, **FEW) for each in named * 2]
        together = await asyncio.gather(*(text_of(stream) for stream in streams))
    texts = [answer.text for answer in alone]
    assert together == texts * 2
    assert texts[:3] == texts[3:6]
    base, one, two, same_as_one, minus_one, same_as_base = texts[6:]
    assert (same_as_one, same_as_base) == (one, base)
    assert len({*texts[:3], base, one, two, minus_one}) == 7
    assert await integrity(server) == ()


async def test_answers_say_what_was_applied(
    start_server: StartServer, a: Path, b: Path, tmp_path: Path
) -> None:
    server = await start_server(tmp_path)
    async with client_of(server) as client:
        versions = {each.name: each.version for each in await client.list_adapters()}
        whole = await client.generate(PROMPT, adapter=AB, **FEW)
        assert whole.adapters == (
            AppliedAdapter("a", versions["a"], digest_of(a), 0.8),
            AppliedAdapter("b", versions["b"], digest_of(b), -0.6),
        )
        assert whole.adapter is whole.adapter_digest is None
        stream = client.stream(PROMPT, adapter=AB, **FEW)
        assert (await anext(stream)).adapters == whole.adapters
        await stream.aclose()
        page = await asyncio.to_thread(
            lambda: urllib.request.urlopen(f"http://127.0.0.1:{server.metrics_port}/metrics").read()
        )
    assert b'lorax_generated_tokens_total{adapter="_composed"}' in page


async def test_a_new_version_of_a_part_is_for_the_next_request(
    start_server: StartServer, make_adapter: Make, a: Path, b: Path, tmp_path: Path
) -> None:
    better = make_adapter("better", 3, r=2, target_modules=ALL)
    server = await start_server(tmp_path)
    async with client_of(server) as client:
        old = await client.generate(PROMPT, adapter=AB, **MANY)
        stream = client.stream(PROMPT, adapter=AB, **MANY)
        first = await anext(stream)
        await client.load_adapter("b", "better")
        new = await client.generate(PROMPT, adapter=AB, **FEW)
        same = await client.generate(PROMPT, adapter={"a": 0.8, "better": -0.6}, **FEW)
        assert first.text + await text_of(stream) == old.text
        assert (
            parts_of(first)
            == parts_of(old)
            == [("a", digest_of(a), 0.8), ("b", digest_of(b), -0.6)]
        )
        assert parts_of(new) == [("a", digest_of(a), 0.8), ("b", digest_of(better), -0.6)]
        assert new.text == same.text
        assert not old.text.startswith(new.text)
        await until_idle(server)
        assert await integrity(server) == ()


async def test_earlier_versions_can_be_added_up_and_rolled_back_to(
    start_server: StartServer, make_adapter: Make, a: Path, b: Path, tmp_path: Path
) -> None:
    better = make_adapter("better", 3, r=2, target_modules=ALL)
    server = await start_server(tmp_path, state=tmp_path / "state")
    async with client_of(server) as client:
        old = await client.generate(PROMPT, adapter=AB, **FEW)
        await client.load_adapter("b", "better")
        new = await client.generate(PROMPT, adapter=AB, **FEW)
        assert new.text != old.text
        pinned = f"b@{digest_of(b)[:12]}"
        again = await client.generate(PROMPT, adapter={"a": 0.8, pinned: -0.6}, **FEW)
        assert (again.text, parts_of(again)) == (old.text, parts_of(old))
        both = {"a": 0.8, pinned: -0.6, "b": 1}
        assert parts_of(await client.generate(PROMPT, adapter=both, **FEW)) == [
            ("a", digest_of(a), 0.8),
            ("b", digest_of(b), -0.6),
            ("b", digest_of(better), 1.0),
        ]
        back = await client.roll_back_adapter("b")
        now = await client.generate(PROMPT, adapter=AB, **FEW)
        assert (now.text, now.adapters[1].version) == (old.text, back.version)
        for name in ("a", "b", "better"):
            await asyncio.wait_for(client.unload_adapter(name), 10)
        await until_idle(server)
        assert await integrity(server) == ()
        assert server.stats.adapters.known == server.stats.adapters.host_bytes == 0


async def test_the_same_prompt_under_two_scales_shares_no_keys_and_values(
    start_server: StartServer, a: Path, b: Path, tmp_path: Path
) -> None:
    prompt = [3 + 7 * n % 120 for n in range(100)]
    named: list[Any] = [AB, {"a": 0.8, "b": 0.6}, "a", {"a": 0.8}, None, AB]
    cached = await start_server(tmp_path)
    fresh = await start_server(tmp_path, prefix_caching=False)
    async with client_of(cached) as client, client_of(fresh) as other:
        hits = []
        for each in named:
            before = cached.stats.prefix_cache_hits
            answer = await client.generate(prompt, adapter=each, **FEW)
            assert answer.text == (await other.generate(prompt, adapter=each, **FEW)).text
            await until_idle(cached)
            hits.append(cached.stats.prefix_cache_hits - before)
    assert hits[:-1] == [0] * 5
    assert hits[-1] >= 64, "the first one's are found again"


async def test_unloading_a_part_waits_for_the_stream(
    start_server: StartServer, a: Path, b: Path, tmp_path: Path
) -> None:
    server = await start_server(tmp_path)
    async with client_of(server) as client:
        whole = await client.generate(PROMPT, adapter=AB, **MANY)
        stream = client.stream(PROMPT, adapter=AB, **MANY)
        first = await anext(stream)
        unload = asyncio.create_task(client.unload_adapter("a"))
        await asyncio.sleep(0.05)
        assert not unload.done()
        with pytest.raises(AdapterNotFound, match="'a' is not loaded; loaded: b"):
            await client.generate(PROMPT, adapter=AB)
        states = {each.name: each for each in await client.list_adapters()}
        assert (states["a"].state, states["a"].active_requests) == ("draining", 1)
        assert (states["b"].state, states["b"].active_requests) == ("ready", 1)
        assert first.text + await text_of(stream) == whole.text
        assert await unload != Freed()
        await until_idle(server)
        (left,) = await client.list_adapters()
        assert (left.name, left.active_requests) == ("b", 0)
        tiers = server.stats.adapters
        assert (tiers.known, tiers.host_bytes) == (1, left.host_bytes)
        assert await integrity(server) == ()


async def test_more_than_lora_is_refused_by_name(
    start_server: StartServer, make_adapter: Make, a: Path, tmp_path: Path
) -> None:
    make_adapter("dora", r=4, use_dora=True, target_modules=["q_proj"])
    server = await start_server(tmp_path)
    async with client_of(server) as client:
        for scales in ({"a": 1.0, "dora": 1.0}, {"dora": 0.5}):
            with pytest.raises(AdapterRejected, match="adapter 'dora' has DoRA: only") as caught:
                await client.generate(PROMPT, adapter=scales)
            assert caught.value.reason is RejectReason.UNSUPPORTED
        alone = await client.generate(PROMPT, adapter="dora", **FEW)
        assert alone.adapter == "dora"
        assert {each.active_requests for each in await client.list_adapters()} == {0}
        assert server.stats.adapters.known == 2


async def test_more_compositions_than_slots_and_memory(
    start_server: StartServer, make_adapter: Make, tmp_path: Path
) -> None:
    """Many at once, some of which go away."""
    for seed, name in enumerate("abcd"):
        make_adapter(name, seed, r=2 + seed, target_modules=ALL)
    named: list[Any] = [None, *"abcd"]
    named += [{x: 1.0, y: s} for x in "abc" for y in "bcd" if x < y for s in (1.0, -0.5)]
    large = await start_server(tmp_path)
    async with client_of(large) as client:
        wanted = [(await client.generate(PROMPT, adapter=each, **FEW)).text for each in named]
        largest = max(each.host_bytes for each in await client.list_adapters())
    assert len(set(wanted)) == len(named)
    small = await start_server(
        tmp_path, adapter_slots=3, max_batch_size=6, max_adapter_bytes=6 * largest
    )

    async def abandoned(client: AsyncClient, each: Any, seconds: float) -> None:
        task = asyncio.create_task(client.generate(PROMPT, adapter=each, **MANY))
        await asyncio.sleep(seconds)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async with client_of(small) as client:
        async with asyncio.TaskGroup() as group:
            for n, each in enumerate(named):
                group.create_task(abandoned(client, each, n % 5 * 0.02))
            asked = [
                group.create_task(client.generate(PROMPT, adapter=each, **FEW))
                for each in named * 3
            ]
        assert [task.result().text for task in asked] == wanted * 3
        await until_idle(small)
        assert await integrity(small) == ()
        tiers = small.stats.adapters
        assert tiers.host_bytes <= 6 * largest
        assert tiers.reads > 0
        for name in "abcd":
            await asyncio.wait_for(client.unload_adapter(name), 10)
        assert await integrity(small) == ()
        tiers = small.stats.adapters
        assert (tiers.known, tiers.host, tiers.device, tiers.host_bytes) == (0, 0, 0, 0)
