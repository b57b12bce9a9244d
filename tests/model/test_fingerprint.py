"""The fingerprint of base weights: the same for the same weights however they are stored."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model, LlamaConfig

from lorax_serve.checkpoint.fingerprint import base_fingerprint
from lorax_serve.errors import ModelUnsupported
from tests.helpers import TINY_LLAMA, save_tiny_model

Tensors = dict[str, torch.Tensor]


def stored(directory: Path) -> Tensors:
    tensors: Tensors = safetensors.torch.load_file(directory / "model.safetensors")
    return tensors


def store(directory: Path, tensors: Tensors) -> Path:
    directory.mkdir(exist_ok=True)
    safetensors.torch.save_file(tensors, directory / "model.safetensors")
    return directory


def shard(directory: Path, tensors: Tensors) -> Path:
    """Two shards that take the tensors in turn, and an index."""
    directory.mkdir()
    names = sorted(tensors)
    parts = {"b.safetensors": names[::2], "a.safetensors": names[1::2]}
    for file, part in parts.items():
        safetensors.torch.save_file({name: tensors[name] for name in part}, directory / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (directory / "model.safetensors.index.json").write_text(index)
    return directory


def test_storage_does_not_matter(tiny_model: Path, tmp_path: Path) -> None:
    tensors = stored(tiny_model)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    half = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    old = tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    fingerprint = base_fingerprint(tiny_model)
    assert len(fingerprint) == 64
    assert base_fingerprint(store(tmp_path / "half", half)) == fingerprint
    assert base_fingerprint(shard(tmp_path / "shards", half)) == fingerprint
    assert base_fingerprint(store(tmp_path / "old", old)) == fingerprint


def test_a_stored_copy_of_a_tied_head_does_not_matter(tmp_path: Path) -> None:
    tied: dict[str, Any] = TINY_LLAMA.to_diff_dict() | {"tie_word_embeddings": True}
    save_tiny_model(tmp_path / "tied", LlamaConfig(**tied))
    tensors = stored(tmp_path / "tied")
    assert "lm_head.weight" not in tensors
    embedding = tensors["model.embed_tokens.weight"]
    fingerprint = base_fingerprint(tmp_path / "tied")
    copied = tensors | {"lm_head.weight": embedding.clone()}
    assert base_fingerprint(store(tmp_path / "copied", copied)) == fingerprint
    untied = tensors | {"lm_head.weight": embedding + 1}
    assert base_fingerprint(store(tmp_path / "untied", untied)) != fingerprint


def test_gpt2s_prefix_and_masks_do_not_matter(tmp_path: Path) -> None:
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=40))
    model.save_pretrained(tmp_path / "whole")
    inner: GPT2Model = model.transformer
    bare = {name: tensor.clone() for name, tensor in inner.state_dict().items()}
    masks = {"h.0.attn.bias": torch.ones(1, 1, 4, 4), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    assert all(name.startswith("transformer.") for name in stored(tmp_path / "whole"))
    want = base_fingerprint(tmp_path / "whole")
    assert base_fingerprint(store(tmp_path / "bare", bare | masks)) == want
    bare["h.0.attn.c_attn.bias"] += 1
    assert base_fingerprint(store(tmp_path / "other", bare)) != want


def _nudge(tensors: Tensors) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"] *= 1.01


def _swap_layers(tensors: Tensors) -> None:
    first, second = (f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2))
    tensors[first], tensors[second] = tensors[second], tensors[first]


def _drop(tensors: Tensors) -> None:
    del tensors["model.norm.weight"]


def _reshape(tensors: Tensors) -> None:
    name = "model.layers.0.self_attn.o_proj.weight"
    tensors[name] = tensors[name].reshape(96, 48)


def _one_of_a_norm(tensors: Tensors) -> None:
    tensors["model.layers.0.input_layernorm.weight"][31] += 0.1  # small: all of it is read


@pytest.mark.parametrize("change", [_nudge, _swap_layers, _drop, _reshape, _one_of_a_norm])
def test_other_weights_differ(
    change: Callable[[Tensors], None], tiny_model: Path, tmp_path: Path
) -> None:
    tensors = stored(tiny_model)
    change(tensors)
    assert base_fingerprint(store(tmp_path / "x", tensors)) != base_fingerprint(tiny_model)


def test_samples_are_spread_over_rows_and_columns(tiny_model: Path, tmp_path: Path) -> None:
    """Each half of the rows or columns of a matrix that is changed alone is seen."""
    name, want = "model.embed_tokens.weight", base_fingerprint(tiny_model)
    for part in (slice(0, 64), slice(64, 128)):
        tensors = stored(tiny_model)
        tensors[name][part] += 1
        assert base_fingerprint(store(tmp_path / "rows", tensors)) != want
    for part in (slice(0, 12), slice(12, 24), slice(24, 36), slice(36, 48)):
        tensors = stored(tiny_model)
        tensors[name][:, part] += 1
        assert base_fingerprint(store(tmp_path / "columns", tensors)) != want


def test_other_models_differ(tiny_model: Path, embedded_model: Path, tmp_path: Path) -> None:
    save_tiny_model(tmp_path, TINY_LLAMA, seed=8)
    found = {base_fingerprint(path) for path in (tiny_model, embedded_model, tmp_path)}
    assert len(found) == 3


def test_what_is_not_there_or_damaged_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelUnsupported, match="only safetensors weights are read"):
        base_fingerprint(tmp_path)
    whole = (tiny_model / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-1])
    with pytest.raises(ModelUnsupported, match="is not a whole safetensors file"):
        base_fingerprint(tmp_path)
    shard(tmp_path / "shards", stored(tiny_model))
    (tmp_path / "shards" / "a.safetensors").unlink()
    with pytest.raises(ModelUnsupported, match=r"a\.safetensors is not a whole safetensors file"):
        base_fingerprint(tmp_path / "shards")
