"""What docs/routing.md promises, as conditions on what the proofs have measured."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from deploy.local import proofs
from deploy.local.alerts import alerts
from deploy.local.cluster import Cluster

__all__ = ["PROMISES", "Figures", "Proof", "broken"]

Figures = Mapping[str, Any]
Proof = Callable[[Cluster], Awaitable[dict[str, Any]]]
_Conditions = Mapping[str, Callable[[Figures], bool]]

_NO_CALL_FAILS: _Conditions = {
    "no call fails": lambda f: f["failed"] == 0 and not f["errors"],
    "streams run meanwhile": lambda f: f["long_streams"] > 3,
}

# In an order in which one leaves the cluster as the next one wants it.
PROMISES: Mapping[Proof, _Conditions] = {
    proofs.affinity: {
        "no call fails": lambda f: f["failed"] == 0,
        "at least 0.95 of the calls in calm go home": lambda f: f["at_home"][1] >= 0.95,
        "most go home when it is busy": lambda f: f["at_home"][48] >= 0.6,
        "none has more than 1.5 times the mean": lambda f: (
            max(f["busiest_over_mean"][6], f["busiest_over_mean"][48]) <= 1.5
        ),
        "each replica is home to some": lambda f: len(f["adapters_by_replica"]) == 3,
    },
    # Before restarts, of which some alerts tell for an hour.
    alerts: {
        "none fires in calm": lambda f: f["fired_in_calm"] == [],
        "it is no silence of the deaf": lambda f: (
            f["calm_calls"] > 100 and f["calm_serving"] == f["calm_gateways"] == 3
        ),
        "a killed replica is told of, and nothing else": lambda f: (
            f["fired_after_kill"] == ["LoraxReplicaDown", "LoraxRestarted"]
        ),
    },
    proofs.adapter_loads: {
        "no call fails": lambda f: f["ring_hash_failed"] == f["round_robin_failed"] == 0,
        "at least 3 times fewer adapters are read": lambda f: f["times_fewer"] >= 3,
    },
    proofs.manifest: {
        "all replicas follow within two intervals": lambda f: max(f["intervals"].values()) <= 2,
        "all tell of the broken adapter": lambda f: f["told_of"] == [["broken"]] * 3,
        "it blocks no other": lambda f: f["others_failed"] == 0,
    },
    proofs.rolling_restart: _NO_CALL_FAILS,
    proofs.gateway_drain: {
        **_NO_CALL_FAILS,
        "it ends when its streams have": lambda f: f["drain_seconds"] < 60 and f["exit_code"] == 0,
        "calls go on elsewhere": lambda f: f["calls_after"] > 0,
    },
    proofs.kill: {
        "its streams fail, and no others": lambda f: (
            f["long_of_victim"] == f["long_failed"] == 2 and f["long_failed_elsewhere"] == 0
        ),
        # Three workers have one call each.
        "of short calls, those in flight may fail": lambda f: f["short_failed"] <= 3,
        "none fails that begins later": lambda f: f["failed_begun_later"] == f["after_failed"] == 0,
        "failures are UNAVAILABLE": lambda f: all(e.startswith("Unavailable") for e in f["errors"]),
        "its adapters move": lambda f: (
            f["adapters_moved"] > 0
            and len(f["answered_by"]) == 2
            and f["victim"] not in f["answered_by"]
        ),
    },
    proofs.rolling_upgrade: {
        **_NO_CALL_FAILS,
        "all replicas are new": lambda f: not {*f["replicas"]} & {*f["replaced"]},
        "and they answer": lambda f: f["answered_at_the_end_by"] == f["replicas"],
    },
}


def broken(proof: Proof, figures: Figures) -> list[str]:
    """The promises that these figures break; none if the proof was skipped."""
    if "skipped" in figures:
        return []
    return [promise for promise, holds in PROMISES[proof].items() if not holds(figures)]
