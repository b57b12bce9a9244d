"""Compiles the kernels with the machine's C++ compiler and keeps the library in the cache.

``python -m lorax_serve.kernels.build`` does it ahead of time, in an image for example.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from lorax_serve.errors import LoraxError

__all__ = ["KernelsUnavailable", "cpu_lacks", "library"]

_SOURCES = ("kernels.cpp", "attention.h", "linear.h", "sampling.h", "vec.h")
# Named one by one, not -march=native: a library built on one machine runs on every machine that
# has these, whatever else the two have.
_CPU_FLAGS = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16", "fma")
_COMPILER_FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-shared", "-fopenmp"),
    *(f"-m{flag.replace('_', '')}" for flag in _CPU_FLAGS),
    # The compiler's own intrinsics start from registers of undefined content.
    *("-Wall", "-Wno-uninitialized", "-Wno-maybe-uninitialized"),
)
_COMPILE_SECONDS = 300


class KernelsUnavailable(LoraxError):
    """The kernels cannot be used here; says why. The torch path computes the same."""


def library() -> Path:
    """The compiled library, built now if this version of the sources never was.

    Raises:
        KernelsUnavailable: no x86 CPU with AVX-512 and bfloat16, no compiler, or it failed.
    """
    lacking = cpu_lacks()
    if lacking:
        raise KernelsUnavailable(f"the CPU has no {', '.join(lacking)}")
    folder = Path(__file__).parent
    sources = b"".join((folder / name).read_bytes() for name in _SOURCES)
    key = hashlib.sha256(sources + " ".join(_COMPILER_FLAGS).encode()).hexdigest()[:16]
    place = _cache() / f"cpu-{key}.so"
    if not place.exists():
        _compile(folder / "kernels.cpp", place)
    return place


def cpu_lacks() -> list[str]:
    """The CPU's missing instruction sets; empty if the kernels can run."""
    if platform.machine() != "x86_64":
        return list(_CPU_FLAGS)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return list(_CPU_FLAGS)
    flags = next((line for line in lines if line.startswith("flags")), "").split()
    return [flag for flag in _CPU_FLAGS if flag not in flags]


def _cache() -> Path:
    # Beside the converted models; model.source keeps those under the same root.
    root = os.environ.get("LORAX_CACHE") or Path.home() / ".cache" / "lorax"
    return Path(root) / "kernels"


def _compile(source: Path, place: Path) -> None:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise KernelsUnavailable("there is no C++ compiler (g++, clang++, or $CXX)")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent) as scratch:
            built = Path(scratch) / place.name
            command = [compiler, *_COMPILER_FLAGS, str(source), "-o", str(built)]
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, timeout=_COMPILE_SECONDS
            )
            if done.returncode:
                raise KernelsUnavailable(f"{compiler} failed: {done.stderr.strip()[:2000]}")
            built.replace(place)  # whole or not at all, also when several processes build
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelsUnavailable(f"the kernels cannot be built in {place.parent}: {error}") from (
            error
        )


if __name__ == "__main__":
    print(library())
