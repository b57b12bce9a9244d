"""Dropout in the loop: it takes part in every training step and in no evaluation."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lorax_train.config import DataConfig, InjectionConfig, TrainConfig
from lorax_train.console import Console
from lorax_train.data.batches import collate
from lorax_train.data.encode import encode_rows
from lorax_train.data.rows import read_rows
from lorax_train.data.tokenizer import load_tokenizer
from lorax_train.loop.loss import TargetLoss, summed_loss
from lorax_train.run import TrainResult, train

Rows = list[dict[str, Any]]
Configure = Callable[..., TrainConfig]
WriteRows = Callable[..., Path]


def run(
    configure: Configure, model: Path, data: DataConfig, out: str, dropout: float
) -> TrainResult:
    lora = InjectionConfig(r=4, dropout=dropout)
    return train(configure(model, data, out=out, steps=4, lora=lora), Console(io.StringIO()))


def test_dropout_changes_what_is_learned(
    llama: Path, configure: Configure, write_rows: WriteRows, pairs: Rows
) -> None:
    data = DataConfig(write_rows(pairs))
    plain, dropped = (run(configure, llama, data, f"o{p}", p) for p in (0.0, 0.5))
    theirs = dropped.adapter.tensors(torch.float32)
    for name, tensor in plain.adapter.tensors(torch.float32).items():
        assert not torch.equal(tensor, theirs[name])


def test_held_out_losses_are_measured_without_dropout(
    llama: Path, configure: Configure, write_rows: WriteRows, pairs: Rows
) -> None:
    held_out = write_rows(pairs[:6], "eval.jsonl")
    data = DataConfig(write_rows(pairs), eval_file=held_out)
    result = run(configure, llama, data, "out", 0.5)
    tokenizer = load_tokenizer("tiny", llama, chat=False)
    examples, _ = encode_rows(read_rows(held_out), tokenizer, 100)
    batch = collate(examples, tokenizer.pad_id)
    loss = TargetLoss(result.model, head_on_targets=False)
    result.adapter.train(False)
    without, targets = summed_loss(loss, [batch])
    result.adapter.train(True)
    assert summed_loss(loss, [batch])[0] != pytest.approx(without, abs=1e-3)
    assert result.record.eval_losses[-1] == pytest.approx(without / targets, abs=1e-5)
