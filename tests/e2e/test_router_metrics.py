"""What a router reads of a real server: which adapters are where, and which have requests."""

from __future__ import annotations

import asyncio
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from lorax_serve.server.app import Server
from tests.e2e.conftest import StartServer
from tests.e2e.test_serving import client_of

PROMPT = "w10 w11 w12 w13"
NAMES = ["a", "b", "c"]


async def scrape(server: Server) -> dict[str, Metric]:
    def get() -> str:
        url = f"http://127.0.0.1:{server.metrics_port}/metrics"
        with urllib.request.urlopen(url, timeout=5) as answer:
            return str(answer.read(), "utf-8")

    text = await asyncio.to_thread(get)
    return {family.name: family for family in text_string_to_metric_families(text)}


def labels(family: Metric) -> list[tuple[str, ...]]:
    return sorted(tuple(sample.labels.values()) for sample in family.samples)


async def test_where_adapters_are_and_which_have_requests(
    start_server: StartServer, make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    for seed, name in enumerate(NAMES):
        make_adapter(name, seed, r=4, target_modules="all-linear")
    server = await start_server(
        tmp_path,
        max_batch_size=1,
        adapter_slots=1,
        max_adapter_bytes=40_000,  # of the tiny model's adapters, two
        server={"vllm_metric_names": True},
    )
    async with client_of(server) as client:
        before = await scrape(server)
        assert not before["lorax_adapter_at_work"].samples
        assert labels(before["vllm:lora_requests_info"]) == [("1", "", "")]

        running = client.stream(PROMPT, adapter="a", max_new_tokens=8000, ignore_eos=True)
        await anext(running)
        waiting = asyncio.create_task(client.generate(PROMPT, adapter="b", max_new_tokens=2))
        again = asyncio.create_task(client.generate(PROMPT, adapter="a", max_new_tokens=2))
        async with asyncio.timeout(20):
            while True:
                now = await scrape(server)
                waits = now["vllm:num_requests_waiting"].samples[0].value
                if waits == 2 and len(now["lorax_adapter_at_work"].samples) == 2:
                    break
        # One that runs is not among those that wait, though it has a request that does.
        assert labels(now["lorax_adapter_at_work"]) == [("a", "running"), ("b", "waiting")]
        (info,) = now["vllm:lora_requests_info"].samples
        assert info.labels == {
            "running_lora_adapters": "a",
            "waiting_lora_adapters": "b",
            "max_lora": "1",
        }
        assert abs(info.value - time.time()) < 30
        assert now["vllm:num_requests_running"].samples[0].value == 1
        for name in ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"):
            assert 0 < now[name].samples[0].value <= 1
        assert labels(now["lorax_adapter_resident"])[0] == ("a", "device")
        await running.aclose()
        await asyncio.gather(waiting, again)
        after = await scrape(server)
        assert not after["lorax_adapter_at_work"].samples
        # What was said before is not said any more.
        assert labels(after["vllm:lora_requests_info"]) == [("1", "", "")]
        # One adapter has left memory for the others, and has no series.
        resident = {name for name, _ in labels(after["lorax_adapter_resident"])}
        by_tier = {s.labels["tier"]: s.value for s in after["lorax_adapters_resident"].samples}
        assert len(resident) == by_tier["host"] < len(NAMES)


async def test_vllm_s_names_are_for_those_who_ask(
    start_server: StartServer, tmp_path: Path
) -> None:
    server = await start_server(tmp_path)
    assert not any(name.startswith("vllm:") for name in await scrape(server))
