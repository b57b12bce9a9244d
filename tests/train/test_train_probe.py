"""The probe that a run stores, checked against what the server's runner computes."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from lorax_serve.adapter import CONFIG_FILE, WEIGHTS_FILE, read
from lorax_serve.adapter.probe import Outcome, Probe, ProbeResult, check
from lorax_serve.checkpoint.fingerprint import base_fingerprint
from lorax_serve.config import EngineConfig
from lorax_serve.core import BASE, Batch, SamplingParams, Sequence
from lorax_train.config import (
    DataConfig,
    InjectionConfig,
    LoopConfig,
    OptimizerConfig,
    OutputConfig,
    TrainConfig,
)
from lorax_train.console import Console
from lorax_train.run import train
from tests.helpers import TINY_LLAMA, needs_kernels, save_tiny_model
from tests.model.logits_runner import LogitsRunner, load

Rows = list[dict[str, Any]]
Configure = Callable[..., TrainConfig]
WriteRows = Callable[..., Path]
Tensors = dict[str, torch.Tensor]


def trained(config: TrainConfig) -> tuple[Path, str]:
    """Train; returns the adapter's directory, and what the run said."""
    stream = io.StringIO()
    directory = train(config, Console(stream)).directory
    assert directory is not None
    return directory, stream.getvalue()


def stored(directory: Path) -> Probe:
    probe = Probe.from_metadata(read(directory).metadata)
    assert probe is not None
    return probe


class Server:
    """Checks adapters as a server does that has ``model``."""

    def __init__(self, model: Path, kernels: str, dtype: str) -> None:
        self.fingerprint = base_fingerprint(model)
        self.dtype = dtype
        config = EngineConfig(str(model), dtype=dtype, kernels=kernels, max_sequence_length=64)
        self.runner = LogitsRunner(config)

    def check(self, directory: Path) -> ProbeResult:
        probe = stored(directory)
        load(self.runner, 0, directory)
        ids = [token for token, _ in probe.top]
        adapter, base = (self.logits(probe, slot)[ids].tolist() for slot in (0, BASE))
        return check(probe, adapter, base, self.fingerprint, self.dtype)

    def logits(self, probe: Probe, slot: int) -> torch.Tensor:
        tokens = list(probe.token_ids)
        sequence = Sequence(
            0, tokens, len(tokens), None, SamplingParams(), 1, 0, frozenset(), kv_slot=0
        )
        sequence.adapter_slot = slot
        self.runner.step(Batch(prefills=[(sequence, len(tokens))]))
        return self.runner.logits[0]


def changed(directory: Path, name: str, change: Callable[[Tensors, dict[str, Any]], None]) -> Path:
    """A copy of an adapter whose tensors or config were changed after training."""
    copy = directory.with_name(name)
    shutil.copytree(directory, copy)
    tensors = safetensors.torch.load_file(copy / WEIGHTS_FILE)
    config = json.loads((copy / CONFIG_FILE).read_text())
    change(tensors, config)
    safetensors.torch.save_file(tensors, copy / WEIGHTS_FILE, dict(read(directory).metadata))
    (copy / CONFIG_FILE).write_text(json.dumps(config))
    return copy


def _double_alpha(tensors: Tensors, config: dict[str, Any]) -> None:
    config["lora_alpha"] *= 2


def _zero_b(tensors: Tensors, config: dict[str, Any]) -> None:
    for name, tensor in tensors.items():
        if "lora_B" in name:
            tensor.zero_()


def _rotate_layers(tensors: Tensors, config: dict[str, Any]) -> None:
    count = 1 + max(int(name.split(".")[4]) for name in tensors)
    kept = dict(tensors)
    for name in kept:
        parts = name.split(".")
        parts[4] = str((int(parts[4]) + 1) % count)
        tensors[name] = kept[".".join(parts)]


DAMAGE = [_double_alpha, _zero_b, _rotate_layers]


@pytest.fixture(scope="module")
def adapter(embedded_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small adapter of SmolLM2 after a few steps."""
    root = tmp_path_factory.mktemp("smollm2")
    rows = [{"text": f"Note: rent due {i} May 2021\nDate: 2021050{i}"} for i in range(1, 3)]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = TrainConfig(
        DataConfig(root / "rows.jsonl"),
        OutputConfig(root / "adapter"),
        device="cpu",
        dtype="float32",
        lora=InjectionConfig(r=4),
        optimizer=OptimizerConfig(lr=1e-2, schedule="constant"),
        loop=LoopConfig(max_steps=2, batch_size=2),
    )
    return trained(config)[0]


@pytest.mark.parametrize(
    ("kernels", "dtype"),
    [
        ("torch", "float32"),
        pytest.param("compiled", "float32", marks=needs_kernels),
        pytest.param("compiled", "bfloat16", marks=needs_kernels),
    ],
)
def test_the_server_computes_what_was_trained_and_sees_what_was_not(
    kernels: str, dtype: str, adapter: Path, embedded_model: Path, tmp_path: Path
) -> None:
    probe = stored(adapter)
    assert len(probe.top) == 16
    assert probe.effect > 3 * probe.tolerance("bfloat16")
    server = Server(embedded_model, kernels, dtype)
    result = server.check(adapter)
    assert (result.outcome, result.message, result.warnings) == (Outcome.PASSED, "", ())
    assert result.difference < result.tolerance / 2
    for damage in DAMAGE:
        copy = changed(adapter, f"{damage.__name__}-{kernels}-{dtype}", damage)
        result = server.check(copy)
        assert result.outcome is Outcome.WRONG_ADAPTER, damage
        assert result.difference > 2 * result.tolerance, damage


def test_another_base_is_seen(
    tiny_model: Path, configure: Configure, write_rows: WriteRows, tmp_path: Path
) -> None:
    rows = [{"prompt": f"w{i + 50} w9 w11 w{i + 6}", "completion": f"w{i + 40}"} for i in range(8)]
    directory, _ = trained(configure(tiny_model, write_rows(rows)))
    assert Server(tiny_model, "torch", "float32").check(directory).passed
    save_tiny_model(tmp_path / "other", TINY_LLAMA, seed=8)
    result = Server(tmp_path / "other", "torch", "float32").check(directory)
    assert result.outcome is Outcome.WRONG_BASE
    assert "and its weights are others" in result.message


def test_what_is_probed_is_what_is_saved(
    tiny_model: Path, configure: Configure, write_rows: WriteRows
) -> None:
    """A and B rounded to bfloat16 move the logits by more than computing them twice does."""
    rows = [{"text": f"w{i + 50} w9 w11 w{i + 6} w{i + 40}"} for i in range(8)]
    server = Server(tiny_model, "torch", "float32")
    directories = []
    for save_dtype in ("float32", "bfloat16"):
        config = configure(tiny_model, write_rows(rows), out=save_dtype, lr=5e-2)
        output = dataclasses.replace(config.output, save_dtype=save_dtype)
        directories.append(trained(dataclasses.replace(config, output=output))[0])
    exact, rounded = directories
    for directory in directories:
        assert server.check(directory).difference < 1e-4
    mixed = changed(rounded, "mixed", lambda tensors, config: tensors.update(read(exact).tensors))
    assert server.check(mixed).difference > 5e-4


def test_held_out_rows_are_taken_first_and_short_ones_repeated(
    llama: Path, configure: Configure, write_rows: WriteRows
) -> None:
    data = DataConfig(write_rows([{"text": "x"}] * 4), write_rows([{"text": "y" * 50}], "e.jsonl"))
    directory, said = trained(configure(llama, data, out="held-out"))
    probe = stored(directory)
    assert 4 <= len(probe.token_ids) <= 32
    assert len(set(probe.token_ids)) == 1
    assert f"probe      {len(probe.token_ids)} tokens, stored for the server's check" in said
    directory, _ = trained(configure(llama, write_rows([{"text": "x"}] * 4), out="training"))
    assert len(set(stored(directory).token_ids)) == 2  # x and the end of the text


def test_an_adapter_that_learned_nothing_is_warned_of(
    llama: Path, configure: Configure, write_rows: WriteRows, pairs: Rows
) -> None:
    _, said = trained(configure(llama, write_rows(pairs), lr=1e-9))
    assert "the adapter hardly differs from the base model" in said


def test_a_base_without_safetensors_leaves_no_probe(
    llama: Path, configure: Configure, write_rows: WriteRows, pairs: Rows, tmp_path: Path
) -> None:
    old = shutil.copytree(llama, tmp_path / "old")
    weights = safetensors.torch.load_file(old / "model.safetensors")
    torch.save(weights, old / "pytorch_model.bin")
    (old / "model.safetensors").unlink()
    directory, said = trained(configure(old, write_rows(pairs)))
    assert "no probe will be stored with the adapter" in said
    assert Probe.from_metadata(read(directory).metadata) is None
