"""Quantised bases: exactly the dequantised weights' products and gradients, loaded one by one."""

from __future__ import annotations

import importlib.util
import io
import json
import shutil
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import bitsandbytes.functional
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from lorax_serve.adapter import match_weights, read
from lorax_serve.adapter.probe import Probe
from lorax_serve.errors import TrainingError
from lorax_train.cli import main
from lorax_train.config import DataConfig, InjectionConfig, OutputConfig, Quantize, TrainConfig
from lorax_train.console import Console
from lorax_train.data.encode import Example
from lorax_train.loop.loss import TargetLoss
from lorax_train.loop.training_run import TrainingRun
from lorax_train.model.base import load_model
from lorax_train.model.inject import TrainableLoRA, inject, module_shapes
from lorax_train.model.quantize import Int8Weight, NF4Weight, QuantizedLinear, count_parameters
from lorax_train.model.quantized_base import load_quantized, original_weights, restorable
from lorax_train.run import TrainResult, train
from tests.train.test_train_probe import Server

Rows = list[dict[str, Any]]
Configure = Callable[..., TrainConfig]
WriteRows = Callable[..., Path]

CPU = torch.device("cpu")
FORMATS: list[Quantize] = ["nf4", "int8"]
EXAMPLE = Example(tuple(range(5, 25)), (False, *[True] * 19), "here")
EACH_BASE = pytest.mark.parametrize("base", ["llama", "gpt2"], indirect=True)
EACH_FORMAT = pytest.mark.parametrize("quantize", FORMATS)


def load(base: Path, quantize: Quantize) -> PreTrainedModel:
    return load_model("tiny", base, torch.float32, CPU, quantize)


def dequantised(base: Path, quantized: PreTrainedModel) -> PreTrainedModel:
    """The dense model with the weights that the quantised one computes with."""
    model = load(base, "none")
    for path, layer in quantized_layers(quantized).items():
        weight = layer.dense().T if layer.transposed else layer.dense()
        dense = model.get_submodule(path).weight
        assert isinstance(dense, torch.Tensor)
        dense.data.copy_(weight)
    return model


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    modules = model.named_modules()
    return {path: module for path, module in modules if isinstance(module, QuantizedLinear)}


def gradients(model: PreTrainedModel, settings: InjectionConfig) -> tuple[float, TrainableLoRA]:
    """The loss, and the adapter with the gradient of it."""
    loss = TargetLoss.prepare(model, EXAMPLE)
    adapter = inject(model, settings, "tiny", seed=1)
    loss.routing = adapter.routing
    generator = torch.Generator().manual_seed(2)
    for pair in adapter.pairs().values():  # B at zero would leave A without a gradient
        pair.b.data.normal_(std=0.1, generator=generator)
    total, _ = loss(loss.collate([EXAMPLE], 0))
    torch.autograd.backward(total)
    return float(total.detach()), adapter


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_is_bitsandbytes_own_in_any_number_of_pieces(double: bool, dtype: torch.dtype) -> None:
    weight = torch.randn(600, 1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    packed, state = bitsandbytes.functional.quantize_4bit(
        weight, blocksize=64, compress_statistics=double, quant_type="nf4"
    )
    ours = NF4Weight(weight, double=double)
    assert torch.equal(ours.packed, packed)
    expected = bitsandbytes.functional.dequantize_4bit(packed, state)
    assert torch.equal(ours.dense(dtype), expected)
    assert (ours.dense(dtype) - weight).abs().mean() < 0.1
    bits = 8 * sum(buffer.nbytes for buffer in ours.buffers()) / weight.numel()
    assert bits < (4.15 if double else 4.51)


def test_nf4_takes_a_weight_whose_size_is_no_multiple_of_a_block() -> None:
    weight = torch.randn(7, 9)
    assert NF4Weight(weight).dense(torch.float32).shape == (7, 9)


def test_int8_is_within_half_a_step_of_each_row() -> None:
    weight = torch.randn(6, 40) * torch.logspace(-6, 3, 6)[:, None]
    weight[2] = 0
    ours = Int8Weight(weight)
    steps = weight.abs().amax(1, keepdim=True) / 127
    assert bool(((ours.dense(torch.float32) - weight).abs() <= 0.5001 * steps).all())
    assert bool((ours.dense(torch.float32)[2] == 0).all())
    assert ours.whole.dtype is torch.int8
    assert int(ours.whole.abs().max()) == 127


@EACH_FORMAT
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_computes_the_dequantised_products_and_keeps_nothing(
    quantize: Quantize, dtype: torch.dtype
) -> None:
    bias = nn.Parameter(torch.randn(48, dtype=dtype), requires_grad=False)
    layer = QuantizedLinear(torch.randn(48, 32, dtype=dtype), bias, quantize)
    kept: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    x = torch.randn(2, 5, 32, dtype=dtype, requires_grad=True)
    dy = torch.randn(2, 5, 48, dtype=dtype)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)
    y.backward(dy)
    assert not kept
    w = layer.dense()
    assert w.dtype is dtype
    assert torch.equal(y, F.linear(x, w, bias))
    assert x.grad is not None
    assert torch.equal(x.grad, dy @ w)
    product = layer.product()
    assert torch.equal(product.forward_product(x), y)
    assert torch.equal(product.backward_product(dy), dy @ w)


@EACH_BASE
@EACH_FORMAT
def test_all_linears_but_the_head_are_quantised_and_the_rest_is_the_same(
    base: Path, quantize: Quantize
) -> None:
    dense, model = load(base, "none"), load(base, quantize)
    shapes = module_shapes(dense)
    assert module_shapes(model) == shapes
    kept = {"lm_head", *(path for path, m in dense.named_modules() if isinstance(m, nn.Embedding))}
    assert set(quantized_layers(model)) == set(shapes) - kept
    expected = dict(dense.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected[name])
        assert not parameter.requires_grad
    assert count_parameters(model) == count_parameters(dense)
    assert not hasattr(model.config, "quantization_config")
    tokens = torch.arange(5, 25)[None]
    with torch.no_grad():
        ours = model(input_ids=tokens).logits
        theirs = dequantised(base, model)(input_ids=tokens).logits
        assert not torch.equal(ours, dense(input_ids=tokens).logits)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@EACH_BASE
@EACH_FORMAT
@pytest.mark.parametrize(
    "settings",
    [
        InjectionConfig(r=4),
        InjectionConfig(r=4, targets="qkv"),
        InjectionConfig(r=4, dora=True),
        InjectionConfig(r=4, init="pissa"),
    ],
    ids=["lora", "qkv", "dora", "pissa"],
)
def test_gradients_are_those_on_the_dequantised_weights(
    base: Path, quantize: Quantize, settings: InjectionConfig
) -> None:
    model = load(base, quantize)
    expected, theirs = gradients(dequantised(base, model), settings)
    found, ours = gradients(model, settings)
    assert found == pytest.approx(expected, rel=1e-6)
    assert theirs.config == ours.config
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert mine.grad is not None
        assert other.grad is not None
        scale = float(other.grad.abs().max())
        assert scale > 0
        torch.testing.assert_close(mine.grad, other.grad, atol=2e-5 * scale, rtol=1e-4)


def test_weights_are_read_and_dropped_one_by_one(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []
    of = QuantizedLinear.of

    def spy(module: Any, weight: torch.Tensor, quantize: Quantize) -> Any:
        alive.append(sum(ref() is not None for ref in dense))
        dense.append(weakref.ref(weight))
        return of(module, weight, quantize)

    monkeypatch.setattr(QuantizedLinear, "of", spy)
    load(llama, "int8")
    assert alive == [0] * 14


@EACH_BASE
def test_the_original_weights_are_back_within_the_block(base: Path) -> None:
    model, tokens = load(base, "nf4"), torch.arange(5, 25)[None]
    with torch.no_grad():
        before = model(input_ids=tokens).logits
        with original_weights(model, base):
            found = model(input_ids=tokens).logits
        after = model(input_ids=tokens).logits
        expected = load(base, "none")(input_ids=tokens).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert torch.equal(before, after)
    assert (found - before).abs().max() > 1e-3


@EACH_FORMAT
def test_a_bfloat16_checkpoint_is_computed_in_the_dtype_asked_for(
    llama: Path, quantize: Quantize, tmp_path: Path
) -> None:
    halved = shutil.copytree(llama, tmp_path / "halved")
    tensors = safetensors.torch.load_file(halved / "model.safetensors")
    halves = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    safetensors.torch.save_file(halves, halved / "model.safetensors", {"format": "pt"})
    model = load(halved, quantize)
    assert model.dtype is torch.float32
    assert {layer.dtype for layer in quantized_layers(model).values()} == {torch.float32}


def run(config: TrainConfig) -> tuple[TrainResult, str]:
    stream = io.StringIO()
    return train(config, Console(stream)), stream.getvalue()


@EACH_BASE
@EACH_FORMAT
def test_the_loss_falls_and_the_adapter_is_peft_s_and_ours(
    base: Path, quantize: Quantize, configure: Configure, write_rows: WriteRows, pairs: Rows
) -> None:
    rows = write_rows(pairs)
    config = configure(base, DataConfig(rows, rows), steps=30, quantize=quantize)
    result, said = run(config)
    assert f"linear layers in {quantize}, float32 on cpu" in said
    losses = result.record.eval_losses
    assert losses[-1] < 0.8 * losses[0]
    out = config.output.directory
    files = read(out)
    match_weights(files.config, files.tensors, module_shapes(load(base, "none")))
    tokens = torch.arange(5, 45).view(2, 20)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    result.adapter.train(False)
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(plain, out).eval()(input_ids=tokens).logits
        with original_weights(result.model, base):
            ours = result.model(input_ids=tokens).logits
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@EACH_FORMAT
def test_the_probe_is_of_the_base_that_is_served(
    tiny_model: Path, quantize: Quantize, configure: Configure, write_rows: WriteRows
) -> None:
    rows = [{"prompt": f"w{i + 50} w9 w11 w{i + 6}", "completion": f"w{i + 40}"} for i in range(8)]
    config = configure(tiny_model, write_rows(rows), quantize=quantize)
    run(config)
    result = Server(tiny_model, "torch", "float32").check(config.output.directory)
    assert (result.passed, result.message, result.warnings) == (True, "", ())
    assert result.difference < 1e-3


def test_weights_that_cannot_be_read_back_leave_no_probe_and_a_warning(
    llama: Path,
    configure: Configure,
    write_rows: WriteRows,
    pairs: Rows,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def converted(*args: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
        model, report = load_quantized(*args)
        for layer in quantized_layers(model).values():
            layer.source = None  # as where a weight is made of several tensors
        return model, report

    monkeypatch.setattr("lorax_train.model.base.load_quantized", converted)
    config = configure(llama, write_rows(pairs), quantize="int8")
    result, said = run(config)
    assert not restorable(result.model)
    assert "no probe will be stored" in said
    assert Probe.from_metadata(read(config.output.directory).metadata) is None


def test_a_base_without_safetensors_is_quantised_with_a_warning(
    llama: Path, configure: Configure, write_rows: WriteRows, pairs: Rows, tmp_path: Path
) -> None:
    old = shutil.copytree(llama, tmp_path / "old")
    torch.save(safetensors.torch.load_file(old / "model.safetensors"), old / "pytorch_model.bin")
    (old / "model.safetensors").unlink()
    result, said = run(configure(old, write_rows(pairs), quantize="int8"))
    assert "not in safetensors files, so loading them took as much memory" in said
    expected = quantized_layers(load(llama, "int8"))
    found = quantized_layers(result.model)
    for layer, other in zip(found.values(), expected.values(), strict=True):
        assert torch.equal(layer.dense(), other.dense())


def test_the_estimate_counts_the_bytes_that_the_base_takes(
    llama: Path, configure: Configure, write_rows: WriteRows, pairs: Rows
) -> None:
    result, said = run(configure(llama, write_rows(pairs), quantize="int8"))
    model = result.model
    quantized = quantized_layers(model).values()
    trained = {id(parameter) for parameter in result.adapter.parameters()}
    dense = sum(p.nbytes for p in model.parameters() if id(p) not in trained)
    expected = dense + sum(b.nbytes for b in model.buffers())
    assert f"weights {expected / 1e3:.1f} kB" in said or f"weights {expected / 1e6:.1f} MB" in said
    in_layers = sum(layer.in_features * layer.out_features for layer in quantized)
    rows = sum(layer.out_features for layer in quantized)
    held = sum(b.nbytes for layer in quantized for b in layer.buffers())
    assert held == in_layers + 4 * rows


@EACH_FORMAT
def test_a_run_that_goes_on_has_the_same_bits(
    llama: Path,
    quantize: Quantize,
    configure: Configure,
    write_rows: WriteRows,
    pairs: Rows,
    tmp_path: Path,
) -> None:
    class StopAfterTwo(Console):
        def stepped(self, runs: Sequence[TrainingRun]) -> None:
            if runs[0].record.steps == 2:
                raise KeyboardInterrupt

    def config(root: str) -> TrainConfig:
        output = OutputConfig(tmp_path / root / "same", resume=True)
        return configure(llama, write_rows(pairs), steps=4, quantize=quantize, output=output)

    run(config("whole"))
    assert train(config("cut"), StopAfterTwo(io.StringIO())).record.interrupted
    _, said = run(config("cut"))
    assert "after step 2" in said
    whole, cut = (
        (tmp_path / root / "same" / "adapter_model.safetensors").read_bytes()
        for root in ("whole", "cut")
    )
    assert whole == cut


def test_injecting_asks_no_layer_for_its_dense_weight(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(llama, "int8")

    def dense(_: QuantizedLinear) -> torch.Tensor:
        raise AssertionError("dequantised")

    monkeypatch.setattr(QuantizedLinear, "dense", dense)
    inject(model, InjectionConfig(r=2), "tiny", seed=0)


def argv(model: Path, data: Path, out: Path, *more: str) -> list[str]:
    flags = ["--model", str(model), "--data", str(data), "--out", str(out), "--device", "cpu"]
    return [*flags, "--dtype", "float32", *more]


def refusal(capsys: pytest.CaptureFixture[str], *args: Any) -> str:
    capsys.readouterr()
    assert main(argv(*args)) == 2
    said = capsys.readouterr().err
    assert said.startswith("lorax-train: error: ")
    assert said.count("\n") == 1
    return said


@pytest.fixture
def _passive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOMP_SPINCOUNT", "1000")  # which main() would set for good


@pytest.mark.usefixtures("_passive")
def test_nf4_without_bitsandbytes_is_refused_with_the_command_that_installs_it(
    llama: Path,
    write_rows: WriteRows,
    pairs: Rows,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    find_spec = importlib.util.find_spec

    def without(name: str, package: str | None = None) -> Any:
        return None if name == "bitsandbytes" else find_spec(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    said = refusal(capsys, llama, write_rows(pairs), tmp_path / "out", "--quantize", "nf4")
    assert "--quantize nf4 needs bitsandbytes" in said
    assert "pip install 'bitsandbytes>=" in said
    assert not (tmp_path / "out").exists()
    config = argv(llama, write_rows(pairs), tmp_path / "out", "--max-steps", "1")
    assert main([*config, "--quantize", "int8"]) == 0


@pytest.mark.usefixtures("_passive")
def test_a_quantised_checkpoint_is_not_quantised_again(
    llama: Path,
    write_rows: WriteRows,
    pairs: Rows,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = shutil.copytree(llama, tmp_path / "gptq")
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (model / "config.json").write_text(json.dumps(config))
    for flags in (("--quantize", "int8"), ()):
        said = refusal(capsys, model, write_rows(pairs), tmp_path / "out", *flags)
        assert "is quantised already (quantization_config in its config.json, gptq)" in said
        assert "name the model that it was made from" in said
        assert ("--quantize int8: model" in said) == bool(flags)
        assert ("with --quantize nf4 or int8 if memory is scarce" in said) != bool(flags)
        assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_bitsandbytes_quantised_is_refused_before_the_data_is_read(
    llama: Path, tmp_path: Path, configure: Configure
) -> None:
    auto: Any = AutoModelForCausalLM
    options: Any = BitsAndBytesConfig
    model = auto.from_pretrained(llama, quantization_config=options(load_in_4bit=True))
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text("no JSON")
    with pytest.raises(TrainingError, match=r"model .*model is quantised .*bitsandbytes\)"):
        run(configure(tmp_path / "model", tmp_path / "rows.jsonl"))
    with pytest.raises(TrainingError, match="model tiny is quantised"):
        load(tmp_path / "model", "none")


def test_a_model_without_linears_is_refused(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "lorax_train.model.quantized_base._Quantizer.param_needs_quantization",
        lambda *_, **__: False,
    )
    with pytest.raises(TrainingError, match="--quantize int8: model tiny has no linear layer"):
        load(llama, "int8")


def test_another_format_is_refused_by_the_flag_s_name(
    llama: Path, configure: Configure, write_rows: WriteRows, pairs: Rows
) -> None:
    with pytest.raises(TrainingError, match="--quantize must be one of none, nf4, int8"):
        configure(llama, write_rows(pairs), quantize="int4")


@pytest.mark.gpu
@EACH_FORMAT
def test_cuda_trains_on_the_dequantised_weights_too(llama: Path, quantize: Quantize) -> None:
    model = load_model("tiny", llama, torch.float32, torch.device("cuda"), quantize)
    assert {buffer.device.type for buffer in model.buffers()} == {"cuda"}
    with original_weights(model, llama):
        assert next(iter(quantized_layers(model).values())).dense().device.type == "cuda"
    expected, theirs = gradients(dequantised(llama, model), InjectionConfig(r=4))
    found, ours = gradients(model, InjectionConfig(r=4))
    assert found == pytest.approx(expected, rel=1e-4)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert mine.grad is not None
        assert other.grad is not None
        scale = float(other.grad.abs().max())
        torch.testing.assert_close(mine.grad.cpu(), other.grad, atol=1e-3 * scale, rtol=1e-3)
