"""Compiles the kernels with the machine's C++ compiler and keeps the library in the cache.

``python -m lorax_serve.kernels.build`` does it ahead of time, in an image for example, for every
instruction set or for those named. ``$LORAX_BUILT_KERNELS`` is a directory for them, which may be
read-only afterwards, whatever becomes of the cache.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from lorax_serve.errors import LoraxError

__all__ = [
    "INSTRUCTION_SETS",
    "KernelsUnavailable",
    "compiler",
    "cpu_lacks",
    "instruction_sets",
    "library",
]

INSTRUCTION_SETS = {
    "avx512": ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16", "fma"),
    "avx2": ("avx2", "fma"),
}
"""The fastest first, with the CPU flags that each needs. They are named one by one, not by
-march=native: a library built on one machine runs on every machine that has these, whatever else
the two have."""

_SOURCES = (
    *("kernels.cpp", "attention.h", "linear.h", "sampling.h"),
    *("vec.h", "avx512.h", "avx2.h"),
)
_COMPILER_FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-shared", "-fopenmp"),
    # The compiler's own intrinsics start from registers of undefined content.
    *("-Wall", "-Wno-uninitialized", "-Wno-maybe-uninitialized"),
)
_COMPILE_SECONDS = 300


class KernelsUnavailable(LoraxError):
    """The kernels cannot be used here; says why. The torch path computes the same."""


def library(instruction_set: str | None = None) -> Path:
    """The compiled library, built now if this version of the sources never was.

    Args:
        instruction_set: one of ``INSTRUCTION_SETS``; None is the fastest that this CPU has.

    Raises:
        KernelsUnavailable: not an x86 CPU with AVX2, no compiler, or it failed.
    """
    if instruction_set is None:
        available = instruction_sets()
        if not available:
            raise KernelsUnavailable(f"the CPU has no {', '.join(cpu_lacks('avx2'))}")
        instruction_set = available[0]
    folder = Path(__file__).parent
    sources = b"".join((folder / name).read_bytes() for name in _SOURCES)
    needs = (f"-m{flag.replace('_', '')}" for flag in INSTRUCTION_SETS[instruction_set])
    flags = (*_COMPILER_FLAGS, *needs)
    key = hashlib.sha256(sources + " ".join(flags).encode()).hexdigest()[:16]
    place = _cache() / f"{instruction_set}-{key}.so"
    if not place.exists():
        _compile(folder / "kernels.cpp", flags, place)
    return place


def instruction_sets() -> list[str]:
    """The instruction sets that this CPU has, the fastest first; empty if there is none."""
    return [name for name in INSTRUCTION_SETS if not cpu_lacks(name)]


def cpu_lacks(instruction_set: str) -> list[str]:
    """The CPU flags that are missing for an instruction set."""
    needs = INSTRUCTION_SETS[instruction_set]
    if platform.machine() != "x86_64":
        return list(needs)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return list(needs)
    flags = next((line for line in lines if line.startswith("flags")), "").split()
    return [flag for flag in needs if flag not in flags]


def compiler() -> str | None:
    """The C++ compiler, if there is one: ``$CXX``, g++ or clang++."""
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")


def _cache() -> Path:
    if ahead := os.environ.get("LORAX_BUILT_KERNELS"):
        return Path(ahead)
    # Beside the converted models; model.source keeps those under the same root.
    root = os.environ.get("LORAX_CACHE") or Path.home() / ".cache" / "lorax"
    return Path(root) / "kernels"


def _compile(source: Path, flags: tuple[str, ...], place: Path) -> None:
    command = compiler()
    if command is None:
        raise KernelsUnavailable("there is no C++ compiler (g++, clang++, or $CXX)")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent) as scratch:
            built = Path(scratch) / place.name
            done = subprocess.run(
                [command, *flags, str(source), "-o", str(built)],
                capture_output=True,
                text=True,
                check=False,
                timeout=_COMPILE_SECONDS,
            )
            if done.returncode:
                raise KernelsUnavailable(f"{command} failed: {done.stderr.strip()[:2000]}")
            built.replace(place)  # whole or not at all, also when several processes build
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelsUnavailable(f"the kernels cannot be built in {place.parent}: {error}") from (
            error
        )


if __name__ == "__main__":
    for name in sys.argv[1:] or INSTRUCTION_SETS:
        print(library(name))
