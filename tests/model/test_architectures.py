"""What is read from a base model's files, in which forms, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorax_serve.adapter import ModuleKind, ModuleShape
from lorax_serve.checkpoint.architectures import read_spec
from lorax_serve.config import EngineConfig
from lorax_serve.core import Batch, SamplingParams, Sequence
from lorax_serve.errors import ModelUnsupported
from lorax_serve.model.runner import ModelRunner
from tests.model.logits_runner import LogitsRunner

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def gpt2_copy(tiny_gpt2: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_gpt2, tmp_path / "gpt2"))


def rewrite(model: Path, change: Callable[[Tensors], Tensors]) -> None:
    save_file(change(load_file(model / "model.safetensors")), model / "model.safetensors")


def configure(model: Path, **settings: object) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def logits(model: Path) -> torch.Tensor:
    runner = LogitsRunner(EngineConfig(model=str(model), dtype="float32"))
    prompt = list(range(5, 45))
    sequence = Sequence(0, prompt, len(prompt), None, SamplingParams(), 9, 0, frozenset())
    sequence.kv_slot = 0
    runner.step(Batch(prefills=[(sequence, len(prompt))]))
    return runner.logits[0]


def without_prefix(tensors: Tensors) -> Tensors:
    """As the first GPT-2 checkpoints are: of the inner model, with its buffers."""
    found = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    for layer in range(2):
        found[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 256, 256).tril()
        found[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    return found


def test_a_gpt2_checkpoint_of_the_inner_model_is_read(tiny_gpt2: Path, gpt2_copy: Path) -> None:
    rewrite(gpt2_copy, without_prefix)
    assert "h.0.attn.c_attn.weight" in load_file(gpt2_copy / "model.safetensors")
    assert torch.equal(logits(gpt2_copy), logits(tiny_gpt2))


@pytest.mark.parametrize("prefix", ["transformer.", ""])
@pytest.mark.parametrize(
    "name",
    ["wpe.weight", "ln_f.bias", "h.1.ln_2.bias", "h.1.attn.c_attn.bias", "h.0.mlp.c_fc.bias"],
)
def test_a_missing_tensor_is_named_as_the_file_names_its_own(
    gpt2_copy: Path, prefix: str, name: str
) -> None:
    def drop(tensors: Tensors) -> Tensors:
        tensors = tensors if prefix else without_prefix(tensors)
        return {key: tensor for key, tensor in tensors.items() if key != prefix + name}

    rewrite(gpt2_copy, drop)
    with pytest.raises(ModelUnsupported, match=f"has no tensor {prefix}{name}"):
        logits(gpt2_copy)


def test_a_left_over_tensor_is_refused(gpt2_copy: Path) -> None:
    rewrite(
        gpt2_copy, lambda tensors: tensors | {"transformer.h.0.attn.q_attn.weight": torch.ones(1)}
    )
    with pytest.raises(ModelUnsupported, match=r"transformer\.h\.0\.attn\.q_attn\.weight is not"):
        logits(gpt2_copy)


def test_the_modules_of_gpt2_are_those_of_transformers(tiny_gpt2: Path) -> None:
    spec = read_spec(tiny_gpt2)
    modules = spec.modules()
    linears = {ModuleKind.LINEAR, ModuleKind.OUTPUT}
    assert [path for path, shape in modules.items() if shape.kind in linears] == [
        *(
            f"transformer.h.{layer}.{name}"
            for layer in range(2)
            for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
        ),
        "lm_head",
    ]
    assert modules["transformer.h.1.attn.c_attn"] == ModuleShape(48, 144, has_bias=True)
    assert modules["transformer.h.1.mlp.c_proj"] == ModuleShape(192, 48, has_bias=True)
    assert modules["lm_head"] == (48, 128, ModuleKind.OUTPUT, False, "transformer.wte")
    assert spec.max_positions == 256
    stored = load_file(tiny_gpt2 / "model.safetensors")
    assert spec.num_parameters == sum(t.numel() for t in stored.values() if t.ndim == 2)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"activation_function": "quick_gelu"}, "activation_function='quick_gelu'; only 'gelu'"),
        ({"scale_attn_weights": False}, "scale_attn_weights=False; only True"),
        (
            {"scale_attn_by_inverse_layer_idx": True},
            "scale_attn_by_inverse_layer_idx=True; only False",
        ),
        ({"add_cross_attention": True}, "add_cross_attention=True; only False"),
        ({"architectures": ["GPT2DoubleHeadsModel"]}, r"GPT2DoubleHeadsModel.* is not served"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config"),
    ],
)
def test_a_gpt2_setting_that_is_not_computed_is_refused_by_name(
    gpt2_copy: Path, settings: dict[str, object], said: str
) -> None:
    configure(gpt2_copy, **settings)
    with pytest.raises(ModelUnsupported, match=said):
        read_spec(gpt2_copy)


def test_a_llama_setting_that_is_not_computed_is_refused_by_name(
    tiny_model: Path, tmp_path: Path
) -> None:
    shutil.copy(tiny_model / "config.json", tmp_path)
    configure(tmp_path, hidden_act="gelu")
    with pytest.raises(ModelUnsupported, match="hidden_act='gelu'; only 'silu'"):
        read_spec(tmp_path)


def test_the_order_of_attentions_products_does_not_matter(tiny_gpt2: Path, gpt2_copy: Path) -> None:
    configure(gpt2_copy, reorder_and_upcast_attn=True)
    assert torch.equal(logits(gpt2_copy), logits(tiny_gpt2))


def test_compiled_kernels_say_what_they_are_not_written_for(tiny_gpt2: Path) -> None:
    with pytest.raises(ModelUnsupported, match="compiled: they are not written for layer norm"):
        ModelRunner(EngineConfig(model=str(tiny_gpt2), dtype="float32", kernels="compiled"))


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_torch_takes_over_where_the_kernels_are_not_written(tiny_gpt2: Path, dtype: str) -> None:
    runner = ModelRunner(EngineConfig(model=str(tiny_gpt2), dtype=dtype))
    assert runner.max_length == 256
    runner.warm_up()


def test_a_sequence_is_no_longer_than_the_table_of_positions(tiny_gpt2: Path) -> None:
    with pytest.raises(ModelUnsupported, match=r"max_sequence_length 257: .* limit is 256"):
        ModelRunner(EngineConfig(model=str(tiny_gpt2), max_sequence_length=257))
