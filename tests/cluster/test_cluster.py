"""What docs/routing.md promises, on real replicas behind the gateway's own configuration."""

from __future__ import annotations

import pytest

from deploy.local.cluster import Cluster
from deploy.local.promises import PROMISES, Proof, broken


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("proof", PROMISES, ids=lambda proof: proof.__name__)
async def test_what_is_promised_holds(cluster: Cluster, proof: Proof) -> None:
    found = await proof(cluster)
    if "skipped" in found:
        pytest.skip(found["skipped"])
    assert broken(proof, found) == [], found
