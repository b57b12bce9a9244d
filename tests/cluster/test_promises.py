"""Promises can be broken: figures that were measured once, each with something that went wrong."""

from __future__ import annotations

from typing import Any

import pytest

from deploy.local import __main__ as command
from deploy.local import proofs
from deploy.local.alerts import alerts
from deploy.local.promises import PROMISES, Proof, broken

STREAMS = {"failed": 0, "errors": {}, "long_streams": 180}
GOOD: dict[Proof, dict[str, Any]] = {
    proofs.affinity: {
        "failed": 0,
        "at_home": {1: 1.0, 6: 0.94, 48: 0.84},
        "busiest_over_mean": {1: 1.1, 6: 1.1, 48: 1.05},
        "adapters_by_replica": [16, 21, 23],
    },
    alerts: {
        "fired_in_calm": [],
        "fired_after_kill": ["LoraxReplicaDown", "LoraxRestarted"],
        "calm_calls": 6017,
        "calm_serving": 3,
        "calm_gateways": 3,
    },
    proofs.adapter_loads: {"ring_hash_failed": 0, "round_robin_failed": 0, "times_fewer": 7.8},
    proofs.manifest: {
        "intervals": {"added": 1.1, "taken_out": 0.9},
        "told_of": [["broken"]] * 3,
        "others_failed": 0,
    },
    proofs.rolling_restart: STREAMS,
    proofs.gateway_drain: {**STREAMS, "drain_seconds": 18.5, "exit_code": 0, "calls_after": 75},
    proofs.kill: {
        "victim": "replica-1",
        "long_of_victim": 2,
        "long_failed": 2,
        "long_failed_elsewhere": 0,
        "short_failed": 1,
        "failed_begun_later": 0,
        "after_failed": 0,
        "errors": {"Unavailable (INTERNAL)": 3},
        "adapters_moved": 20,
        "answered_by": ["replica-0", "replica-2"],
    },
    proofs.rolling_upgrade: {
        **STREAMS,
        "replaced": ["replica-0", "replica-1", "replica-2"],
        "replicas": ["replica-3", "replica-4", "replica-5"],
        "answered_at_the_end_by": ["replica-3", "replica-4", "replica-5"],
    },
}
BAD: list[tuple[Proof, dict[str, Any]]] = [
    (proofs.affinity, {"failed": 1}),
    (proofs.affinity, {"at_home": {1: 0.9, 6: 0.94, 48: 0.84}}),
    (proofs.affinity, {"at_home": {1: 1.0, 6: 0.94, 48: 0.4}}),
    (proofs.affinity, {"busiest_over_mean": {1: 1.1, 6: 1.6, 48: 1.05}}),
    (proofs.affinity, {"adapters_by_replica": [30, 30]}),
    (alerts, {"fired_in_calm": ["LoraxQueueBacklog"]}),
    (alerts, {"calm_gateways": 2}),
    (alerts, {"fired_after_kill": ["LoraxRestarted"]}),
    (proofs.adapter_loads, {"ring_hash_failed": 1}),
    (proofs.adapter_loads, {"times_fewer": 2.9}),
    (proofs.manifest, {"intervals": {"added": 2.1, "taken_out": 0.9}}),
    (proofs.manifest, {"told_of": [["broken"], [], ["broken"]]}),
    (proofs.manifest, {"others_failed": 1}),
    (proofs.rolling_restart, {"failed": 1}),
    (proofs.rolling_restart, {"long_streams": 0}),
    (proofs.gateway_drain, {"exit_code": 1}),
    (proofs.gateway_drain, {"drain_seconds": 60.1}),
    (proofs.gateway_drain, {"calls_after": 0}),
    (proofs.kill, {"long_failed": 3, "long_failed_elsewhere": 1}),
    (proofs.kill, {"short_failed": 4}),
    (proofs.kill, {"failed_begun_later": 1}),
    (proofs.kill, {"errors": {"EngineFailed (INTERNAL)": 1}}),
    (proofs.kill, {"answered_by": ["replica-0", "replica-1"]}),
    (proofs.rolling_upgrade, {"replicas": ["replica-2", "replica-4", "replica-5"]}),
    (proofs.rolling_upgrade, {"answered_at_the_end_by": ["replica-3", "replica-4"]}),
]


@pytest.mark.parametrize("proof", PROMISES, ids=lambda proof: proof.__name__)
def test_each_promise_holds_and_can_be_broken(proof: Proof) -> None:
    assert broken(proof, GOOD[proof]) == []
    found = [broken(proof, GOOD[proof] | bad) for which, bad in BAD if which is proof]
    assert all(found)
    names = {name for each in found for name in each}
    shared = set(PROMISES[proofs.rolling_restart])  # with drains and upgrades
    assert names | (shared if proof is not proofs.rolling_restart else set()) >= set(
        PROMISES[proof]
    )


def test_a_skipped_proof_breaks_nothing() -> None:
    assert broken(alerts, {"skipped": "no prometheus here"}) == []


def test_the_command_knows_the_names_of_its_proofs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["--only", "rolling_restrat"])
    assert "invalid choice: 'rolling_restrat'" in capsys.readouterr().err
