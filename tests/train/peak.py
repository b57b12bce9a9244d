"""The peak memory of a training beyond the loaded model, and its estimate: bytes, on stdout.

Run as ``python -m tests.train.peak ROWS LENGTH LAYERS HIDDEN DROPOUT``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lorax_train.config import InjectionConfig, LoopConfig, OptimizerConfig
from lorax_train.data.encode import Example
from lorax_train.loop.estimate import estimate
from lorax_train.loop.loss import TargetLoss
from lorax_train.loop.trainer import Trainer
from lorax_train.loop.training_run import TrainingRun
from lorax_train.memory import peak_memory
from lorax_train.model.inject import inject


def main() -> None:
    torch.set_num_threads(1)
    rows, length, layers, hidden = map(int, sys.argv[1:5])
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    build: Any = LlamaForCausalLM
    model = build(config).requires_grad_(False).eval()
    row = Example(tuple(range(length)), (False,) + (True,) * (length - 1), "row")
    loss = TargetLoss.prepare(model, row)
    adapter = inject(model, InjectionConfig(r=16, dropout=float(sys.argv[5])), "peak", 0)
    loss.routing = adapter.routing
    loop = LoopConfig(max_steps=2, batch_size=rows)
    run = TrainingRun(adapter, [row] * rows, [], OptimizerConfig(), loop)
    need = estimate(model, [run], loss)
    # Not getrusage's, which begins with what the parent process held when it started this one.
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_memory(model.device) or 0
    Trainer(loss, [run], 0).train()
    print(need.to_come, (peak_memory(model.device) or 0) - before)


if __name__ == "__main__":
    main()
