"""What the shipped alerts make of a cluster: silence in calm, and word of a killed replica."""

from __future__ import annotations

import asyncio
import time
from typing import Any
from urllib.parse import urlsplit

from deploy.local.cluster import NAMES, TIMES, Cluster
from deploy.local.load import Load, even
from deploy.local.prometheus import NO_PROMETHEUS

__all__ = ["alerts"]

# A quarter of an hour of the rules' time: longer than any of them waits for a replica or a queue.
_CALM_SECONDS = 900 / TIMES
_HEALTHY = 'envoy_cluster_membership_healthy{envoy_cluster_name="lorax"}'


async def alerts(cluster: Cluster) -> dict[str, Any]:
    """A calm while, then a replica is killed, and started again once that is told. Seconds are
    counted from the kill, and from the beginning of the start."""
    prometheus = cluster.prometheus
    if prometheus is None:
        return {"skipped": NO_PROMETHEUS}
    victim = cluster.replicas[1]
    instance = urlsplit(victim.metrics).netloc
    async with Load(cluster.gateway) as load, load.running(even(NAMES, seed=5), at_once=1) as calls:
        await asyncio.sleep(_CALM_SECONDS)
        in_calm, calls_in_calm = await prometheus.fired(_CALM_SECONDS), len(calls.ended)
        serving = len(await prometheus.query("lorax_serving == 1"))  # it is no silence of the deaf
        knowing = await prometheus.query(f"{_HEALTHY} == {len(cluster.replicas)}")
        await asyncio.to_thread(victim.process.kill)
        killed = time.monotonic()
        await prometheus.fires("LoraxReplicaDown", instance=instance)
        told = time.monotonic()
        started = time.monotonic()
        await asyncio.to_thread(victim.start)
        await prometheus.fires("LoraxRestarted", instance=instance)
        await prometheus.silent("LoraxReplicaDown")
        over = time.monotonic()
        after = await prometheus.fired(over - killed)
    return {
        "times_faster": TIMES,
        "calm_seconds": _CALM_SECONDS,
        "calm_calls": calls_in_calm,
        "calm_serving": serving,
        "calm_gateways": len(knowing),
        "fired_in_calm": in_calm,
        "fired_after_kill": after,
        "down_told_seconds": round(told - killed, 1),
        "silent_again_seconds": round(over - started, 1),
    }
