"""How much memory this process has taken, and giving it back."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from typing import Any

import torch

__all__ = ["give_back_at_once", "give_back_memory", "memory_used", "peak_memory"]

_PROCESS = Path("/proc/self")


# Of glibc's malloc.h, and what its mallopt takes.
_MMAP_THRESHOLD = -3
_LARGE = 1 << 20


def give_back_memory() -> None:
    """Return freed memory to the system, where the C library keeps it: after the temporary tensors
    of a few layers glibc's heap was three times as large as what was in it."""
    trim = _of_the_c_library("malloc_trim")
    if trim is not None:
        trim(0)


def give_back_at_once(large: int = _LARGE) -> None:
    """From now on, return the memory of each large tensor to the system as soon as it is freed; so
    the next one's must be asked for, which takes time. Otherwise, where large tensors come and go
    between small ones that stay, glibc's heap holds 2.0 GB for 0.8 GB (smollm2-135m, layer by
    layer).

    Args:
        large: in bytes, what is.
    """
    option = _of_the_c_library("mallopt")
    if option is not None:
        option(_MMAP_THRESHOLD, large)
    give_back_memory()


def _of_the_c_library(name: str) -> Any:
    """A function of the C library; None where it has none of this name."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


def memory_used(device: torch.device) -> int | None:
    """Bytes: on a GPU the most that was allocated there so far, else what the process holds in
    memory now; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        pages = int((_PROCESS / "statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return peak_memory(device)
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_memory(device: torch.device) -> int | None:
    """Bytes: the most that was allocated on the GPU, else the most that the process ever held in
    memory; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        lines = (_PROCESS / "status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, ValueError, StopIteration):
        return _of_usage()


def _of_usage() -> int | None:
    """Where there is no /proc. After a fork, this may be the parent's."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
