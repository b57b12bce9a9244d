"""Every query that is shipped, run by a real Prometheus that scrapes a real server under load."""

from __future__ import annotations

import asyncio
import re
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from deploy.local.prometheus import Prometheus
from deploy.monitoring.durations import shortened
from lorax_serve.client import AsyncClient
from lorax_serve.errors import AdapterNotFound, AdapterRejected, EngineFailed, Overloaded
from lorax_serve.server.app import Server
from tests.e2e.conftest import StartServer
from tests.monitoring.prometheus import needs_prometheus, promtool, running
from tests.monitoring.shipped import (
    ALERTS,
    DASHBOARD,
    MONITORING,
    RECORDS,
    ROOT,
    RULES,
    SHOWN,
    documented,
)

ALL = "all-linear"
PROMPT = "w10 w11 w12 w13 " * 12
TIMES = 60
# A series in an expression, with its labels: what an alert compares must be there, while whether it
# fires is another matter.
SERIES = re.compile(r"\b(?:lorax[:_]|process_)[\w:]+(?:\{[^}]*\})?|\bup\{[^}]*\}")
# tests/cluster asks an Envoy for its metrics.
OF_GATEWAYS = re.compile(r'\benvoy_|job="gateway"')
VARIABLES = {"$job": ".*", "$instance": ".*", "$__rate_interval": "1m"}


@needs_prometheus
@pytest.mark.timeout(300)
async def test_every_query_finds_what_it_asks_for(
    start_server: StartServer, make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    adapters = tmp_path / "adapters"
    for n in range(3):
        make_adapter(f"adapters/a{n}", n, r=4, target_modules=ALL)
    make_adapter("adapters/huge", r=4, lora_alpha=10**38, target_modules=ALL)
    (make_adapter("adapters/bad", target_modules=ALL) / "adapter_model.safetensors").write_text("?")
    size = (adapters / "a0/adapter_model.safetensors").stat().st_size
    # Room for two adapters of three, one request at a time, a queue of two, and a KV cache for
    # less than a batch would like.
    server = await start_server(
        adapters,
        max_adapter_bytes=2 * size,
        max_batch_size=2,
        max_waiting=2,
        max_sequence_length=1024,
        kv_cache_tokens=1056,
    )
    # And one that follows a manifest, with an entry that fails; later it cannot be read at all.
    manifest = tmp_path / "manifest.yaml"
    manifest.write_text("adapters: [{name: a0, source: a0}, {name: nobody, source: nobody}]")
    follow = {"manifest": str(manifest), "watch_seconds": 0.2}
    follows = await start_server(adapters, state=tmp_path / "state", server=follow)
    (tmp_path / "prometheus").mkdir()
    target, other = (f"127.0.0.1:{each.metrics_port}" for each in (server, follows))
    rules = shortened(RULES.read_text(encoding="utf-8"), TIMES)
    async with running(tmp_path / "prometheus", [target, other], rules, 0.5) as prometheus:
        manifest.write_text("adapters: {")
        await prometheus.fires("LoraxManifestUnreadable", instance=other)
        async with client_of(follows) as client:
            await client.generate(PROMPT, adapter="a0", max_new_tokens=2)
        for _ in range(4):
            await traffic(server)
            await asyncio.sleep(1)
        for each in (target, other):
            page = await asyncio.to_thread(scraped, f"http://{each}/metrics")
            promtool("check", "metrics", stdin=page)
        empty = [query for query in must_have_data() if not await prometheus.query(query)]
        assert empty == []
        for alert in ALERTS.values():  # they are taken as they are, too
            await prometheus.query(alert["expr"])
        await everything_happened(prometheus)


def must_have_data() -> list[str]:
    """All of them but those about gateways: none has an excuse under this load."""
    queries = [query for panel in SHOWN.values() for query in panel]
    queries += RECORDS
    queries += documented(ROOT / "docs/runbooks.md") + documented(MONITORING / "README.md")
    queries += [each for alert in ALERTS.values() for each in SERIES.findall(alert["expr"])]
    queries += [each["query"]["query"] for each in DASHBOARD["templating"]["list"][1:]]
    queries = [query for query in queries if not OF_GATEWAYS.search(query)]
    for variable, value in VARIABLES.items():
        queries = [query.replace(variable, value) for query in queries]
    # Grafana's own function, for which it asks for the series.
    return [re.sub(r"^label_values\((.*), \w+\)$", r"\1", query) for query in queries]


async def traffic(server: Server) -> None:
    """Calls of all kinds: with and without adapters, too many, misspelt, NaN, a broken file."""
    options = {"ignore_eos": True, "return_tokens": False}
    async with client_of(server) as client:
        for name in (None, "a0", "a1", "a2"):
            await client.generate(PROMPT, adapter=name, max_new_tokens=20, **options)  # type: ignore[arg-type]
        with pytest.raises(EngineFailed):
            await client.generate(PROMPT, adapter="huge", max_new_tokens=2)
        with pytest.raises(AdapterNotFound):
            await client.generate(PROMPT, adapter="nobody")
        with pytest.raises(AdapterRejected):
            await client.load_adapter("bad")
        many = await asyncio.gather(
            *(client.generate(PROMPT, max_new_tokens=500, **options) for _ in range(8)),  # type: ignore[arg-type]
            return_exceptions=True,
        )
        assert any(isinstance(each, Overloaded) for each in many)
        assert all(
            not isinstance(each, BaseException | None) or isinstance(each, Overloaded)
            for each in many
        )


async def everything_happened(prometheus: Prometheus) -> None:
    """The load was one under which figures are more than zero."""
    for series in (
        "lorax_adapter_evictions_total",
        "lorax_adapters_failed",
        "lorax_adapter_reads_total",
        'lorax_adapter_rejects_total{reason="bad_file"}',
        'lorax_errors_total{code="RESOURCE_EXHAUSTED"}',
        "lorax_manifest_adapters",
        "lorax_manifest_read_errors_total",
        "lorax_preemptions_total",
        "lorax_prefix_cache_hits_total",
        "lorax_requests_failed_total",
    ):
        assert await prometheus.query(f"{series} > 0"), series


def client_of(server: Server) -> AsyncClient:
    return AsyncClient(f"127.0.0.1:{server.port}")


def scraped(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return str(answer.read(), "utf-8")
