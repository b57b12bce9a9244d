"""The compiled kernels as Python calls, and the forms of weights that they read.

Pointers go in as integers: a step makes some 150 calls, and each must cost about a microsecond.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence
from contextlib import suppress
from ctypes import POINTER, c_double, c_float, c_int32, c_int64, c_uint64, c_void_p
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from lorax_serve.kernels import build

__all__ = [
    "ADD",
    "GATED",
    "PANEL",
    "WRITE",
    "WRITE_FLOAT",
    "Arena",
    "AttentionArgs",
    "Kernels",
    "LoRAArgs",
    "LoRASiteArgs",
    "PackedLinear",
    "PromptArgs",
    "RowsArgs",
    "SegmentArgs",
    "load",
    "pack_panels",
    "step_of",
]

PANEL = 16
"""Outputs in a panel of packed weights: the float32 lanes of a register."""
WRITE, ADD, GATED, WRITE_FLOAT = range(4)
"""What becomes of a linear's result: y = it; y += it; y = silu(gate) * up; y = it, in float32."""
_CHUNK = 512
MAX_PARTS = 3


class LinearArgs(ctypes.Structure):
    """``struct Linear`` of linear.h."""

    _fields_ = (
        ("panels", c_void_p),
        ("bias", c_void_p),
        ("norm", c_void_p),
        ("in_features", c_int32),
        ("out_features", c_int32),
        ("eps", c_float),
    )


class LoRAPartArgs(ctypes.Structure):
    """``struct LoraPart``."""

    _fields_ = (
        ("b", c_void_p),
        ("first_rank", c_int32),
        ("ranks", c_int32),
        ("h_column", c_int32),
        ("first_panel", c_int32),
        ("panel_step", c_int32),
        ("panels", c_int32),
    )


class LoRASiteArgs(ctypes.Structure):
    """``struct LoraSite``; all zero where an adapter has no LoRA."""

    _fields_ = (("a", c_void_p), ("parts", LoRAPartArgs * MAX_PARTS), ("num_parts", c_int32))


class SegmentArgs(ctypes.Structure):
    """``struct Segment``: ascending row numbers, and the adapter's array of sites."""

    _fields_ = (("sites", c_void_p), ("rows", c_void_p), ("num_rows", c_int32))


class LoRAArgs(ctypes.Structure):
    """``struct Lora``."""

    _fields_ = (
        ("segments", POINTER(SegmentArgs)),
        ("num_segments", c_int32),
        ("h_width", c_int32),
        ("h", c_void_p),
    )


class AttentionArgs(ctypes.Structure):
    """``struct Attention`` of attention.h."""

    _fields_ = (
        ("heads", c_int32),
        ("kv_heads", c_int32),
        ("head_dim", c_int32),
        ("max_length", c_int32),
        ("scale", c_float),
        ("eps", c_float),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
    )


class PromptArgs(ctypes.Structure):
    """``struct Prompt``."""

    _fields_ = (("start", c_int32), ("end", c_int32))


class RowsArgs(ctypes.Structure):
    """``struct Rows``."""

    _fields_ = (
        ("kv_slot", c_void_p),
        ("position", c_void_p),
        ("prompts", POINTER(PromptArgs)),
        ("num_rows", c_int32),
        ("num_decodes", c_int32),
        ("num_prompts", c_int32),
    )


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
    """

    args: int
    in_features: int
    columns: int
    owned: tuple[Any, ...]

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
        """Copy ``weight`` ``[out, in]`` into panels; see linear.h for gated linears."""
        panels = pack_panels(weight)
        bias = None if bias is None else bias.float()
        if gated:
            half = len(panels) // 2
            panels = torch.stack((panels[:half], panels[half:]), dim=1)
            if bias is not None:
                bias = bias.view(2, half, PANEL).transpose(0, 1).flatten().contiguous()
        packed = arena.empty(weight.numel(), weight.dtype)
        packed.view(panels.shape).copy_(panels)
        out_features, in_features = weight.shape
        args = LinearArgs(
            packed.data_ptr(),
            None if bias is None else bias.data_ptr(),
            None if norm is None else norm.data_ptr(),
            in_features,
            out_features,
            eps,
        )
        columns = out_features // 2 if gated else out_features
        return cls(ctypes.addressof(args), in_features, columns, (args, packed, bias, norm))


class Kernels:
    """The library's functions for one element type; they run with ``torch.get_num_threads()`` as it
    is when the library is loaded."""

    def __init__(self, path: str, dtype: torch.dtype) -> None:
        lib = ctypes.CDLL(path)
        name = {torch.bfloat16: "bf16", torch.float32: "f32"}[dtype]
        p, i = c_void_p, c_int32
        self._linear = lib[f"lorax_linear_{name}"]
        self._linear.argtypes = (p, i, p, i, p, p, i, p, i)
        self._linear.restype = None
        self._linear_scratch = lib[f"lorax_linear_scratch_{name}"]
        self._linear_scratch.argtypes = (i,)
        self._linear_scratch.restype = c_int64
        self._attend = lib[f"lorax_attend_{name}"]
        self._attend.argtypes = (p, p, p, p, p, p, p, i)
        self._attend.restype = None
        self._attend_scratch = lib[f"lorax_attend_scratch_{name}"]
        self._attend_scratch.argtypes = (i, i, i)
        self._attend_scratch.restype = c_int64
        self._most_probable = lib.lorax_most_probable
        self._most_probable.argtypes = (p, i, i, p, i)
        self._most_probable.restype = None
        self._draw = lib.lorax_draw
        self._draw.argtypes = (p, i, i, p, p, p, p, p, p, p, p, i)
        self._draw.restype = None
        self.threads = torch.get_num_threads()

    def linear(
        self,
        linear: PackedLinear,
        mode: int,
        x: int,
        rows: int,
        y: int,
        scratch: int,
        lora: int | None = None,
        site: int = 0,
    ) -> None:
        """``y = norm(x) @ W.T + LoRA + bias``; x ``[rows, in]``, y ``[rows, columns]``, addresses.

        Args:
            linear: the weights.
            mode: what becomes of the result.
            x: address of the input.
            rows: of x.
            y: address of the output.
            scratch: address of ``linear_scratch`` bytes for each row.
            lora: address of a ``LoRAArgs``; None without LoRA.
            site: the linear's number among an adapter's sites.
        """
        self._linear(linear.args, mode, x, rows, y, lora, site, scratch, self.threads)

    def linear_scratch(self, in_features: int) -> int:
        """Bytes for each row that ``linear`` works in."""
        nbytes: int = self._linear_scratch(in_features)
        return nbytes

    def attend(
        self, attention: int, rows: int, qkv: int, keys: int, values: int, out: int, scratch: int
    ) -> None:
        """RoPE on all rows' q and k, the write of k and v, and every row's attention.

        Args:
            attention, rows: addresses of an ``AttentionArgs`` and a ``RowsArgs``.
            qkv: ``[rows, (heads + 2 kv_heads) * head_dim]``, rotated in place.
            keys, values: a layer's cache.
            out: ``[rows, heads * head_dim]``.
            scratch: see ``attend_scratch``.
        """
        self._attend(attention, rows, qkv, keys, values, out, scratch, self.threads)

    def attend_scratch(self, group: int, head_dim: int, max_length: int) -> torch.Tensor:
        """Memory for ``attend`` with ``group`` query heads for each key."""
        floats = self._attend_scratch(group, head_dim, max_length)
        return torch.empty(self.threads, floats)

    def most_probable(self, logits: torch.Tensor) -> list[int]:
        """Each row's first largest logit, -1 for a row with NaN or infinity; ``[rows, vocab]``."""
        rows, vocab = logits.shape
        tokens = torch.empty(rows, dtype=torch.int32)
        self._most_probable(logits.data_ptr(), rows, vocab, tokens.data_ptr(), self.threads)
        return tokens.tolist()

    def draw(
        self,
        logits: torch.Tensor,
        rows: Sequence[int],
        temperature: Sequence[float],
        top_p: Sequence[float],
        seed: Sequence[int],
        position: Sequence[int],
    ) -> list[int]:
        """Draw a token for each of ``rows`` of finite ``logits`` (or -inf), cut by top-p."""
        count, vocab = len(rows), logits.shape[1]
        scratch = torch.empty(self.threads, vocab)
        sums = torch.empty(self.threads, 2 * -(-vocab // _CHUNK), dtype=torch.float64)
        tokens = (c_int32 * count)()
        self._draw(
            logits.data_ptr(),
            count,
            vocab,
            (c_int32 * count)(*rows),
            (c_float * count)(*temperature),
            (c_double * count)(*top_p),
            (c_uint64 * count)(*seed),
            (c_uint64 * count)(*position),
            scratch.data_ptr(),
            sums.data_ptr(),
            tokens,
            self.threads,
        )
        return list(tokens)


@cache
def load(dtype: torch.dtype, instruction_set: str | None = None) -> Kernels:
    """The kernels for weights of ``dtype``; ``instruction_set`` as for ``build.library``.

    Raises:
        KernelsUnavailable: they cannot be built or run here, or not for this dtype.
    """
    if dtype not in (torch.bfloat16, torch.float32):
        raise build.KernelsUnavailable(f"there are none for {dtype}")
    path = build.library(instruction_set)
    try:
        return Kernels(str(path), dtype)
    except OSError as error:  # mounted noexec, damaged, or built for another system's libraries
        raise build.KernelsUnavailable(
            f"{path} cannot be loaded ({error}); if it is damaged, delete it"
        ) from error


def address(structure: ctypes.Structure) -> int:
    """Where a structure lies; whoever takes it keeps the structure alive."""
    return ctypes.addressof(structure)
