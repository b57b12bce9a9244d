"""``make local-cluster``: bring the cluster up, prove what it promises, print the figures as one
line of JSON; with ``--keep``, leave it running until Ctrl-C instead."""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from deploy.local import proofs
from deploy.local.alerts import alerts
from deploy.local.cluster import Cluster
from deploy.local.prometheus import NO_PROMETHEUS

PROOFS: tuple[Callable[[Cluster], Awaitable[dict[str, Any]]], ...] = (
    proofs.affinity,
    alerts,  # before restarts, of which some alerts tell for an hour
    proofs.adapter_loads,
    proofs.manifest,
    proofs.rolling_restart,
    proofs.gateway_drain,
    proofs.kill,
    proofs.rolling_upgrade,
)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m deploy.local", description=__doc__)
    parser.add_argument("--keep", action="store_true", help="prove nothing, run until Ctrl-C")
    parser.add_argument("--only", action="append", help="the name of a proof; default: all")
    options = parser.parse_args()
    # Whatever ends this process ends those that it has started.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    with tempfile.TemporaryDirectory(prefix="lorax-local-") as directory:
        cluster = Cluster(Path(directory))
        try:
            began = time.monotonic()
            cluster.start()
            for process in cluster.processes:
                print(f"{process.name:18} {process.log}", file=sys.stderr)
            print(f"gateway            {cluster.gateway}", file=sys.stderr, flush=True)
            watched = cluster.prometheus.url if cluster.prometheus else NO_PROMETHEUS
            print(f"prometheus         {watched}", file=sys.stderr, flush=True)
            if options.keep:
                _wait()
                return
            figures: dict[str, Any] = {"start_seconds": round(time.monotonic() - began, 1)}
            for proof in PROOFS:
                if options.only and proof.__name__ not in options.only:
                    continue
                figures[proof.__name__] = found = asyncio.run(_run(proof, cluster))
                print(f"{proof.__name__}: {found}", file=sys.stderr, flush=True)
            print(json.dumps(figures))
        finally:
            cluster.stop()


async def _run(
    proof: Callable[[Cluster], Awaitable[dict[str, Any]]], cluster: Cluster
) -> dict[str, Any]:
    return await proof(cluster)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _wait() -> None:
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        return


if __name__ == "__main__":
    main()
