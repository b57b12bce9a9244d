"""What devices can do at most: memory, bytes read and products a second."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from lorax_serve.errors import InvalidRequest

__all__ = ["DEVICES", "Device", "device"]


@dataclass(frozen=True, slots=True)
class Device:
    """One device of a replica.

    Attributes:
        name: as the command takes it.
        memory: bytes.
        bandwidth: bytes a second that are read from its memory.
        flops: operations a second in products of bfloat16 matrices, two a multiplication.
        measured: whether these two were measured on this machine; else they are the maker's.
    """

    name: str
    memory: int
    bandwidth: float
    flops: float
    measured: bool = False

    @property
    def on_gpu(self) -> bool:
        """Whether it has memory of its own."""
        return self.name != "cpu"


# From the makers' data sheets: dense bfloat16, without sparsity.
DEVICES = {
    each.name: each
    for each in (
        Device("h100", 80 * 10**9, 3.35e12, 989e12),
        Device("h200", 141 * 10**9, 4.8e12, 989e12),
        Device("a100", 80 * 10**9, 2.04e12, 312e12),
        Device("l4", 24 * 10**9, 300e9, 121e12),
    )
}


def device(name: str, memory: int | None, bandwidth: float | None, flops: float | None) -> Device:
    """The device of that name, with what is given in place of its own figures.

    ``cpu`` is this machine; what is not given is measured, which takes a second.

    Raises:
        InvalidRequest: no such device is known.
    """
    if name == "cpu":
        found = Device(
            "cpu",
            memory or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
            bandwidth or _measured_bandwidth(),
            flops or _measured_flops(),
            measured=bandwidth is None or flops is None,
        )
        return found
    if name not in DEVICES:
        known = ", ".join(["cpu", *DEVICES])
        raise InvalidRequest(
            f"device must be one of {known}, found {name!r}; for another, name the nearest and "
            "give --memory, --bandwidth and --flops"
        )
    known_device = DEVICES[name]
    return replace(
        known_device,
        memory=memory or known_device.memory,
        bandwidth=bandwidth or known_device.bandwidth,
        flops=flops or known_device.flops,
    )


def _measured_bandwidth() -> float:
    """Bytes a second that all cores read, from more than the caches hold."""
    import torch

    block = torch.ones(1 << 26, dtype=torch.float32)
    return block.nbytes / _fastest(block.sum)


def _measured_flops() -> float:
    import torch

    size = 1024
    one = torch.ones(size, size, dtype=torch.float32)
    return 2 * size**3 / _fastest(lambda: one @ one)


def _fastest(call: Callable[[], object]) -> float:
    call()
    times = []
    for _ in range(5):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return min(times)
