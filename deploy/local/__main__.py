"""``make local-cluster``: bring the cluster up, prove what it promises, print the figures and the
promises that are broken as one line of JSON; with ``--keep``, leave it running until Ctrl-C."""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deploy.local.cluster import Cluster
from deploy.local.prometheus import NO_PROMETHEUS
from deploy.local.promises import PROMISES, Proof, broken

_BY_NAME = {proof.__name__: proof for proof in PROMISES}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        0 if all that was tried holds, 1 if not; the line of JSON says what is broken.
    """
    parser = argparse.ArgumentParser(prog="python -m deploy.local", description=__doc__)
    parser.add_argument("--keep", action="store_true", help="prove nothing, run until Ctrl-C")
    parser.add_argument(
        "--only", action="append", choices=list(_BY_NAME), help="one proof of all; repeatable"
    )
    options = parser.parse_args(argv)
    # Whatever ends this process ends those that it has started.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    with tempfile.TemporaryDirectory(prefix="lorax-local-") as directory:
        cluster = Cluster(Path(directory))
        figures: dict[str, Any] = {}
        wrong: dict[str, list[str]] = {}
        try:
            began = time.monotonic()
            cluster.start()
            _show(cluster)
            if options.keep:
                _wait()
                return 0
            figures["start_seconds"] = round(time.monotonic() - began, 1)
            for name, proof in _BY_NAME.items():
                if not options.only or name in options.only:
                    figures[name] = found = asyncio.run(_run(proof, cluster))
                    print(f"{name}: {found}", file=sys.stderr, flush=True)
                    if promises := broken(proof, found):
                        wrong[name] = promises
        except Exception as error:
            wrong["error"] = [f"{type(error).__name__}: {error}"]
            traceback.print_exc()
        finally:
            cluster.stop()
    print(json.dumps({**figures, "broken": wrong}))
    return 1 if wrong else 0


async def _run(proof: Proof, cluster: Cluster) -> dict[str, Any]:
    return await proof(cluster)


def _show(cluster: Cluster) -> None:
    """Where everything is, and its logs."""
    for process in cluster.processes:
        print(f"{process.name:18} {process.log}", file=sys.stderr)
    print(f"gateway            {cluster.gateway}", file=sys.stderr)
    watched = cluster.prometheus.url if cluster.prometheus else NO_PROMETHEUS
    print(f"prometheus         {watched}", file=sys.stderr, flush=True)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _wait() -> None:
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        return


if __name__ == "__main__":
    sys.exit(main())
