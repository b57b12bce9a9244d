"""What every result file says of where it comes from."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lorax_serve.kernels.build import compiler

__all__ = ["has_bfloat16", "package_versions", "write_result"]

_PACKAGES = ("torch", "transformers", "peft", "grpcio", "numpy", "lorax-serve")
# What decides which matrix products a CPU can run.
_CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8")


def write_result(
    directory: Path,
    name: str,
    result: Mapping[str, Any],
    versions: Mapping[str, Mapping[str, str]] | None = None,
) -> Path:
    """Write ``directory/name.json``: the result with versions, commit, machine and command.

    Args:
        directory: created if absent.
        name: the file's, without suffix.
        result: what was measured.
        versions: of packages in peers' own environments, by peer.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}.json"
    context = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": _command(),
        "commit": _commit(),
        "versions": {**package_versions(_PACKAGES), **(versions or {})},
        "python": platform.python_version(),
        "machine": _machine(),
    }
    path.write_text(json.dumps({**context, **result}, indent=2) + "\n")
    return path


def package_versions(names: tuple[str, ...]) -> dict[str, str]:
    """The versions of those packages that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _command() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    module = spec.name.removesuffix(".__main__") if spec else Path(sys.argv[0]).name
    return " ".join(["python -m", module, *sys.argv[1:]])


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def has_bfloat16() -> bool:
    """Whether the CPU has instructions for products of bfloat16; without, torch's are slow."""
    return bool({"avx512_bf16", "amx_bf16"} & set(_machine()["cpu_flags"]))


def _machine() -> dict[str, Any]:
    return {
        "processor": _proc("cpuinfo", "model name") or platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "cpu_flags": [f for f in _CPU_FLAGS if f in (_proc("cpuinfo", "flags") or "").split()],
        "memory_gib": round(int((_proc("meminfo", "MemTotal") or "0").split()[0]) / 2**20, 1),
        "system": f"{platform.system()} {platform.release().partition('-')[0]}",
        "compiler": _compiler(),
    }


def _compiler() -> str | None:
    """The C++ compiler's first line, None if there is none: kernels may be built with it."""
    command = compiler()
    if command is None:
        return None
    done = subprocess.run([command, "--version"], capture_output=True, text=True, check=False)
    return done.stdout.partition("\n")[0] or None


def _proc(file: str, key: str) -> str | None:
    try:
        text = Path("/proc", file).read_text()
    except OSError:
        return None
    found = re.search(rf"^{key}\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else None
