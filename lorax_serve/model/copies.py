"""Copies between host and device beside what that computes."""

from __future__ import annotations

import torch

__all__ = ["Copied", "HostCopies", "ToHost", "to_device"]

Copied = torch.cuda.Event | None
"""What a copy's use must wait for; None on a CPU, where it is done already."""


class HostCopies:
    """Copies on a stream of their own, in order with the stream that computes where that matters.

    A copy waits for what could still use the memory that it overwrites (``freed``), and for nothing
    later; who uses what was copied waits for the copy (``wait``). The host waits for neither. On a
    CPU a copy is made at once. Owned by one thread.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._freed: Copied = None
        self._last: Copied = None

    def freed(self) -> None:
        """Memory becomes free, which nothing uses that is queued on the current stream from here
        on; what was queued before may."""
        if self._stream is not None:
            self._freed = _recorded(torch.cuda.current_stream(self._device))

    def start(self, target: torch.Tensor, source: torch.Tensor) -> Copied:
        """Copy to the device; returns what ``wait`` takes.

        Args:
            target: free memory of the device.
            source: as large, in host memory; pinned for CUDA. It must not be changed before the
                copy is done, but may be dropped: torch keeps pinned memory that copies still read.
        """
        if self._stream is None:
            target.copy_(source)
            return None
        with torch.cuda.stream(self._stream):
            if self._freed is not None:
                self._stream.wait_event(self._freed)
            target.copy_(source, non_blocking=True)
        self._last = _recorded(self._stream)
        return self._last

    def wait(self, copied: Copied) -> None:
        """Let what is queued on the current stream from here on come after a copy."""
        if copied is not None:
            torch.cuda.current_stream(self._device).wait_event(copied)

    def wait_for_all(self) -> None:
        """``wait`` for all copies that were started."""
        self.wait(self._last)


class ToHost:
    """A copy of a device's tensor to the host, which starts when what is queued now is done.

    Waiting for it waits for nothing that is queued later. On a CPU it is the tensor itself.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self._host, self._done = tensor, None
        if tensor.device.type == "cuda":
            self._host = torch.empty(
                tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True
            )
            self._host.copy_(tensor, non_blocking=True)
            self._done = _recorded(torch.cuda.current_stream(tensor.device))

    def wait(self) -> torch.Tensor:
        """The tensor on the host."""
        if self._done is not None:
            self._done.synchronize()
        return self._host


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A small CPU tensor on ``device``, in order with its current stream; the host waits not."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def _recorded(stream: torch.cuda.Stream) -> torch.cuda.Event:
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(stream)
    return event
