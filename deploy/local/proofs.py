"""What routing promises, measured on a running cluster: figures, which ``promises`` judges."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from deploy.local.cluster import NAMES, SPARE, WATCH_SECONDS, Cluster
from deploy.local.load import Calls, Load, even, power_law
from deploy.local.processes import wait_until
from deploy.local.replica import Replica
from deploy.local.service import Service
from lorax_serve.client import AsyncClient
from lorax_serve.errors import LoraxError

__all__ = [
    "AT_ONCE",
    "CALLS",
    "SEED",
    "WARM_CALLS",
    "WARM_SEED",
    "adapter_loads",
    "affinity",
    "gateway_drain",
    "kill",
    "manifest",
    "rolling_restart",
    "rolling_upgrade",
]

# Tokens that take seconds, and almost all that a sequence may have.
_LONG = 8000
WARM_CALLS, WARM_SEED = 600, 3
CALLS, SEED = 2500, 4
AT_ONCE = 6
"""What ``adapter_loads`` asks for, which the simulation asks for too."""
_READS = "lorax_adapter_reads_total"


async def affinity(cluster: Cluster, calls: int = 600) -> dict[str, Any]:
    """60 adapters, each as busy as the others: in calm (one call at a time), and busier. By how
    many calls are made at once: the share that the adapter's replica in calm has answered, and what
    the busiest replica has answered over the mean."""
    figures: dict[str, Any] = {"calls": 0, "failed": 0, "at_home": {}, "busiest_over_mean": {}}
    homes: dict[str, str] = {}
    for at_once in (1, 6, 48):
        async with Load(cluster.gateway) as load:
            done = await load.run(even(NAMES, seed=at_once), calls, at_once)
        homes = homes or done.homes()
        at_home = sum(call.replica == homes.get(call.adapter) for call in done.ended)
        figures["calls"] += len(done.ended)
        figures["failed"] += len(done.failed)
        figures["at_home"][at_once] = round(at_home / len(done.ended), 4)
        busiest = max(done.by_replica().values())
        figures["busiest_over_mean"][at_once] = round(busiest * len(cluster.replicas) / calls, 3)
    figures["adapters_by_replica"] = sorted(Counter(homes.values()).values())
    return figures


async def rolling_restart(cluster: Cluster) -> dict[str, Any]:
    """Every replica is stopped and started again at its address, one after the other, under load:
    short streams, and some that are long enough to run when their replica is told to stop. The name
    server does not know: nobody has said anywhere that one goes."""
    return await _while_changing(cluster, cluster.restart)


async def rolling_upgrade(cluster: Cluster) -> dict[str, Any]:
    """The same, but each is replaced by a new one at another address, with an empty disk."""
    old = sorted(replica.name for replica in cluster.replicas)
    found = await _while_changing(cluster, cluster.replace)
    new = sorted(replica.name for replica in cluster.replicas)
    return {**found, "replaced": old, "replicas": new}


async def _while_changing(cluster: Cluster, change: Callable[[Replica], object]) -> dict[str, Any]:
    async with (
        Load(cluster.gateway) as load,
        load.running(even(NAMES), at_once=4) as short,
        load.running(even(NAMES, seed=1), at_once=3, tokens=1500) as long,
    ):
        await asyncio.sleep(1)
        for replica in list(cluster.replicas):
            await asyncio.to_thread(change, replica)
            await asyncio.sleep(2)
        before = len(short.ended)
        await asyncio.sleep(2)
    both = Calls(short.ended + long.ended)
    return {
        "calls": len(short.ended),
        "long_streams": len(long.ended),
        "failed": len(both.failed),
        "errors": both.errors,
        "details": both.details,
        "answered_at_the_end_by": sorted(Calls(short.ended[before:]).by_replica()),
    }


async def gateway_drain(cluster: Cluster) -> dict[str, Any]:
    """One of two gateways behind a Service goes as Kubernetes lets it, under load."""
    first, second, _ = cluster.gateways
    async with (
        Service([first.address]) as service,
        Load(service.address) as load,
        load.running(even(NAMES), at_once=4) as short,
        load.running(even(NAMES, seed=1), at_once=3, tokens=_LONG) as long,
    ):
        await asyncio.sleep(1)
        service.addresses = [first.address, second.address]
        began = time.monotonic()
        draining = asyncio.create_task(asyncio.to_thread(first.drain, 60))
        await asyncio.sleep(2)  # until all nodes have heard of it
        service.addresses = [second.address]
        await draining
        drained = time.monotonic()
        code = await asyncio.to_thread(first.process.stop)
        await asyncio.sleep(2)
        after = sum(call.started > drained for call in short.ended)
    first.process.start()
    await asyncio.to_thread(wait_until, lambda: first.healthy() == 3, first.process)
    calls = Calls(short.ended + long.ended)
    return {
        "calls": len(short.ended),
        "long_streams": len(long.ended),
        "failed": len(calls.failed),
        "errors": calls.errors,
        "details": calls.details,
        "drain_seconds": round(drained - began, 1),
        "exit_code": code,
        "calls_after": after,
    }


async def kill(cluster: Cluster) -> dict[str, Any]:
    """A replica is killed while long streams run on all, and short ones come all the time."""
    async with Load(cluster.gateway) as load:
        homes = (await load.run(even(NAMES), 400, at_once=4)).homes()
        victim = cluster.replicas[1]
        # One after the other, two for each replica in turn: none is ever too busy for its own.
        mine = [[n for n in NAMES if homes.get(n) == each.name] for each in cluster.replicas]
        chosen = [names[turn] for turn in range(2) for names in mine]
        streams = []
        for name in chosen:
            streams.append(asyncio.create_task(load.call(name, _LONG, 120.0)))
            await asyncio.sleep(0.05)
        async with load.running(even(NAMES, seed=2), at_once=3) as short:
            await asyncio.sleep(0.3)
            await asyncio.to_thread(victim.process.kill)
            killed = time.monotonic()
            await asyncio.sleep(8)
        long = Calls(list(await asyncio.gather(*streams)))
        after = await load.run(even(NAMES), 400, at_once=4)
    await asyncio.to_thread(victim.start)
    failed = long.failed + short.failed
    moved = {call.adapter for call in after.ended if homes.get(call.adapter) == victim.name}
    return {
        "victim": victim.name,
        "long_streams": len(long.ended),
        "long_failed": len(long.failed),
        "long_failed_elsewhere": sum(homes[call.adapter] != victim.name for call in long.failed),
        "long_of_victim": sum(homes[name] == victim.name for name in chosen),
        "short_calls": len(short.ended),
        "short_failed": len(short.failed),
        # Those that were running then have failed, and no other.
        "failed_begun_later": sum(call.started > killed for call in failed),
        "errors": Calls(short.ended + long.ended).errors,
        "last_failure_seconds": round(max((c.ended for c in failed), default=killed) - killed, 2),
        "after_failed": len(after.failed),
        "adapters_moved": len(moved),
        "answered_by": sorted(after.by_replica()),
    }


async def manifest(cluster: Cluster) -> dict[str, Any]:
    """An adapter is added beside one that is broken, and another one is taken out."""
    entries = [cluster.entry(name) for name in NAMES]
    broken = {"name": "broken", "source": "s3://adapters/all/nobody"}
    cluster.manifest.write([broken, *entries[:-1], cluster.entry(SPARE)])
    began = time.monotonic()
    seconds: dict[str, float] = {}

    async def follow(replica: Replica) -> tuple[float, float, list[str]]:
        async with AsyncClient(replica.address) as client:
            added = await _until(began, lambda: _serves(client, SPARE))
            gone = await _until(began, lambda: _serves(client, NAMES[-1]), wanted=False)
            return added, gone, [each.name for each in await client.list_failed_adapters()]

    found = await asyncio.gather(*(follow(replica) for replica in cluster.replicas))
    seconds = {"added": max(each[0] for each in found), "taken_out": max(e[1] for e in found)}
    async with Load(cluster.gateway) as load:
        others = await load.run(even(NAMES[:-1]), 200, at_once=4)
    cluster.manifest.write(entries)
    async with AsyncClient(cluster.replicas[0].address) as client:
        await _until(time.monotonic(), lambda: _serves(client, NAMES[-1]))
    return {
        "intervals": {name: round(each / WATCH_SECONDS, 2) for name, each in seconds.items()},
        "told_of": [each[2] for each in found],
        "others_failed": len(others.failed),
    }


async def adapter_loads(cluster: Cluster) -> dict[str, Any]:
    """Reads of adapters into memory, for the same requests with and without affinity. Some are much
    more popular than others; a replica's memory holds 26 of 60."""
    loads: dict[str, float] = {}
    for name, target in (("round_robin", cluster.round_robin), ("ring_hash", cluster.gateway)):
        async with Load(target) as load:
            # The same requests once before, so that neither begins with what the other has left.
            await load.run(power_law(NAMES, seed=WARM_SEED), WARM_CALLS, AT_ONCE, tokens=4)
            before = await _reads(cluster)
            done = await load.run(power_law(NAMES, seed=SEED), CALLS, AT_ONCE, tokens=4)
            loads[name] = await _reads(cluster) - before
            loads[f"{name}_failed"] = len(done.failed)
            loads[f"{name}_busiest_over_mean"] = round(
                max(done.by_replica().values()) * len(cluster.replicas) / CALLS, 3
            )
    ratio = loads["round_robin"] / max(1.0, loads["ring_hash"])
    return {"calls": CALLS, **loads, "times_fewer": round(ratio, 1)}


async def _reads(cluster: Cluster) -> float:
    scraped = (asyncio.to_thread(each.scrape, _READS) for each in cluster.replicas)
    return sum(await asyncio.gather(*scraped))


async def _serves(client: AsyncClient, name: str) -> bool:
    try:
        await client.generate("w10", adapter=name, max_new_tokens=1)
    except LoraxError:
        return False
    return True


async def _until(began: float, ask: Callable[[], Any], *, wanted: bool = True) -> float:
    """Seconds from ``began`` until the answer is the one that is wanted."""
    async with asyncio.timeout(30):
        while await ask() is not wanted:  # noqa: ASYNC110 - it has to be asked
            await asyncio.sleep(0.1)
    return time.monotonic() - began
