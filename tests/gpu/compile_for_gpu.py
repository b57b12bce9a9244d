"""A process that compiles kernels for an H100 where there is none: their calls on CPU tensors do
everything but the launch. Triton's interpreter accepts much that its compiler does not.

``python -m tests.gpu.compile_for_gpu`` compiles a few of each, with ``--all`` for models that are
usual, in all dtypes, and prints what each takes.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

os.environ["TRITON_INTERPRET"] = "0"  # the tests' package has asked for it, before triton came

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from lorax_serve.gpu.kernels.activation import silu_mul
from lorax_serve.gpu.kernels.attention import decode_attention
from lorax_serve.gpu.kernels.lora import lora_expand, lora_shrink
from lorax_serve.gpu.kernels.norm import add_rms_norm, rms_norm
from lorax_serve.gpu.kernels.rope import rotate_and_store
from lorax_serve.gpu.kernels.sampling import draw
from lorax_serve.gpu.lora import LoRAPlan, SiteShape
from lorax_serve.gpu.pages import PAGE, LayerPages, Rope

# Shared memory that a program of an H100 may have.
SHARED = 227 << 10


@dataclass(frozen=True, slots=True)
class Model:
    """Sizes that kernels are compiled for."""

    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    head_norms: bool = False
    biased: bool = False


MODELS = {
    "llama-3.1-8b": Model(4096, 14336, 32, 8, 128, 128256),
    "llama-3.2-1b": Model(2048, 8192, 32, 8, 64, 128256),
    "smollm2-135m": Model(576, 1536, 9, 3, 64, 49152),
    "qwen3-4b": Model(2560, 9728, 32, 8, 128, 151936, head_norms=True),
    "gpt2": Model(768, 3072, 12, 12, 64, 50257, biased=True),
    "tiny": Model(32, 64, 4, 2, 8, 128, biased=True),
    "head of 96": Model(768, 64, 7, 1, 96, 300),
    "head of 256": Model(2048, 64, 16, 8, 256, 300),
}


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


def attend(model: Model, dtype: torch.dtype) -> None:
    heads, kv_heads, head_dim = model.heads, model.kv_heads, model.head_dim
    keys = torch.zeros(4, kv_heads, PAGE, head_dim, dtype=dtype)
    pages = LayerPages(keys, keys, torch.zeros(2, 128, dtype=torch.int32))
    qkv = torch.zeros(3, heads + 2 * kv_heads, head_dim, dtype=dtype)
    rows = torch.zeros(3, dtype=torch.int32)
    decode_attention(qkv[:, :heads], rows, rows, pages, 0.1)
    rope = Rope(None, None)
    if not model.biased:
        angles = torch.zeros(64, head_dim // 2)
        norm = torch.ones(head_dim, dtype=dtype) if model.head_norms else None
        rope = Rope(angles, angles, norm, norm, 1e-5)
    rotate_and_store(qkv, rows, rows, pages, rope)


def between(model: Model, dtype: torch.dtype) -> None:
    """Norms and the activation."""
    x = torch.zeros(3, model.hidden, dtype=dtype)
    rms_norm(x, x[0], 1e-5)
    add_rms_norm(x, x, x[0], 1e-5)
    silu_mul(torch.zeros(3, 2 * model.inner, dtype=dtype))


def add_lora(model: Model, dtype: torch.dtype) -> None:
    q, kv = model.heads * model.head_dim, model.kv_heads * model.head_dim
    arena = torch.zeros(1 << 10, dtype=dtype)
    sites = ((model.hidden, (q, kv, kv)), (model.hidden, (model.inner,) * 2), (q, (model.hidden,)))
    for (inner, widths), chunk in product(sites, (16, 64)):
        rows = torch.zeros(2, chunk, dtype=torch.int32)
        plan = LoRAPlan(torch.zeros(2, dtype=torch.int64), rows, chunk, 16)
        site = SiteShape(3, inner, widths)
        y = torch.zeros(3, sum(widths), dtype=dtype)
        h = lora_shrink(torch.zeros(3, inner, dtype=dtype), arena, plan, site)
        lora_expand(h, y, arena, plan, site, y[0] if model.biased else None)


def sample(model: Model) -> None:
    floats = torch.zeros(3)
    numbers = torch.zeros(3, dtype=torch.int32)
    draw(torch.zeros(3, model.vocab), floats, numbers, floats, numbers.long(), numbers)


def describe(kernel: Any) -> str:
    """Registers, bytes spilled and shared memory of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    numbers = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", said))
    shared, warps = kernel.metadata.shared, kernel.metadata.num_warps
    return f"{kernel.name}: {numbers}, {shared} bytes shared, {warps} warps"


def main(everything: bool) -> None:
    compiled = compile_only()
    half = torch.bfloat16
    if everything:
        for name, model in MODELS.items():
            for dtype in (half, torch.float16, torch.float32):
                first = len(compiled)
                for call in (attend, between, add_lora):
                    call(model, dtype)
                for kernel in compiled[first:]:
                    print(name, dtype, describe(kernel))
            first = len(compiled)
            sample(model)
            for kernel in compiled[first:]:
                print(name, describe(kernel))
    else:
        attend(MODELS["qwen3-4b"], half)
        attend(MODELS["tiny"], torch.float32)
        between(MODELS["smollm2-135m"], half)
        add_lora(MODELS["tiny"], half)
        sample(MODELS["gpt2"])
        print(*sorted({kernel.name for kernel in compiled}))
    for kernel in compiled:
        assert kernel.metadata.shared <= SHARED, kernel.name


if __name__ == "__main__":
    main("--all" in sys.argv)
