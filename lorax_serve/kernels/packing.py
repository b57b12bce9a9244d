"""Weights in the form that the kernels read: panels, in huge pages."""

from __future__ import annotations

import ctypes
import mmap
from contextlib import suppress
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from lorax_serve.kernels.structs import LinearArgs

__all__ = [
    "PANEL",
    "Arena",
    "PackedLinear",
    "pack_panels",
    "pad_panels",
    "panel_order",
    "step_of",
]

PANEL = 16
"""Outputs in a panel of packed weights: the float32 lanes of a register."""


def step_of(dtype: torch.dtype) -> int:
    """Elements of the reduced dimension that one multiply-accumulate consumes."""
    return 2 if dtype == torch.bfloat16 else 1


def pack_panels(weight: torch.Tensor) -> torch.Tensor:
    """``[out, in]`` to panels ``[out / 16, in / step, 16, step]``, a view of the weight.

    ``out`` is a multiple of 16, ``in`` of the dtype's step.
    """
    out_features, in_features = weight.shape
    step = step_of(weight.dtype)
    return weight.view(out_features // PANEL, PANEL, in_features // step, step).transpose(1, 2)


def pad_panels(columns: int) -> int:
    """Columns rounded up to whole panels."""
    return -(-columns // PANEL) * PANEL


def panel_order(vector: torch.Tensor, *, gated: bool, fill: float = 0.0) -> torch.Tensor:
    """A float32 vector ``[out]`` in the order of a linear's panels, padded to whole ones."""
    padded = torch.full((pad_panels(len(vector)),), fill)
    padded[: len(vector)] = vector.float()
    if gated:  # see linear.h: the panels of gate and up alternate
        padded = padded.view(2, -1, PANEL).transpose(0, 1).flatten()
    return padded.contiguous()


class Arena:
    """Memory in huge pages for weights that are read from end to end at every step.

    With 4 KiB pages the hardware's prefetching stops at every page and the address translation
    misses: 30 % of the bandwidth. Freed when the last tensor of a block is.
    """

    def __init__(self, block_bytes: int = 64 << 20) -> None:
        self._block_bytes = block_bytes
        self._block = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def empty(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """A flat tensor, aligned to a cache line; its content is zero."""
        nbytes = -(-numel * dtype.itemsize // 64) * 64
        if self._used + nbytes > len(self._block):
            size = max(nbytes, self._block_bytes)
            # Private: huge pages of shared memory are another setting of the system's.
            pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            with suppress(OSError):  # a system without huge pages
                pages.madvise(mmap.MADV_HUGEPAGE)
            self._block, self._used = torch.frombuffer(pages, dtype=torch.uint8), 0
        piece = self._block[self._used : self._used + numel * dtype.itemsize]
        self._used += nbytes
        return piece.view(dtype)


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """A linear in the kernels' form. ``args`` is the address of its ``LinearArgs``.

    Attributes:
        columns: columns of the result; half the outputs if gated.
        packed: the weight in panels, flat.
        bias: float32, in the order of the panels.
        norm: of the input, with ``eps``.
    """

    args: int
    in_features: int
    columns: int
    packed: torch.Tensor
    bias: torch.Tensor | None
    norm: torch.Tensor | None
    eps: float
    gated: bool
    owned: LinearArgs

    @classmethod
    def pack(
        cls,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        arena: Arena,
        *,
        norm: torch.Tensor | None = None,
        eps: float = 0.0,
        gated: bool = False,
    ) -> PackedLinear:
        """Copy ``weight`` ``[out, in]`` into panels; see linear.h for gated linears.

        Outputs that do not fill the last panel are filled up with zeros.
        """
        out_features, in_features = pad_panels(len(weight)), weight.shape[1]
        if out_features > len(weight):
            weight = F.pad(weight, (0, 0, 0, out_features - len(weight)))
        panels = pack_panels(weight)
        bias = None if bias is None else panel_order(bias, gated=gated)
        if gated:
            half = len(panels) // 2
            panels = torch.stack((panels[:half], panels[half:]), dim=1)
        packed = arena.empty(weight.numel(), weight.dtype)
        packed.view(panels.shape).copy_(panels)
        args = LinearArgs(
            packed.data_ptr(),
            None if bias is None else bias.data_ptr(),
            None if norm is None else norm.data_ptr(),
            in_features,
            out_features,
            eps,
        )
        columns = out_features // 2 if gated else out_features
        address = ctypes.addressof(args)
        return cls(address, in_features, columns, packed, bias, norm, eps, gated, args)

    @property
    def nbytes(self) -> int:
        """Bytes of the weight."""
        return self.packed.nbytes

    def with_weight(self, weight: torch.Tensor) -> PackedLinear:
        """The same linear with another weight ``[out, in]``, in memory of its own."""
        assert self.bias is None
        return self.pack(weight, None, Arena(0), norm=self.norm, eps=self.eps, gated=self.gated)

    def unpack(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight ``[out, in]`` and float32 bias ``[out]`` as they were, what fills them up too."""
        step = step_of(self.packed.dtype)
        panels = self.packed.view(-1, self.in_features // step, PANEL, step)
        bias = self.bias
        if self.gated:
            panels = panels.view(-1, 2, *panels.shape[1:]).transpose(0, 1)
            if bias is not None:
                bias = bias.view(-1, 2, PANEL).transpose(0, 1).flatten()
        return panels.transpose(-3, -2).reshape(-1, self.in_features), bias
