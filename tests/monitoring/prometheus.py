"""A real Prometheus, and promtool: Debian's package ``prometheus``. Else the tests are skipped."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from deploy.local.processes import free_port, wait_until
from deploy.local.prometheus import Prometheus, prometheus

__all__ = ["needs_prometheus", "promtool", "running"]

_MISSING = [each for each in ("promtool", "prometheus") if shutil.which(each) is None]
needs_prometheus = pytest.mark.skipif(
    bool(_MISSING),
    reason=f"no {' and no '.join(_MISSING)} here: apt install --no-install-recommends prometheus",
)


def promtool(*arguments: str | Path, stdin: str | None = None) -> str:
    """What it prints; it must find nothing wrong."""
    command = ["promtool", *map(str, arguments)]
    done = subprocess.run(
        command, input=stdin, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@asynccontextmanager
async def running(
    directory: Path, targets: list[str], rules: str, scrape_seconds: float = 1.5
) -> AsyncIterator[Prometheus]:
    """A Prometheus that scrapes ``targets`` and evaluates ``rules``."""
    port = free_port("127.0.0.1")
    process = prometheus(directory, port, targets, rules, scrape_seconds)
    found = Prometheus(port)
    process.start()
    try:
        await asyncio.to_thread(wait_until, found.ready, process, 30)
        yield found
    finally:
        process.kill()
