"""What every result file says of where it comes from."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

__all__ = ["write_result"]

_PACKAGES = ("torch", "transformers", "peft", "grpcio", "lorax-serve")


def write_result(directory: Path, name: str, result: dict[str, Any]) -> Path:
    """Write ``directory/name.json``: the result with versions, commit, machine and command."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}.json"
    context = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]),
        "commit": _commit(),
        "versions": {p: importlib.metadata.version(p) for p in _PACKAGES},
        "python": platform.python_version(),
        "machine": {"processor": _processor(), "cores": len(os.sched_getaffinity(0))},
    }
    path.write_text(json.dumps({**context, **result}, indent=2) + "\n")
    return path


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()
