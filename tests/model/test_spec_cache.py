"""What is kept of a model's config is what would be read again, and no more."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from lorax_serve.checkpoint import spec_cache
from lorax_serve.checkpoint.architectures import read_spec
from lorax_serve.checkpoint.spec import DecoderSpec
from lorax_serve.checkpoint.spec_cache import load_spec


@pytest.fixture
def directory(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A config with rope numbers that are not round, and an empty cache."""
    monkeypatch.setenv("LORAX_CACHE", str(tmp_path / "cache"))
    config = json.loads((tiny_model / "config.json").read_text())
    config["rope_parameters"] = {
        "rope_type": "llama3",
        "rope_theta": 10007.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def same(a: DecoderSpec, b: DecoderSpec) -> bool:
    return all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y and type(x) is type(y)
        for x, y in (
            (getattr(a, field.name), getattr(b, field.name)) for field in dataclasses.fields(a)
        )
    )


def test_the_second_time_nothing_is_read_with_transformers(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = load_spec(directory)
    assert same(fresh, read_spec(directory))
    monkeypatch.setattr(spec_cache, "read_spec", None)
    assert same(load_spec(directory), fresh)


def test_a_spec_without_rope_is_kept_too(
    tiny_gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAX_CACHE", str(tmp_path))
    fresh = load_spec(tiny_gpt2)
    assert fresh.inv_freq is None
    monkeypatch.setattr(spec_cache, "read_spec", None)
    assert same(load_spec(tiny_gpt2), fresh)


def test_a_changed_file_is_read_again(directory: Path) -> None:
    before = load_spec(directory)
    (directory / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    after = load_spec(directory)
    assert (before.eos_token_ids, after.eos_token_ids) == ((2,), (2, 5))


def test_a_damaged_entry_is_read_again(directory: Path) -> None:
    fresh = load_spec(directory)
    (entry,) = (directory / "cache" / "specs").iterdir()
    entry.write_text(entry.read_text()[:40])
    assert same(load_spec(directory), fresh)
    assert same(load_spec(directory), fresh)
