"""The compiled kernels as Python calls.

Pointers go in as integers: a step makes some 150 calls, and each must cost about a microsecond.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_double, c_float, c_int32, c_int64, c_uint64, c_void_p
from functools import cache

import torch

from lorax_serve.kernels import build
from lorax_serve.kernels.packing import PackedLinear

__all__ = ["ADD", "GATED", "WRITE", "WRITE_FLOAT", "Kernels", "load"]

WRITE, ADD, GATED, WRITE_FLOAT = range(4)
"""What becomes of a linear's result: y = it; y += it; y = silu(gate) * up; y = it, in float32."""
_CHUNK = 512


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
