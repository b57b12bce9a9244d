"""Tiny random models with a byte tokenizer, built on the spot: no network, no files in the tree."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, pre_tokenizers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from lorax_train.config import DataConfig, LoopConfig, OptimizerConfig, OutputConfig, TrainConfig
from lorax_train.data.tokenizer import Tokenizer, load_tokenizer

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
VOCABULARY = 264


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny products gain nothing from a second thread, and wait for it where cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _save(model: PreTrainedModel, directory: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:  # larger than usual, so that LoRA's part of the logits is seen
            parameter.data.normal_(std=0.3, generator=generator)
    model.save_pretrained(directory)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = RawTokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    build: Callable[..., Any] = PreTrainedTokenizerFast
    tokenizer = build(
        tokenizer_object=raw,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",  # as SmolLM2 and many base models have it
        additional_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=None,
    )
    return _save(LlamaForCausalLM(config), tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=2,
        n_positions=128,
        bos_token_id=None,
        eos_token_id=None,
    )
    return _save(GPT2LMHeadModel(config), tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="session")
def gemma2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that post-processes its logits."""
    config = Gemma2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        final_logit_softcapping=1.0,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return _save(Gemma2ForCausalLM(config), tmp_path_factory.mktemp("gemma2"))


@pytest.fixture(scope="session")
def base(request: pytest.FixtureRequest) -> Path:
    """The model directory whose fixture is named by an indirect parameter."""
    directory: Path = request.getfixturevalue(request.param)
    return directory


@pytest.fixture(scope="session")
def tokenizer(llama: Path) -> Tokenizer:
    return load_tokenizer("tiny", llama, chat=True)


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    """``write_rows(rows, name="rows.jsonl")`` writes objects as JSONL."""

    def write(rows: list[dict[str, Any]], name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture
def pairs() -> list[dict[str, Any]]:
    """Sixteen prompts and completions of unlike lengths."""
    return [{"prompt": f"{'ab' * (i % 5)}{i}:", "completion": f" {i * i}"} for i in range(16)]


@pytest.fixture
def configure(tmp_path: Path) -> Callable[..., TrainConfig]:
    """``configure(model, data, out="out", lr=..., steps=..., **parts)``: a short float32 run."""

    def make(
        model: Path,
        data: Path | DataConfig,
        *,
        out: str = "out",
        lr: float = 1e-2,
        steps: int = 3,
        **parts: Any,
    ) -> TrainConfig:
        parts["data"] = DataConfig(data) if isinstance(data, Path) else data
        parts.setdefault("output", OutputConfig(tmp_path / out))
        parts.setdefault("loop", LoopConfig(max_steps=steps, batch_size=4))
        parts.setdefault("optimizer", OptimizerConfig(lr=lr))
        return TrainConfig(model=str(model), device="cpu", dtype="float32", **parts)

    return make


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[], AbstractContextManager[None]]:
    """Within ``with full_disk():`` nothing can be made durable."""

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    @contextmanager
    def context() -> Iterator[None]:
        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", full)
            yield

    return context
