"""What tests share: the embedded model, a tiny random model, and adapters made by PEFT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lorax_serve.checkpoint.source import resolve_model
from tests.helpers import TINY_GPT2, TINY_LLAMA, save_peft_adapter, save_tiny_model


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def embedded_model() -> Path:
    """The directory of SmolLM2-135M-Instruct, converted on first use."""
    return resolve_model("smollm2-135m")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama in float32, with a word-level tokenizer."""
    directory = tmp_path_factory.mktemp("tiny-llama")
    save_tiny_model(directory, TINY_LLAMA)
    return directory


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer GPT-2 in float32, with a word-level tokenizer."""
    directory = tmp_path_factory.mktemp("tiny-gpt2")
    save_tiny_model(directory, TINY_GPT2)
    return directory


@pytest.fixture
def make_adapter(tiny_model: Path, tmp_path: Path) -> Callable[..., Path]:
    """Write a random PEFT adapter for the tiny model under ``tmp_path/name``."""

    def make(name: str, seed: int = 0, **config: Any) -> Path:
        torch.manual_seed(seed)
        return save_peft_adapter(tiny_model, tmp_path / name, **config)

    return make
