"""Alerts that fire in a real Prometheus when something happens to real servers, and are silent when
nothing does. The rules are the shipped ones, 20 times faster."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from deploy.local.processes import free_port
from deploy.local.prometheus import Prometheus
from deploy.monitoring.durations import shortened
from lorax_serve.client import AsyncClient
from lorax_serve.errors import LoraxError
from tests.e2e.process import start_process
from tests.monitoring.prometheus import needs_prometheus, running
from tests.monitoring.shipped import RULES

pytestmark = [needs_prometheus, pytest.mark.slow, pytest.mark.timeout(600)]

ALL = "all-linear"
HOST = "127.0.0.1"
PROMPT = "w10 w11 w12 w13"
TIMES = 20


@dataclass
class Replica:
    """A server that comes back at the same addresses."""

    model: Path
    source: Path
    state: Path
    port: int
    metrics_port: int
    process: subprocess.Popen[str] | None = None

    @property
    def instance(self) -> str:
        return f"127.0.0.1:{self.metrics_port}"

    def client(self) -> AsyncClient:
        return AsyncClient(f"127.0.0.1:{self.port}")

    async def start(self) -> None:
        settings = {
            "--port": self.port,
            "--metrics-port": self.metrics_port,
            "--load-on-demand": "off",
            "--watch-seconds": 1,
            "--max-batch-size": 2,
            "--max-waiting": 8,
            "--threads": 1,
        }
        flags = [str(word) for pair in settings.items() for word in pair]
        self.process, client = await start_process(self.model, self.source, self.state, *flags)
        await client.close()

    def engine(self) -> psutil.Process:
        assert self.process is not None
        children = psutil.Process(self.process.pid).children()
        (engine,) = (each for each in children if "spawn_main" in " ".join(each.cmdline()))
        return engine

    def kill(self) -> None:
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@asynccontextmanager
async def watched(
    model: Path, place: Path, count: int
) -> AsyncIterator[tuple[Prometheus, list[Replica]]]:
    """Replicas that serve what is in ``place/source``, under a Prometheus."""
    replicas = [
        Replica(model, place / "source", place / f"state{n}", free_port(HOST), free_port(HOST))
        for n in range(count)
    ]
    (place / "prometheus").mkdir()
    rules = shortened(RULES.read_text(encoding="utf-8"), TIMES)
    targets = [each.instance for each in replicas]
    try:
        for each in replicas:
            await each.start()
        async with running(place / "prometheus", targets, rules) as prometheus:
            scraped = "count_over_time(lorax_serving[1m]) > 1"
            while len(await prometheus.query(scraped)) < count:  # noqa: ASYNC110 - it has no event
                await asyncio.sleep(0.2)
            yield prometheus, replicas
    finally:
        for each in replicas:
            each.kill()


@contextlib.asynccontextmanager
async def asking(
    replica: Replica, streams: int, pause: float = 0, tokens: int = 2000
) -> AsyncIterator[None]:
    """So many clients, each of which sends one request after the other, whatever happens."""

    async def ask(client: AsyncClient) -> None:
        while True:
            with contextlib.suppress(LoraxError):
                await client.generate(PROMPT, max_new_tokens=tokens, ignore_eos=True)
            await asyncio.sleep(pause)

    async with replica.client() as client:
        tasks = [asyncio.create_task(ask(client)) for _ in range(streams)]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)


@contextmanager
def stopped(process: psutil.Process) -> Iterator[None]:
    """It does nothing for a while."""
    process.suspend()
    try:
        yield
    finally:
        process.resume()


async def test_a_calm_run_is_silent(
    tiny_model: Path, make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    for n in range(3):
        make_adapter(f"source/a{n}", n, r=4, target_modules=ALL)
    async with watched(tiny_model, tmp_path, 2) as (prometheus, replicas):
        async with asking(replicas[0], 1, 0.05, 20), asking(replicas[1], 1, 0.05, 20):
            for n in range(45):  # a quarter of an hour of the rules' time
                async with replicas[n % 2].client() as client:
                    await client.generate(PROMPT, adapter=f"a{n % 3}", max_new_tokens=5)
                assert await prometheus.firing() == {}
                await asyncio.sleep(1)
        # It was no silence of the deaf.
        assert await prometheus.query("lorax:slo_missed:ratio5m < 0.01")
        assert await prometheus.query("sum(lorax_serving) == 2")


async def test_what_happens_to_replicas_is_told(
    tiny_model: Path, make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    make_adapter("source/a0", r=4, target_modules=ALL)
    async with watched(tiny_model, tmp_path, 2) as (prometheus, (one, two)):
        # An engine that dies takes its server with it, which is started again.
        one.engine().kill()
        await prometheus.fires("LoraxReplicaDown", instance=one.instance)
        assert "LoraxNoReplica" not in await prometheus.firing()
        assert one.process is not None
        assert one.process.wait(20) == 1
        await asyncio.gather(one.start(), prometheus.fires("LoraxRestarted", instance=one.instance))
        await prometheus.silent("LoraxReplicaDown")
        # An engine that hangs is told of by its server, which lives.
        async with asking(two, 1):
            await asyncio.sleep(1)
            with stopped(two.engine()):
                await prometheus.fires("LoraxEngineStalled", instance=two.instance)
        for each in (one, two):
            each.kill()
        await prometheus.fires("LoraxNoReplica", job="lorax")


async def test_a_queue_and_refusals_are_told(
    tiny_model: Path, make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    make_adapter("source/a0", r=4, target_modules=ALL)
    async with watched(tiny_model, tmp_path, 1) as (prometheus, (one,)):
        async with asking(one, 8, tokens=400):
            await prometheus.fires("LoraxQueueBacklog", instance=one.instance)
            assert "LoraxOverload" not in await prometheus.firing()
            async with asking(one, 4, pause=0.02):
                await prometheus.fires("LoraxOverload", job="lorax")
        await prometheus.silent("LoraxQueueBacklog")
        await prometheus.silent("LoraxOverload")


async def test_adapters_that_fail_are_told(
    tiny_model: Path, make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    make_adapter("source/huge", r=4, lora_alpha=10**38, target_modules=ALL)
    async with watched(tiny_model, tmp_path, 1) as (prometheus, (one,)):
        async with one.client() as client:
            with pytest.raises(LoraxError, match="nobody"):
                await client.generate(PROMPT, adapter="nobody")
            with pytest.raises(LoraxError, match="not finite"):
                await client.generate(PROMPT, adapter="huge")
        await prometheus.fires("LoraxRequestsFail", instance=one.instance)
        assert set(await prometheus.firing()) == {"LoraxRequestsFail"}
        bad = make_adapter("bad", r=4, target_modules=ALL)
        (bad / "adapter_model.safetensors").write_bytes(b"?")
        bad.rename(tmp_path / "source/bad")
        await prometheus.fires("LoraxAdapterLoadFailed", reason="bad_file", instance=one.instance)
        # It was refused once, and is lacking until somebody takes it out.
        await prometheus.fires("LoraxAdaptersFailed", 90, instance=one.instance)
        (tmp_path / "source/bad").rename(tmp_path / "bad")
        await prometheus.silent("LoraxAdaptersFailed")
