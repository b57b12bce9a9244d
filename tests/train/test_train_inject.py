from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from lorax_serve.errors import TrainingError
from lorax_train.base import load_model
from lorax_train.batches import Batch, collate
from lorax_train.config import InjectionConfig
from lorax_train.encode import Example
from lorax_train.inject import init_a, inject, module_shapes
from lorax_train.loss import TargetLoss
from lorax_train.targets import resolve_targets

CPU = torch.device("cpu")


def load(directory: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return load_model("tiny", directory, dtype, CPU)


def some_batch() -> Batch:
    rows = [Example((5, 6, 7, 8, 9, 10), (False, False, True, True, True, True), "a")]
    rows += [Example((11, 12, 13), (False, True, True), "b")]
    return collate(rows, pad_id=0)


@pytest.mark.parametrize("base", ["llama", "gpt2"], indirect=True)
@pytest.mark.parametrize("rslora", [False, True])
def test_one_steps_gradients_are_pefts(base: Path, rslora: bool) -> None:
    ours = load(base)
    adapter = inject(ours, InjectionConfig(r=4, alpha=6, rslora=rslora), "tiny", seed=0)
    peft_model: Any = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        LoraConfig(
            r=4,
            lora_alpha=6,
            use_rslora=rslora,
            target_modules="all-linear",
            fan_in_fan_out=adapter.config.fan_in_fan_out,
            task_type="CAUSAL_LM",
        ),
    ).eval()
    theirs = {
        name.replace(".default", ""): parameter
        for name, parameter in peft_model.named_parameters()
        if "lora_" in name
    }
    torch.manual_seed(1)
    for layer in adapter.layers.values():  # with B = 0 there is no gradient for A to compare
        torch.nn.init.normal_(layer.lora_b, std=0.1)
    copies = adapter.tensors(torch.float32)
    assert copies.keys() == theirs.keys()
    for name, tensor in copies.items():
        theirs[name].data.copy_(tensor)

    batch = some_batch()
    loss = TargetLoss.check(ours, batch)
    assert loss.head_on_targets
    mean: torch.Tensor = loss(batch) / batch.n_targets
    mean.backward()  # type: ignore[no-untyped-call]
    logits = peft_model(input_ids=batch.tokens, attention_mask=batch.attention).logits
    labels = batch.tokens.masked_fill(~batch.trained, -100)
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    expected.backward()  # type: ignore[no-untyped-call]

    torch.testing.assert_close(mean, expected, atol=1e-5, rtol=0)
    for path, layer in adapter.layers.items():
        for side, weight in (("A", layer.lora_a), ("B", layer.lora_b)):
            gradient = theirs[f"base_model.model.{path}.lora_{side}.weight"].grad
            assert gradient is not None
            torch.testing.assert_close(weight.grad, gradient, atol=1e-5, rtol=1e-5)


def test_a_fresh_adapter_changes_nothing(llama: Path) -> None:
    batch = some_batch()
    before = TargetLoss(load(llama), head_on_targets=False).all_logits(batch)
    model = load(llama)
    inject(model, InjectionConfig(), "tiny", seed=0)
    assert torch.equal(TargetLoss(model, head_on_targets=False).all_logits(batch), before)


def test_only_the_adapter_is_trained_in_float32(llama: Path) -> None:
    model = load(llama, torch.bfloat16)
    adapter = inject(model, InjectionConfig(), "tiny", seed=0)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert set(map(id, trained)) == set(map(id, adapter.parameters()))
    assert {p.dtype for p in trained} == {torch.float32}
    loss: torch.Tensor = TargetLoss(model, head_on_targets=True)(some_batch())
    loss.backward()  # type: ignore[no-untyped-call]
    assert {p.grad.dtype for p in trained if p.grad is not None} == {torch.float32}


def test_dropout_acts_in_training_only_and_on_the_branch_only(llama: Path) -> None:
    model = load(llama)
    adapter = inject(model, InjectionConfig(dropout=0.5, targets="down_proj"), "tiny", seed=0)
    layer = adapter.layers["model.layers.0.mlp.down_proj"]
    x = torch.randn(1, 200, 48)
    adapter.train(True)
    assert torch.equal(layer(x), layer.base(x))  # B = 0: only the branch may have been dropped
    torch.nn.init.normal_(layer.lora_b)
    torch.manual_seed(0)
    first, second = layer(x), layer(x)
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    kept = F.dropout(x, 0.5) @ layer.lora_a.T @ layer.lora_b.T * layer.scale
    torch.testing.assert_close(first, layer.base(x) + kept, atol=1e-4, rtol=1e-4)
    adapter.train(False)
    assert torch.equal(layer(x), layer(x))


def test_kaiming_is_pefts_range_and_gaussian_the_ancestors_deviation() -> None:
    generator = torch.Generator().manual_seed(0)
    kaiming = init_a(64, 400, "kaiming", generator)
    assert 0.045 < kaiming.abs().max().item() <= 0.05  # 1/sqrt(400)
    gaussian = init_a(64, 400, "gaussian", generator)
    assert gaussian.std().item() == pytest.approx(0.01, rel=0.05)


Q0, Q1 = (f"model.layers.{i}.self_attn.q_proj" for i in range(2))


def test_targets_are_resolved_as_peft_resolves_the_written_names(llama: Path, gpt2: Path) -> None:
    shapes = module_shapes(load(llama))
    every, names = resolve_targets("all-linear", shapes)
    assert len(every) == 14
    assert "lm_head" not in names
    assert resolve_targets("qkv", shapes)[1] == ("k_proj", "q_proj", "v_proj")
    assert resolve_targets("q_proj, o_proj", shapes)[1] == ("o_proj", "q_proj")
    assert resolve_targets(r"regex:.*\.0\..*q_proj", shapes) == ([Q0], (Q0,))
    assert resolve_targets(r"regex:.*q_proj", shapes) == ([Q0, Q1], ("q_proj",))
    assert resolve_targets("lm_head", shapes)[0] == ["lm_head"]
    gpt2_shapes = module_shapes(load(gpt2))
    assert resolve_targets("qkv", gpt2_shapes)[1] == ("c_attn",)
    assert gpt2_shapes["transformer.h.0.attn.c_attn"][:2] == (32, 96)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("q_proj,nope", r"--targets: target_modules \('nope'\) matches no linear module"),
        ("q_proj,", "--targets 'q_proj,': there is an empty name"),
        ("regex:(", "--targets: .* is not a regular expression"),
        ("regex:nope", "--targets: .* matches no linear module"),
    ],
)
def test_bad_targets_are_refused(llama: Path, spec: str, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        resolve_targets(spec, module_shapes(load(llama)))


def test_qkv_of_an_unknown_architecture_is_refused(llama: Path) -> None:
    shapes = module_shapes(load(llama))
    others = {path: shape for path, shape in shapes.items() if "mlp" in path}
    with pytest.raises(TrainingError, match=r"--targets qkv: .* named down_proj, gate_proj"):
        resolve_targets("qkv", others)


def test_a_model_that_changes_its_logits_is_not_cut_short(gemma2: Path) -> None:
    model = load(gemma2)
    batch = some_batch()
    loss = TargetLoss.check(model, batch)
    assert not loss.head_on_targets
    logits = model(input_ids=batch.tokens, attention_mask=batch.attention).logits
    labels = batch.tokens.masked_fill(~batch.trained, -100)[:, 1:].flatten()
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels, reduction="sum")
    torch.testing.assert_close(loss(batch), expected)


def test_missing_weights_are_refused(llama: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for file in llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(TrainingError, match=r"model tiny: 1 tensors are missing.*model\.norm"):
        load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "nope"}')
    with pytest.raises(TrainingError, match="model tiny: cannot be loaded"):
        load(tmp_path)
