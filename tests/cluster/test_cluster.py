"""What docs/routing.md promises, on real replicas behind the gateway's own configuration."""

from __future__ import annotations

import pytest

from deploy.local import proofs
from deploy.local.alerts import alerts
from deploy.local.cluster import Cluster

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


async def test_an_adapter_s_requests_stick_to_one_replica(cluster: Cluster) -> None:
    found = await proofs.affinity(cluster)
    assert found["failed"] == 0
    assert found["at_home"][1] >= 0.95
    # Busier ones pass calls on, so that none has more than 1.5 times the mean.
    assert found["at_home"][48] >= 0.6
    assert found["busiest_over_mean"][6] <= 1.5
    assert found["busiest_over_mean"][48] <= 1.5
    assert len(found["adapters_by_replica"]) == 3


async def test_alerts_tell_of_a_killed_replica_and_of_nothing_else(cluster: Cluster) -> None:
    found = await alerts(cluster)
    if "skipped" in found:
        pytest.skip(found["skipped"])
    assert found["fired_in_calm"] == []
    assert found["fired_after_kill"] == ["LoraxReplicaDown", "LoraxRestarted"]
    assert found["calm_calls"] > 100
    assert found["calm_serving"] == found["calm_gateways"] == 3


async def test_affinity_saves_adapter_loads(cluster: Cluster) -> None:
    found = await proofs.adapter_loads(cluster)
    assert found["ring_hash_failed"] == found["round_robin_failed"] == 0
    assert found["times_fewer"] >= 3


async def test_a_change_of_the_manifest_is_everywhere_soon(cluster: Cluster) -> None:
    found = await proofs.manifest(cluster)
    assert max(found["intervals"].values()) <= 2
    assert found["told_of"] == [["broken"]] * 3
    assert found["others_failed"] == 0


async def test_a_rolling_restart_fails_no_call(cluster: Cluster) -> None:
    found = await proofs.rolling_restart(cluster)
    assert found["errors"] == {}
    assert found["failed"] == 0
    assert found["long_streams"] > 3


async def test_a_gateway_that_goes_breaks_no_stream(cluster: Cluster) -> None:
    found = await proofs.gateway_drain(cluster)
    assert found["errors"] == {}
    assert found["failed"] == found["exit_code"] == 0
    assert found["long_streams"] > 3
    assert found["calls_after"] > 0
    assert found["drain_seconds"] < 60


async def test_a_killed_replica_takes_along_only_what_it_was_doing(cluster: Cluster) -> None:
    found = await proofs.kill(cluster)
    assert found["long_of_victim"] == found["long_failed"] == 2
    assert found["long_failed_elsewhere"] == 0
    # Those that were in flight: three workers have one call each.
    assert found["short_failed"] <= 3
    assert found["failed_begun_later"] == found["after_failed"] == 0
    assert all(error.startswith("Unavailable") for error in found["errors"])
    assert found["adapters_moved"] > 0
    assert found["answered_by"] == ["replica-0", "replica-2"]


async def test_an_upgrade_fails_no_call(cluster: Cluster) -> None:
    old = {replica.name for replica in cluster.replicas}
    found = await proofs.rolling_upgrade(cluster)
    assert found["errors"] == {}
    assert found["failed"] == 0
    assert found["long_streams"] > 3
    new = {replica.name for replica in cluster.replicas}
    assert set(found["answered_at_the_end_by"]) == new
    assert not old & new
