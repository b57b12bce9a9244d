"""A process that compiles kernels for an H100 where there is none: their calls on CPU tensors do
everything but the launch. Triton's interpreter accepts much that its compiler does not."""

from __future__ import annotations

from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from lorax_serve.gpu.kernels.attention import decode_attention
from lorax_serve.gpu.kernels.rope import rotate_and_store
from lorax_serve.gpu.pages import PAGE, LayerPages, Rope

# Shared memory that a program of an H100 may have.
SHARED = 227 << 10


class Hopper:
    """As much of a driver as compiling needs."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_only() -> list[Any]:
    """From now on nothing is launched; returns the list to which what is compiled is added."""
    driver.set_active(Hopper())
    run, compiled = JITFunction.run, []

    def run_dry(self: Any, *args: Any, warmup: bool, **options: Any) -> Any:
        compiled.append(run(self, *args, warmup=True, **options))
        return compiled[-1]

    JITFunction.run = run_dry
    return compiled


def main() -> None:
    compiled = compile_only()
    for dtype in (torch.bfloat16, torch.float32):
        for heads, kv_heads, head_dim in ((9, 3, 64), (24, 8, 128), (7, 1, 96), (16, 8, 256)):
            keys = torch.zeros(4, kv_heads, PAGE, head_dim, dtype=dtype)
            pages = LayerPages(keys, keys, torch.zeros(2, 128, dtype=torch.int32))
            qkv = torch.zeros(3, heads + 2 * kv_heads, head_dim, dtype=dtype)
            rows = torch.zeros(3, dtype=torch.int32)
            decode_attention(qkv[:, :heads], rows, rows, pages, 0.1)
            angles, norm = torch.zeros(64, head_dim // 2), torch.ones(head_dim, dtype=dtype)
            rotate_and_store(qkv, rows, rows, pages, Rope(angles, angles))
            rotate_and_store(qkv, rows, rows, pages, Rope(angles, angles, norm, norm, 1e-5))
            rotate_and_store(qkv, rows, rows, pages, Rope(None, None))
    for kernel in compiled:
        print(kernel.name, kernel.metadata.shared)
        assert kernel.metadata.shared <= SHARED


if __name__ == "__main__":
    main()
