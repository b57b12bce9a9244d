"""The command end to end: its files are the server's and PEFT's, and compute what was trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lorax_serve.adapter import match_weights, read
from lorax_train.cli import main
from lorax_train.model.base import load_model
from lorax_train.model.inject import module_shapes
from lorax_train.run import TrainResult, train_all

Rows = list[dict[str, Any]]
WriteRows = Callable[..., Path]

CPU = torch.device("cpu")
PAIRS: Rows = [{"prompt": f"w{i + 50} w9", "completion": f"w{i + 40}"} for i in range(8)]
QKV = {"tiny_model": {"q_proj", "k_proj", "v_proj"}, "gpt2": {"c_attn"}}


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> list[TrainResult]:
    """What the runs that ``main`` starts return, which it keeps to itself."""
    kept: list[TrainResult] = []

    def spy(*args: Any, **options: Any) -> list[TrainResult]:
        results = train_all(*args, **options)
        kept.extend(results)
        return results

    monkeypatch.setattr("lorax_train.run.train_all", spy)
    monkeypatch.setenv("GOMP_SPINCOUNT", "1000")  # which main() would set for good
    return kept


def argv_for(model: Path, data: Path, out: Path, *more: str) -> list[str]:
    argv = ["--model", str(model), "--data", str(data), "--out", str(out), "--device", "cpu"]
    return [*argv, "--dtype", "float32", *more]


@pytest.mark.parametrize("base", ["tiny_model", "gpt2"], indirect=True)
@pytest.mark.parametrize("flags", [["--r", "4"], ["--preset", "elixir"]])
def test_the_server_and_peft_read_what_the_command_wrote(
    base: Path,
    flags: list[str],
    request: pytest.FixtureRequest,
    results: list[TrainResult],
    write_rows: WriteRows,
    tmp_path: Path,
) -> None:
    out = tmp_path / "adapter"
    more = ["--max-steps", "4", "--batch-size", "4", "--lr", "2e-2", "--targets", "qkv", *flags]
    assert main(argv_for(base, write_rows(PAIRS), out, *more)) == 0
    assert {path.name for path in out.iterdir()} == {
        *("README.md", "adapter_config.json", "adapter_model.safetensors"),
        *("log.jsonl", "loss.png", "report.html"),
    }
    # Of a base that no LoRA layer was ever put into.
    shapes = module_shapes(load_model("tiny", base, torch.float32, CPU))
    files = read(out)
    weights = match_weights(files.config, files.tensors, shapes)
    wanted = QKV[request.node.callspec.params["base"]]
    assert {path.rsplit(".", 1)[-1] for path in weights.pairs} == wanted
    assert len(weights.pairs) == 2 * len(wanted)
    assert len(files.tensors) == 2 * len(weights.pairs)
    for path, pair in weights.pairs.items():
        trained = results[0].adapter.pairs()[path]
        assert torch.equal(files.tensors[f"base_model.model.{path}.lora_A.weight"], trained.a)
        assert torch.equal(files.tensors[f"base_model.model.{path}.lora_B.weight"], trained.b)
        assert pair.b.abs().max() > 0

    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokens = torch.arange(5, 45).view(2, 20)
    with torch.no_grad():
        before = plain(input_ids=tokens).logits
        theirs = PeftModel.from_pretrained(plain, out).eval()(input_ids=tokens).logits
        results[0].adapter.train(False)
        ours = results[0].model(input_ids=tokens).logits
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert (ours - before).abs().max() > 1e-3


def test_the_presets_values_reach_the_files(
    tiny_model: Path, results: list[TrainResult], write_rows: WriteRows, tmp_path: Path
) -> None:
    data = write_rows(PAIRS)
    elixir = ["--preset", "elixir", "--max-steps", "2"]
    assert main(argv_for(tiny_model, data, tmp_path / "a", *elixir)) == 0
    raw = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (raw["r"], raw["lora_alpha"], raw["init_lora_weights"]) == (2, 4, "gaussian")
    assert set(raw["target_modules"]) == {"q_proj", "k_proj", "v_proj"}
    flags = ["--r", "3", "--targets", "o_proj", "--init", "kaiming"]
    assert main(argv_for(tiny_model, data, tmp_path / "b", *elixir, *flags)) == 0
    raw = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert (raw["r"], raw["lora_alpha"], raw["init_lora_weights"]) == (3, 6, True)
    assert raw["target_modules"] == ["o_proj"]


def test_a_completion_learned_by_heart_is_generated_and_ends(
    tiny_model: Path, results: list[TrainResult], write_rows: WriteRows, tmp_path: Path
) -> None:
    data = write_rows(PAIRS)
    more = ["--max-steps", "60", "--lr", "2e-2", "--r", "8"]
    assert main(argv_for(tiny_model, data, tmp_path / "out", *more)) == 0
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    model = PeftModel.from_pretrained(plain, tmp_path / "out").eval()
    prompts = torch.tensor([[i + 50, 9] for i in range(len(PAIRS))])
    with torch.no_grad():
        first = model(input_ids=prompts).logits[:, -1].argmax(-1)
        second = model(input_ids=torch.cat([prompts, first[:, None]], 1)).logits[:, -1].argmax(-1)
    assert first.tolist() == [i + 40 for i in range(len(PAIRS))]
    assert second.tolist() == [2] * len(PAIRS)  # the EOS token: it has learned to stop


@pytest.mark.parametrize(
    ("base", "targets", "obstacle"),
    [
        ("tiny_model", "q_proj", None),
        ("tiny_model", "lm_head", None),
        ("gpt2", "qkv", None),
        ("gemma2", "qkv", "Gemma2ForCausalLM"),
    ],
    indirect=["base"],
)
def test_what_the_server_would_refuse_is_said_before_training(
    base: Path,
    targets: str,
    obstacle: str | None,
    write_rows: WriteRows,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GOMP_SPINCOUNT", "1000")
    more = ["--max-steps", "1", "--batch-size", "4", "--targets", targets]
    assert main(argv_for(base, write_rows(PAIRS), tmp_path / "adapter", *more)) == 0
    said = capsys.readouterr().err
    if obstacle is None:
        assert "lorax-serve --model" in said
        assert "will refuse" not in said
    else:
        before, _, after = said.partition("step 1/1")
        assert "lorax-serve will refuse this adapter" in before
        assert obstacle in before
        assert "lorax-serve --model" not in after
