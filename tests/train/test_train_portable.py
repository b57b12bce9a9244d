"""``export --portable``: the same logits, also where little of the config is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lorax_serve.adapter import CONFIG_FILE, WEIGHTS_FILE, match_weights, read, save
from lorax_serve.checkpoint.architectures import read_spec
from lorax_serve.errors import TrainingError
from lorax_train.cli import main
from lorax_train.config import DataConfig, InjectionConfig, OutputConfig, TrainConfig
from tests.fidelity.variants import GPT2, UNTIED, VARIANTS, write_variant

FullDisk = Callable[[], AbstractContextManager[None]]

MakeAdapter = Callable[..., Path]
WriteRows = Callable[..., Path]
Capture = pytest.CaptureFixture[str]
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
TOKENS = torch.arange(5, 45).view(2, 20)
PLAIN = {
    *("r", "lora_alpha", "target_modules", "lora_dropout", "fan_in_fan_out", "bias"),
    *("task_type", "base_model_name_or_path", "peft_type", "inference_mode", "init_lora_weights"),
}


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOMP_SPINCOUNT", "1000")  # which main() would set for good


@torch.no_grad()
def logits(base: Path, adapter: Path) -> torch.Tensor:
    auto: Any = AutoModelForCausalLM
    model = PeftModel.from_pretrained(auto.from_pretrained(base, dtype=torch.float32), adapter)
    out: torch.Tensor = model.eval()(input_ids=TOKENS).logits
    return out


@torch.no_grad()
def naive_logits(base: Path, adapter: Path) -> torch.Tensor:
    """As loaders do that take alpha over the tensor's rank, and targets from the tensors' names."""
    alpha = json.loads((adapter / CONFIG_FILE).read_text())["lora_alpha"]
    auto: Any = AutoModelForCausalLM
    model = auto.from_pretrained(base, dtype=torch.float32)
    tensors = load_file(adapter / WEIGHTS_FILE)
    for name in tensors:
        if name.endswith(".lora_A.weight"):
            a, b = tensors[name], tensors[name.replace("lora_A", "lora_B")]
            path = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            weight = model.get_parameter(f"{path}.weight")
            delta = alpha / len(a) * b @ a
            weight += delta.T if "transformer.h" in path else delta
    out: torch.Tensor = model.eval()(input_ids=TOKENS).logits
    return out


@pytest.mark.parametrize("kind", [UNTIED, GPT2])
@pytest.mark.parametrize(
    "name", ["linear", "rslora", "patterns", "layers_to_transform", "exclude_modules", "lm_head"]
)
def test_it_answers_as_before_for_peft_us_and_plain_loaders(
    kind: str, name: str, tiny_model: Path, tiny_gpt2: Path, tmp_path: Path
) -> None:
    base = tiny_gpt2 if kind == GPT2 else tiny_model
    adapter, out = tmp_path / "adapter", tmp_path / "out"
    write_variant(VARIANTS[name], base, kind, adapter, seed=5)
    assert main(["export", str(adapter), "--portable", "--out", str(out)]) == 0
    wanted = logits(base, adapter)
    torch.testing.assert_close(logits(base, out), wanted, atol=2e-4, rtol=0)
    if (kind, name) != (GPT2, "lm_head"):  # which is tied: adding to it would change both
        torch.testing.assert_close(naive_logits(base, out), wanted, atol=2e-4, rtol=0)
    modules = read_spec(base).modules()
    before, after = (
        match_weights(files.config, files.tensors, modules).pairs
        for files in (read(adapter), read(out))
    )
    assert list(before) == list(after)
    for path, pair in after.items():
        assert pair.scale == 1
        assert pair.rank == max(each.rank for each in before.values())
        old = before[path]
        torch.testing.assert_close(pair.b @ pair.a, old.scale * old.b @ old.a, atol=1e-5, rtol=0)
    raw = json.loads((out / CONFIG_FILE).read_text())
    assert raw["lora_alpha"] == raw["r"]
    assert {key for key, value in raw.items() if value not in (None, False, {}, [])} <= PLAIN
    said = read(out).metadata
    assert said["portable_of"] == read(adapter).digest


def test_what_was_known_of_the_adapter_is_kept(make_adapter: MakeAdapter, tmp_path: Path) -> None:
    adapter = make_adapter("a", r=4, lora_alpha=8, target_modules=["q_proj"])
    files = read(adapter)
    save(adapter, files.config, files.tensors, {"producer": "lorax-train 1.2", "steps": "40"})
    assert main(["export", str(adapter), "--portable", "--out", str(tmp_path / "out")]) == 0
    metadata = read(tmp_path / "out").metadata
    assert (metadata["producer"], metadata["steps"]) == ("lorax-train 1.2", "40")


@pytest.mark.parametrize(("alpha", "dtype"), [(8, torch.bfloat16), (6, torch.float32)])
def test_a_file_in_half_precision_stays_one_where_that_is_exact(
    alpha: int, dtype: torch.dtype, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    adapter, out = (
        make_adapter("a", r=4, lora_alpha=alpha, target_modules=["q_proj"]),
        tmp_path / "o",
    )
    files = read(adapter)
    save(adapter, files.config, {name: t.bfloat16() for name, t in files.tensors.items()})
    assert main(["export", str(adapter), "--portable", "--out", str(out)]) == 0
    tensors = load_file(out / WEIGHTS_FILE)
    assert {t.dtype for n, t in tensors.items() if "lora_A" in n} == {torch.bfloat16}
    assert {t.dtype for n, t in tensors.items() if "lora_B" in n} == {dtype}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "the adapter has DoRA (use_dora)"),
        ({"lora_bias": True}, "the adapter has lora_bias"),
        ({"bias": "all"}, "the adapter has trained biases (bias='all')"),
        ({"modules_to_save": ["lm_head"]}, "the adapter has modules_to_save"),
        ({"trainable_token_indices": [3]}, "the adapter has trainable_token_indices"),
        ({"alora_invocation_tokens": [9]}, "the adapter has alora_invocation_tokens"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "the adapter has LoRA on an embedding"),
    ],
)
def test_what_has_no_portable_form_is_refused_with_the_reason(
    config: dict[str, Any],
    message: str,
    make_adapter: MakeAdapter,
    tmp_path: Path,
    capsys: Capture,
) -> None:
    adapter = make_adapter("a", **{"target_modules": ["q_proj"]} | config)
    capsys.readouterr()
    assert main(["export", str(adapter), "--portable", "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "use it as it is, or merge it into the base (lorax-train merge)" in err
    assert not (tmp_path / "out").exists()


def test_a_weight_of_its_own_is_no_copy_of_the_bases(
    make_adapter: MakeAdapter, tmp_path: Path, capsys: Capture
) -> None:
    adapter = make_adapter("a", target_modules=["lm_head"])
    files = read(adapter)
    name = "base_model.model.lm_head.base_layer.weight"
    changed = {**files.tensors, name: files.tensors[name] + 1}
    save(adapter, files.config, changed)
    assert main(["export", str(adapter), "--portable", "--out", str(tmp_path / "out")]) == 2
    assert "the adapter has a copy of lm_head.weight" in capsys.readouterr().err


def test_wrong_arguments_are_named(
    make_adapter: MakeAdapter, tmp_path: Path, capsys: Capture
) -> None:
    adapter = make_adapter("a", target_modules=["q_proj"])
    assert main(["export", str(adapter), "--out", str(tmp_path / "out")]) == 2
    assert "name the form to write: --portable" in capsys.readouterr().err
    assert main(["export", str(adapter), "--portable", "--out", str(adapter)]) == 2
    assert "exists; choose a directory that does not" in capsys.readouterr().err
    huge = make_adapter("huge", target_modules=["q_proj"], lora_alpha=3e38, r=1)
    tensors = {name: t * 100 for name, t in read(huge).tensors.items()}
    save(huge, read(huge).config, tensors)
    assert main(["export", str(huge), "--portable", "--out", str(tmp_path / "out")]) == 2
    assert "overflows once it is scaled" in capsys.readouterr().err


def test_on_a_full_disk_it_says_what_to_do_and_can_be_run_again(
    make_adapter: MakeAdapter, tmp_path: Path, capsys: Capture, full_disk: FullDisk
) -> None:
    adapter, out = make_adapter("a", target_modules=["q_proj"]), tmp_path / "out"
    command = ["export", str(adapter), "--portable", "--out", str(out)]

    with full_disk():
        assert main(command) == 2
    said = capsys.readouterr().err
    assert f"{out} cannot be written: No space left on device; make room there, or choose" in said
    assert not list(out.glob("**/*"))
    assert main(command) == 0
    assert read(out).config.r == read(adapter).config.r


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_writes_the_portable_form_if_asked(
    dtype: str, llama: Path, write_rows: WriteRows, tmp_path: Path
) -> None:
    data = write_rows([{"prompt": f"{i}:", "completion": f" {i * i}"} for i in range(8)])
    argv = ["--model", str(llama), "--data", str(data), "--max-steps", "3", "--batch-size", "4"]
    argv += ["--r", "3", "--alpha", "5", "--rslora", "--targets", "qkv", "--lr", "1e-2"]
    argv += ["--device", "cpu", "--dtype", "float32", "--save-dtype", dtype]
    plain, out = tmp_path / "plain", tmp_path / "portable"
    assert main([*argv, "--out", str(plain)]) == 0
    assert main([*argv, "--out", str(out), "--portable"]) == 0
    atol = 2e-4 if dtype == "float32" else 0.1
    torch.testing.assert_close(naive_logits(llama, out), logits(llama, plain), atol=atol, rtol=0)
    config = read(out).config
    assert (config.r, config.lora_alpha, config.use_rslora) == (3, 3, False)
    tensors = load_file(out / WEIGHTS_FILE)
    assert {t.dtype for t in tensors.values()} == {getattr(torch, dtype)}
    assert read(out).metadata.keys() == read(plain).metadata.keys()
    assert main(["inspect", str(out)]) == 0


def test_training_towards_no_portable_form_is_refused_before_it_begins(
    llama: Path, write_rows: WriteRows, tmp_path: Path, capsys: Capture
) -> None:
    data = write_rows([{"text": "abc"}])
    argv = ["--model", str(llama), "--data", str(data), "--out", str(tmp_path / "out")]
    assert main([*argv, "--device", "cpu", "--portable", "--targets", "embed_tokens,q_proj"]) == 2
    err = capsys.readouterr().err
    assert "the adapter has LoRA on an embedding" in err
    assert "step 1" not in err
    assert not (tmp_path / "out").exists()
    with pytest.raises(TrainingError, match="--portable and --dora exclude each other"):
        TrainConfig(
            DataConfig(data),
            OutputConfig(tmp_path / "out", portable=True),
            lora=InjectionConfig(dora=True),
        )
