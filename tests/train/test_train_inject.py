from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from lorax_serve.errors import TrainingError
from lorax_train.config import InjectionConfig
from lorax_train.data.batches import Batch, collate
from lorax_train.data.encode import Example
from lorax_train.loop.loss import TargetLoss
from lorax_train.model.base import load_model
from lorax_train.model.inject import inject, module_shapes
from lorax_train.model.start import init_a
from lorax_train.model.targets import Targets, resolve_targets

CPU = torch.device("cpu")


def load(directory: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return load_model("tiny", directory, dtype, CPU)


def some_rows() -> list[Example]:
    rows = [Example((5, 6, 7, 8, 9, 10), (False, False, True, True, True, True), "a")]
    return [*rows, Example((11, 12, 13), (False, True, True), "b")]


def some_batch() -> Batch:
    return collate(some_rows(), pad_id=0, padded=True)


def padded_inputs() -> dict[str, torch.Tensor]:
    """The same as transformers takes them."""
    batch = some_batch()
    labels = torch.tensor([[-100, -100, 7, 8, 9, 10], [-100, 12, 13, -100, -100, -100]])
    assert batch.mask is not None
    return {"input_ids": batch.tokens, "attention_mask": batch.mask, "labels": labels}


@pytest.mark.parametrize("base", ["llama", "gpt2"], indirect=True)
@pytest.mark.parametrize(
    ("rslora", "dora"), [(False, False), (True, False), (False, True), (True, True)]
)
def test_one_steps_gradients_are_pefts(base: Path, rslora: bool, dora: bool) -> None:
    ours = load(base)
    loss = TargetLoss.prepare(ours, some_rows()[0])
    assert loss.head_on_targets
    assert not loss.padded
    adapter = inject(ours, InjectionConfig(r=4, alpha=6, rslora=rslora, dora=dora), "tiny", seed=0)
    peft_model: Any = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        LoraConfig(
            r=4,
            lora_alpha=6,
            use_rslora=rslora,
            use_dora=dora,
            target_modules="all-linear",
            fan_in_fan_out=adapter.config.fan_in_fan_out,
            task_type="CAUSAL_LM",
        ),
    ).eval()
    theirs = {
        name.replace(".default", "").replace("_vector.weight", "_vector"): parameter
        for name, parameter in peft_model.named_parameters()
        if "lora_" in name
    }
    torch.manual_seed(1)
    for pair in adapter.pairs().values():  # with B = 0 there is no gradient for A to compare
        torch.nn.init.normal_(pair.b, std=0.1)
    copies = adapter.tensors(torch.float32)
    assert copies.keys() == theirs.keys()
    for name, tensor in copies.items():
        theirs[name].data.copy_(tensor)

    loss.routing = adapter.routing
    batch = loss.collate(some_rows(), 0)
    mean = loss(batch)[0] / batch.n_targets
    mean.backward()  # type: ignore[no-untyped-call]
    expected = peft_model(**padded_inputs()).loss
    expected.backward()

    torch.testing.assert_close(mean, expected, atol=1e-5, rtol=0)
    for path, pair in adapter.pairs().items():
        names = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
        for name, weight in zip(names, pair.parameters, strict=False):
            gradient = theirs[f"base_model.model.{path}.{name}"].grad
            assert gradient is not None
            torch.testing.assert_close(weight.grad, gradient, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("dora", "init"), [(False, "kaiming"), (True, "gaussian"), (False, "pissa"), (True, "pissa")]
)
def test_a_fresh_adapter_changes_nothing(llama: Path, dora: bool, init: str) -> None:
    batch = some_batch()
    before = TargetLoss(load(llama)).logits(batch)
    model = load(llama)
    inject(model, InjectionConfig(dora=dora, init=init), "tiny", seed=0)  # type: ignore[arg-type]
    assert torch.equal(TargetLoss(model).logits(batch), before)


def test_only_the_adapter_is_trained_in_float32(llama: Path) -> None:
    model = load(llama, torch.bfloat16)
    adapter = inject(model, InjectionConfig(), "tiny", seed=0)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert set(map(id, trained)) == set(map(id, adapter.parameters()))
    assert {p.dtype for p in trained} == {torch.float32}
    total, _ = TargetLoss(model, head_on_targets=True)(some_batch())
    total.backward()  # type: ignore[no-untyped-call]
    assert {p.grad.dtype for p in trained if p.grad is not None} == {torch.float32}


def test_dropout_acts_in_training_only_and_on_the_branch_only(llama: Path) -> None:
    model = load(llama)
    adapter = inject(model, InjectionConfig(dropout=0.5, targets="down_proj"), "tiny", seed=0)
    layer = adapter.layers["model.layers.0.mlp.down_proj"]
    x = torch.randn(1, 200, 48)
    adapter.train(True)
    assert torch.equal(layer(x), layer.base(x))  # B = 0: only the branch may have been dropped
    (pair,) = layer.pairs
    torch.nn.init.normal_(pair.b)
    layer.routing.draws = {0: 1}
    first, again = layer(x), layer(x)
    assert torch.equal(first, again)  # as when a layer is computed again for its gradient
    layer.routing.draws = {0: 2}
    assert not torch.equal(first, layer(x))
    with torch.no_grad():  # A that picks an element: what it gives is dropped, or doubled
        pair.a.zero_()
        pair.a[0, 3] = 1
        pair.b.zero_()
        pair.b[0, 0] = 1
        branch = (layer(x) - layer.base(x))[0, :, 0] / pair.scale
    kept = branch.abs() > 0
    assert 60 < kept.sum() < 140
    torch.testing.assert_close(branch[kept], 2 * x[0, kept, 3], atol=1e-4, rtol=1e-4)
    adapter.train(False)
    whole = (layer(x) - layer.base(x))[0, :, 0] / pair.scale
    torch.testing.assert_close(whole, x[0, :, 3], atol=1e-4, rtol=1e-4)


def test_kaiming_is_pefts_range_and_gaussian_the_ancestors_deviation() -> None:
    generator = torch.Generator().manual_seed(0)
    kaiming = init_a(64, 400, "kaiming", generator)
    assert 0.045 < kaiming.abs().max().item() <= 0.05  # 1/sqrt(400)
    gaussian = init_a(64, 400, "gaussian", generator)
    assert gaussian.std().item() == pytest.approx(0.01, rel=0.05)


Q0, Q1 = (f"model.layers.{i}.self_attn.q_proj" for i in range(2))


def test_targets_are_resolved_as_peft_resolves_the_written_names(llama: Path, gpt2: Path) -> None:
    shapes = module_shapes(load(llama))
    every = resolve_targets("all-linear", shapes)
    assert len(every.paths) == 14
    assert not {"lm_head", "embed_tokens"} & set(every.names)
    assert resolve_targets("qkv", shapes).names == ("k_proj", "q_proj", "v_proj")
    assert resolve_targets("query,value", shapes).names == ("q_proj", "v_proj")
    assert resolve_targets("qkv,o_proj", shapes).names == ("k_proj", "o_proj", "q_proj", "v_proj")
    assert resolve_targets("q_proj, o_proj", shapes).names == ("o_proj", "q_proj")
    assert resolve_targets(r"regex:.*\.0\..*q_proj", shapes) == Targets([Q0], (Q0,))
    assert resolve_targets(r"regex:.*q_proj", shapes) == Targets([Q0, Q1], ("q_proj",))
    assert resolve_targets("lm_head", shapes).paths == ["lm_head"]
    assert resolve_targets("embed_tokens", shapes).paths == ["model.embed_tokens"]
    gpt2_shapes = module_shapes(load(gpt2))
    assert resolve_targets("qkv", gpt2_shapes).names == ("c_attn",)
    assert resolve_targets("wte", gpt2_shapes).paths == ["transformer.wte"]
    assert gpt2_shapes["transformer.h.0.attn.c_attn"][:2] == (32, 96)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("q_proj,nope", r"--targets: target_modules \('nope'\) matches no linear module"),
        ("q_proj,", "--targets 'q_proj,': there is an empty name"),
        ("regex:(", "--targets: .* is not a regular expression"),
        ("regex:nope", "--targets: .* matches no linear module"),
        ("qproj", "--targets: .* matches no linear module.*; did you mean q_proj"),
        ("lm_heads,q_proj", "did you mean lm_head"),
    ],
)
def test_bad_targets_are_refused(llama: Path, spec: str, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        resolve_targets(spec, module_shapes(load(llama)))


def test_projections_that_a_model_fuses_are_not_told_apart(gpt2: Path) -> None:
    with pytest.raises(TrainingError, match=r"--targets key: .* together, in c_attn; use .* qkv"):
        resolve_targets("key", module_shapes(load(gpt2)))


def test_layers_narrow_the_targets_as_pefts_layers_to_transform(llama: Path, gpt2: Path) -> None:
    shapes = module_shapes(load(llama))
    assert resolve_targets("q_proj", shapes, (1,)) == Targets([Q1], ("q_proj",), (1,))
    assert resolve_targets("q_proj", shapes, (0, 1)) == Targets([Q0, Q1], ("q_proj",))
    assert len(resolve_targets("all-linear", shapes, (1,)).paths) == 7
    gpt2_shapes = module_shapes(load(gpt2))
    assert resolve_targets("qkv", gpt2_shapes, (0,)).paths == ["transformer.h.0.attn.c_attn"]


@pytest.mark.parametrize(
    ("spec", "layers", "message"),
    [
        ("q_proj", (1, 2), "--layers: there is no layer 2; this model has layers 0 to 1"),
        ("q_proj,lm_head", (1,), "--layers: lm_head is in none of the layers"),
        (r"regex:.*\.0\..*", (1,), "--layers: none of --targets is in these layers"),
    ],
)
def test_layers_that_cannot_be_are_refused(
    llama: Path, spec: str, layers: tuple[int, ...], message: str
) -> None:
    with pytest.raises(TrainingError, match=message):
        resolve_targets(spec, module_shapes(load(llama)), layers)


def test_qkv_of_an_unknown_architecture_is_refused(llama: Path) -> None:
    shapes = module_shapes(load(llama))
    others = {path: shape for path, shape in shapes.items() if "mlp" in path}
    with pytest.raises(TrainingError, match=r"--targets qkv: .* named down_proj, gate_proj"):
        resolve_targets("qkv", others)


def test_a_model_that_changes_its_logits_is_not_cut_short(gemma2: Path) -> None:
    expected = load(gemma2)(**padded_inputs()).loss
    model = load(gemma2)
    loss = TargetLoss.prepare(model, some_rows()[0])
    assert not loss.head_on_targets  # logits are soft-capped
    assert loss.padded  # and so are the scores of attention
    batch = loss.collate(some_rows(), 0)
    total, each = loss(batch)
    torch.testing.assert_close(total / batch.n_targets, expected)
    torch.testing.assert_close(each.mean(), expected)


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
