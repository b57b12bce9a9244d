"""``lorax-train merge``: what transformers loads answers as PEFT does with base and adapter."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorax_serve.adapter import WEIGHTS_FILE, read
from lorax_train.cli import main
from tests.fidelity.variants import GPT2, TIED, UNTIED, VARIANTS, write_variant
from tests.helpers import TINY_GPT2, TINY_LLAMA, save_tiny_model

MakeAdapter = Callable[..., Path]
# PEFT warns of Conv1D, of ties and of what it changes in the config.
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning"),
]
TOKENS = torch.arange(5, 45).view(2, 20)

CASES = [
    (UNTIED, "linear"),
    (GPT2, "linear"),
    (UNTIED, "rslora"),
    (GPT2, "patterns"),
    (UNTIED, "dora, rslora, patterns"),
    (GPT2, "dora"),
    (TIED, "embedding"),
    (TIED, "embedding, dora"),
    (GPT2, "embedding, dora"),
    (TIED, "lm_head, dora"),
    (TIED, "embedding and lm_head"),
    (TIED, "embedding, ensure_weight_tying"),
    (GPT2, "lm_head"),
    (UNTIED, "modules_to_save both"),
    (TIED, "modules_to_save embedding"),
    (TIED, "modules_to_save, ensure_weight_tying"),
    (GPT2, "modules_to_save norms"),
    (GPT2, "bias all, dora"),
    (GPT2, "lora_bias"),
    (TIED, "trainable_token_indices"),
    (UNTIED, "trainable_token_indices of both"),
    (UNTIED, "bfloat16 file"),
]


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOMP_SPINCOUNT", "1000")  # which main() would set for good


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    tied = {**TINY_LLAMA.to_dict(), "tie_word_embeddings": True}
    configs = {UNTIED: TINY_LLAMA, TIED: type(TINY_LLAMA)(**tied), GPT2: TINY_GPT2}
    places = {name: tmp_path_factory.mktemp(name) for name in configs}
    for name, config in configs.items():
        save_tiny_model(places[name], config)
    return places


def load(directory: Path) -> Any:
    auto: Any = AutoModelForCausalLM
    model, info = auto.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model.eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    out: torch.Tensor = model(input_ids=TOKENS).logits
    return out


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_the_merged_model_answers_as_base_and_adapter(
    kind: str, name: str, models: dict[str, Path], tmp_path: Path
) -> None:
    adapter, out, base = tmp_path / "adapter", tmp_path / "deep" / "merged", models[kind]
    write_variant(VARIANTS[name], base, kind, adapter, seed=3)
    assert main(["merge", str(adapter), "--out", str(out)]) == 0  # the base that it names
    plain = logits(load(base))
    peft = PeftModel.from_pretrained(load(base), adapter).eval()
    theirs, ours = logits(peft), logits(load(out))
    assert (theirs - plain).abs().max() > 0.01
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=0)
    if kind == UNTIED or not {"embedding", "lm_head"} & set(name.replace(",", "").split()):
        # Of tied weights, PEFT merges into both, though unmerged it changes one.
        unloaded = logits(peft.merge_and_unload())
        torch.testing.assert_close(ours, unloaded, atol=2e-4, rtol=0)


def test_weights_that_stay_tied_are_saved_once(models: dict[str, Path], tmp_path: Path) -> None:
    for name, tied in (("linear", True), ("trainable_token_indices", True), ("embedding", False)):
        adapter, out = tmp_path / f"{name}-adapter", tmp_path / name
        write_variant(VARIANTS[name], models[TIED], TIED, adapter, seed=3)
        assert main(["merge", str(adapter), "--out", str(out)]) == 0
        assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is tied
        assert ("lm_head.weight" in load_file(out / "model.safetensors")) is not tied


def test_it_is_rounded_once_to_the_dtype_that_is_asked_for(
    make_adapter: MakeAdapter, tiny_model: Path, tmp_path: Path
) -> None:
    adapter = make_adapter("adapter", r=4, target_modules=["q_proj"])
    half, whole = tmp_path / "half", tmp_path / "whole"
    assert main(["merge", str(adapter), "--out", str(half), "--dtype", "bfloat16"]) == 0
    assert main(["merge", str(adapter), "--out", str(whole)]) == 0
    rounded, exact = (load_file(place / "model.safetensors") for place in (half, whole))
    assert json.loads((half / "config.json").read_text())["dtype"] == "bfloat16"
    assert json.loads((whole / "config.json").read_text())["dtype"] == "float32"
    assert rounded.keys() == exact.keys()
    for name, tensor in rounded.items():
        assert torch.equal(tensor, exact[name].bfloat16())


def test_tokenizer_and_generation_config_come_along(
    make_adapter: MakeAdapter, tiny_model: Path, tmp_path: Path
) -> None:
    base, out = tmp_path / "base", tmp_path / "merged"
    shutil.copytree(tiny_model, base)
    settings = json.dumps({"eos_token_id": [2, 9]})
    (base / "generation_config.json").write_text(settings)
    adapter = make_adapter("adapter", r=4, target_modules=["q_proj"])
    assert main(["merge", str(adapter), "--model", str(base), "--out", str(out)]) == 0
    assert (out / "generation_config.json").read_text() == settings
    assert {file.stat().st_mode & 0o777 for file in out.iterdir()} == {0o644}
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer("w5 w6")["input_ids"] == [5, 6]
    assert tokenizer.chat_template
    card = (out / "README.md").read_text()
    assert f"base_model: {json.dumps(str(base))}" in card
    assert read(adapter).digest in card


def test_the_server_serves_it(make_adapter: MakeAdapter, tiny_model: Path, tmp_path: Path) -> None:
    from lorax_serve.checkpoint.architectures import read_spec

    adapter = make_adapter("adapter", r=4, target_modules=["lm_head", "embed_tokens"])
    assert main(["merge", str(adapter), "--out", str(tmp_path / "merged")]) == 0
    assert read_spec(tmp_path / "merged").modules() == read_spec(tiny_model).modules()


def refused(argv: list[str], out: Path, capsys: pytest.CaptureFixture[str]) -> str:
    before = sorted(out.parent.iterdir())
    capsys.readouterr()  # what transformers said while the adapter was made
    assert main(["merge", *argv, "--out", str(out)]) == 2
    assert sorted(out.parent.iterdir()) == before
    err = capsys.readouterr().err
    assert err.startswith("lorax-train merge: error: ")
    assert err.count("\n") == 1
    return err


def test_what_cannot_be_merged_is_refused_with_the_reason(
    make_adapter: MakeAdapter,
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    alora = make_adapter("alora", target_modules=["q_proj"], alora_invocation_tokens=[9, 11])
    assert "is an activated LoRA (alora_invocation_tokens)" in refused([str(alora)], out, capsys)
    biased = make_adapter("biased", target_modules=["q_proj"], lora_bias=True)
    assert (
        "has lora_bias on model.layers.0.self_attn.q_proj, where the base model has no bias"
        in refused([str(biased)], out, capsys)
    )
    good = make_adapter("good", target_modules=["q_proj"])
    quantized = tmp_path / "quantized"
    shutil.copytree(tiny_model, quantized)
    config = json.loads((quantized / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (quantized / "config.json").write_text(json.dumps(config))
    said = refused([str(good), "--model", str(quantized)], out, capsys)
    assert f"model {quantized} is quantised" in said
    assert "no such directory" in refused([str(good), "--model", "/nowhere"], out, capsys)
    assert "there is no adapter_config.json" in refused([str(tmp_path)], out, capsys)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    said = refused([str(good)], tmp_path / "full", capsys)
    assert "full exists; choose a directory that does not" in said
    said = refused([str(good)], tmp_path / "full" / "file", capsys)
    assert "file exists; choose a directory that does not" in said
    assert "required: --out" in _said(["merge", str(good)], capsys)
    assert "required: DIR" in _said(["merge", "--out", str(out)], capsys)


def _said(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(argv) == 2
    return capsys.readouterr().err


def test_a_weight_that_overflows_is_refused(
    make_adapter: MakeAdapter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = make_adapter("huge", target_modules=["q_proj"], r=1, lora_alpha=3e38)
    weights = load_file(adapter / WEIGHTS_FILE)
    save_file({name: t * 100 for name, t in weights.items()}, adapter / WEIGHTS_FILE)
    said = refused([str(adapter), "--dtype", "bfloat16"], tmp_path / "out", capsys)
    assert "q_proj.weight overflows torch.bfloat16 once merged; nothing was written" in said


def test_nothing_is_left_where_writing_fails(
    make_adapter: MakeAdapter,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    adapter = make_adapter("good", target_modules=["q_proj"])

    def full(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lorax_train.adapters.merge.shutil.copyfile", full)
    said = refused([str(adapter)], tmp_path / "out", capsys)
    assert "out cannot be written: No space left on device; make room there, or choose" in said
