"""Modules that keep less for the gradient: the same bits, and the same gradient."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lorax_serve.errors import TrainingError
from lorax_train.model.base import load_model
from lorax_train.model.lean import LeanMLP, LeanRMSNorm, make_lean
from lorax_train.model.lean_ops import compiled_ops

CPU = torch.device("cpu")


def run(module: Any, start: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The output and the input's gradient, and how many bytes were kept."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x = start.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = module(x)
    y.backward(wanted)
    assert x.grad is not None
    return torch.cat([y.detach(), x.grad]), sum(kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_have_the_same_bits_and_gradients_agree(llama: Path, dtype: torch.dtype) -> None:
    plain = load_model("tiny", llama, dtype, CPU)
    lean = copy.deepcopy(plain)
    assert make_lean(lean) == 2 * 2 + 1 + 2  # norms of each layer, the last norm, MLPs
    torch.manual_seed(0)
    start, wanted = torch.randn(2, 40, 32).to(dtype).unbind()
    for path in ("model.norm", "model.layers.0.input_layernorm", "model.layers.1.mlp"):
        theirs, theirs_kept = run(plain.get_submodule(path), start, wanted)
        found = lean.get_submodule(path)
        assert isinstance(found, LeanRMSNorm | LeanMLP)
        ours, ours_kept = run(found, start, wanted)
        assert torch.equal(ours[:40], theirs[:40])
        off = (ours[40:] - theirs[40:]).float().norm() / theirs[40:].float().norm()
        assert off < (1e-6 if dtype is torch.float32 else 1e-2)
        assert ours_kept < theirs_kept
    assert [name for name, _ in lean.named_parameters()] == [n for n, _ in plain.named_parameters()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_they_agree(llama: Path, dtype: torch.dtype) -> None:
    plain = load_model("tiny", llama, dtype, CPU)
    compiled = copy.deepcopy(plain)
    assert make_lean(plain) == make_lean(compiled, compiled_ops(CPU, dtype))
    for rows in (40, 23):  # of any number
        start, wanted = torch.randn(2, rows, 32).to(dtype).unbind()
        for path in ("model.norm", "model.layers.1.mlp"):
            assert getattr(compiled.get_submodule(path), "ops", None) is compiled_ops(CPU, dtype)
            expected, _ = run(plain.get_submodule(path), start, wanted)
            found, _ = run(compiled.get_submodule(path), start, wanted)
            off = (found - expected).float().norm() / expected.float().norm()
            assert off < (1e-6 if dtype is torch.float32 else 1e-2)


def test_without_a_compiler_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **options: object) -> object:
        def call(*args: object) -> None:
            raise RuntimeError("no g++ here\nand much more")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    compiled_ops.cache_clear()
    with pytest.raises(TrainingError, match=r"--compile: .*needs g\+\+.*no g\+\+ here$"):
        compiled_ops(CPU, torch.float32)
    compiled_ops.cache_clear()


def test_what_computes_something_else_is_left_alone(gemma2: Path, gpt2: Path) -> None:
    for directory in (gemma2, gpt2):  # (1 + weight) and GELU
        assert make_lean(load_model("tiny", directory, torch.float32, CPU)) == 0


def test_a_norm_with_more_to_say_is_left_alone(llama: Path) -> None:
    class Gated(LlamaRMSNorm):
        def forward(self, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
            y: torch.Tensor = super().forward(x)
            return y if gate is None else y * gate

    model = load_model("tiny", llama, torch.float32, CPU)
    gated: nn.Module = Gated(32)
    model.model.norm = gated
    make_lean(model)
    assert model.model.norm is gated
