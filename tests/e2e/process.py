"""A server in a process of its own, which a test may stop in any way."""

from __future__ import annotations

import asyncio
import itertools
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from lorax_serve.client import AsyncClient


async def start_process(
    model: Path, source: str | Path, state: Path, *flags: str, env: Mapping[str, str] | None = None
) -> tuple[subprocess.Popen[str], AsyncClient]:
    """A server that serves, and a client of it; the process leads a group of its own."""
    command = [sys.executable, "-m", "lorax_serve.cli.serve", "--model", str(model)]
    command += ["--source", str(source), "--state", str(state), "--load-on-demand", "on"]
    command += ["--host", "127.0.0.1", "--port", "0", "--metrics-port", "off"]
    process = subprocess.Popen(  # noqa: ASYNC220 - the test does nothing else meanwhile
        [*command, "--dtype", "float32", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
        env={**os.environ, **(env or {})},
    )
    assert process.stdout is not None
    with process.stdout:
        line = await asyncio.to_thread(_ready_line, process.stdout)
    return process, AsyncClient(line.split()[-1])


def _ready_line(stream: Iterable[str]) -> str:
    """The one that says where the server listens, once it is ready."""
    lines = list(itertools.takewhile(lambda line: not line.startswith("ready"), stream))
    return next(line for line in lines if line.startswith("gRPC"))
