"""Three replicas behind Envoy, for all tests of this directory: half a minute to come up."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from deploy.local.cluster import Cluster
from deploy.local.gateway import find_envoy


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if find_envoy() is None:
        pytest.skip("there is no envoy: run make gateway-setup")
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
