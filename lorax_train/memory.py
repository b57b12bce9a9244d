"""How much memory this process has taken."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

__all__ = ["memory_used", "peak_memory"]

_PROCESS = Path("/proc/self")


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
