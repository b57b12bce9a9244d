"""``lorax plan``: what it counts is what the server counts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from lorax_serve.adapter import match_weights, read
from lorax_serve.checkpoint.architectures import read_spec
from lorax_serve.cli.capacity import Capacity, Demand, Memory, plan
from lorax_serve.cli.client import main
from lorax_serve.cli.devices import DEVICES, Device, device
from lorax_serve.cli.plan import _bytes
from lorax_serve.config import EngineConfig
from lorax_serve.errors import AdapterRejected, InvalidRequest
from lorax_serve.model.runner import ModelRunner
from lorax_serve.model.sizes import adapter_bytes, form_of, kv_bytes_per_token, target_modules
from tests.helpers import TINY_GPT2, TINY_LLAMA, each_kernels, save_peft_adapter, save_tiny_model

SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": TINY_LLAMA,
    "tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "mistral": MistralConfig(**SIZES, sliding_window=64),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES),
    "gpt2": TINY_GPT2,
}
FORMS = {"torch": "torch", "compiled": "compiled", "paged": "arena"}
CPU = Device("cpu", 8 << 30, 20e9, 1e11)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place: Path = tmp_path_factory.mktemp("models")
    for name, config in CONFIGS.items():
        save_tiny_model(place / name, config)
    return {name: place / name for name in CONFIGS}


@each_kernels
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("rank", [3, 8])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapters_bytes_are_those_that_the_server_counts(
    models: dict[str, Path], tmp_path: Path, name: str, rank: int, dtype: str, kernels: str
) -> None:
    model, spec = models[name], read_spec(models[name])
    if name == "gpt2" and kernels != "torch":
        pytest.skip("GPT-2 is computed in plain torch")
    if kernels == "compiled" and form_of(spec, getattr(torch, dtype), on_gpu=False) == "torch":
        pytest.skip("sizes that the compiled kernels do not take")
    targets = ("c_attn", "c_proj") if name == "gpt2" else ("q_proj", "v_proj", "down_proj")
    save_peft_adapter(
        model, tmp_path, r=rank, target_modules=list(targets), fan_in_fan_out=name == "gpt2"
    )
    runner = ModelRunner(
        EngineConfig(model=str(model), dtype=dtype, kernels=kernels, max_batch_size=2)
    )
    files = read(tmp_path)
    folded = runner.fold(match_weights(files.config, files.tensors, runner.modules))
    paths = target_modules(spec, targets)
    form: Any = FORMS[kernels]
    assert adapter_bytes(spec, rank, paths, getattr(torch, dtype), form) == folded.nbytes
    tokens = runner.kv_tokens
    assert tokens * kv_bytes_per_token(spec, getattr(torch, dtype)) == runner.info.kv_cache_bytes


def test_forms_by_device(models: dict[str, Path]) -> None:
    llama, gpt2 = read_spec(models["tied"]), read_spec(models["gpt2"])
    assert form_of(read_spec(models["llama"]), torch.bfloat16, on_gpu=False) == "torch"
    assert form_of(llama, torch.bfloat16, on_gpu=True) == "arena"
    assert form_of(llama, torch.bfloat16, on_gpu=False) == "compiled"
    assert form_of(gpt2, torch.bfloat16, on_gpu=False) == "torch"


def sized(model: Path, where: Device = CPU, **settings: Any) -> Capacity:
    options = {name: settings.pop(name) for name in list(settings) if hasattr(DEMAND, name)}
    memory = Memory(settings.pop("host", None), settings.pop("disk", None))
    spec = read_spec(model)
    return plan(spec, torch.bfloat16, replace(DEMAND, **options), where, memory, **settings)


DEMAND = Demand(1000, 8, "all-linear", 10.0, 100, 50, 0.5)


def test_replicas_follow_from_a_measured_rate(models: dict[str, Path]) -> None:
    # 10 requests of 50 tokens a second at half of 200 tokens a second each.
    found = sized(models["llama"], tokens_per_second=200.0)
    assert (found.replicas, found.figures["replicas"].kind) == (5, "measured")
    assert found.figures["load"].value == pytest.approx(0.5)
    assert sized(models["llama"], tokens_per_second=200.0, rps=10.1).replicas == 6
    few = sized(models["llama"], tokens_per_second=200.0, replicas=4)
    assert few.figures["load"].value == pytest.approx(10 * 50 / 800)
    assert any("4 replicas are too few: 5 are needed" in note for note in few.notes)


def test_the_roofline_is_called_a_ceiling_and_follows_the_device(models: dict[str, Path]) -> None:
    slow = sized(models["llama"])
    fast = sized(models["llama"], replace(CPU, bandwidth=40e9, flops=2e11))
    assert slow.figures["roofline"].kind == "ceiling"
    assert slow.figures["replicas"].kind == slow.figures["step"].kind == "floor"
    ratio = fast.figures["roofline"].value / slow.figures["roofline"].value
    assert ratio == pytest.approx(2)
    assert any("--tokens-per-second" in note for note in slow.notes)


def test_a_step_reads_weights_adapters_and_cache(models: dict[str, Path]) -> None:
    endless = replace(CPU, flops=1e30)
    found = sized(models["llama"], endless, batch_size=4, slots=3)
    size = {name: figure.value for name, figure in found.figures.items()}
    spec = read_spec(models["llama"])
    linears = spec.num_parameters - 128 * 48  # the embedding is looked up, not read
    read_bytes = 2 * linears + 3 * size["adapter"] + 4 * 125 * size["kv_per_token"]
    assert size["step"] == pytest.approx(read_bytes / endless.bandwidth)


def test_memory_on_a_gpu_is_shared_out_as_the_engine_does(models: dict[str, Path]) -> None:
    gpu = Device("tiny", 64 << 20, 1e12, 1e14)
    found = sized(models["llama"], gpu, host=2 << 30)
    size = {name: figure.value for name, figure in found.figures.items()}
    assert found.flags["max-device-adapter-bytes"] == 8 << 20
    assert size["device_adapters"] == (8 << 20) // size["adapter"]
    assert size["host_adapters"] == (1 << 30) // size["adapter"]
    left = (64 << 20) - size["weights"] - (10 << 20) - (4 << 20)
    assert found.flags["kv-cache-tokens"] <= left // size["kv_per_token"]


def test_flags_are_ones_that_the_engine_takes(models: dict[str, Path]) -> None:
    for where in (CPU, DEVICES["l4"]):
        flags = {
            name.replace("-", "_"): n for name, n in sized(models["llama"], where).flags.items()
        }
        EngineConfig(**flags)  # type: ignore[arg-type]
    model = models["llama"]
    flags = sized(model, adapters=20, batch_size=4).flags
    runner = ModelRunner(
        EngineConfig(
            model=str(model),
            max_batch_size=flags["max-batch-size"],
            kv_cache_tokens=flags["kv-cache-tokens"],
        )
    )
    assert runner.kv_tokens == flags["kv-cache-tokens"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank must be at least 1, found 0"),
        ({"rps": 0.0}, "rps must be a number more than 0, found 0"),
        ({"headroom": 1.5}, "headroom must be more than 0 and at most 1, found 1.5"),
        ({"prompt_tokens": 300}, r"prompt_tokens \+ new_tokens is 350: this model's limit is 256"),
        ({"targets": ("lm_head",)}, "only linears of the layers are counted, not lm_head"),
    ],
)
def test_demands_that_make_no_sense(
    models: dict[str, Path], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        sized(models["llama"], **settings)


def test_what_does_not_fit_is_said(models: dict[str, Path]) -> None:
    with pytest.raises(InvalidRequest, match="do not hold the weights"):
        sized(models["llama"], Device("tiny", 100_000, 1e12, 1e14))
    with pytest.raises(InvalidRequest, match="host memory has 0 bytes left for adapters"):
        sized(models["llama"], Device("tiny", 64 << 20, 1e12, 1e14), host=1 << 30)
    with pytest.raises(AdapterRejected, match=r"target_modules \('nope'\) matches no linear"):
        sized(models["llama"], targets=("nope",))
    with pytest.raises(InvalidRequest, match=r"device must be one of cpu, h100, .* found 'tpu'"):
        device("tpu", None, None, None)


def command(*more: str, model: str) -> list[str]:
    base = ["plan", "--model", model, "--adapters", "500", "--rank", "8", "--rps", "3"]
    return [*base, "--prompt-tokens", "64", "--new-tokens", "32", *more]


def test_the_command_takes_a_directory_or_a_config(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "renamed.json"
    config.write_text((models["llama"] / "config.json").read_text())
    printed = []
    for model in (models["llama"], config):
        assert main(command("--device", "a100", "--json", model=str(model))) == 0
        printed.append(json.loads(capsys.readouterr().out))
    assert printed[0] == printed[1]
    assert printed[0]["figures"]["bandwidth"]["kind"] == "data sheet"
    assert main(command("--device", "l4", model=str(config))) == 0
    text = capsys.readouterr().out
    assert "flags of each lorax-serve: --max-batch-size 128 --kv-cache-tokens" in text
    assert "values of the Helm chart:\n  replicas: 1\n  settings:\n    max-batch-size: 128" in text
    assert "each replica holds all adapters in memory: any routing will do" in text


def test_the_command_measures_this_cpu_unless_it_is_told(
    models: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(models["llama"])
    assert main(command("--device", "cpu", "--json", model=model)) == 0
    measured = json.loads(capsys.readouterr().out)["figures"]
    assert (measured["bandwidth"]["kind"], measured["flops"]["kind"]) == ("measured", "measured")
    assert measured["bandwidth"]["value"] > 1e8
    told = command(
        "--device", "cpu", "--bandwidth", "28G", "--flops", "1.6T", "--json", model=model
    )
    assert main(told) == 0
    given = json.loads(capsys.readouterr().out)["figures"]
    assert (given["bandwidth"]["value"], given["flops"]["value"]) == (28e9, 1.6e12)


def test_mistakes_at_the_command_are_told(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(model=str(tmp_path / "nowhere"))) == 1
    assert "no such directory or config.json" in capsys.readouterr().err
    assert main(command("--memory", "0", model=str(models["llama"]))) == 1
    assert capsys.readouterr().err == "lorax: error: memory must be more than 0, found 0\n"
    with pytest.raises(SystemExit):
        main(command("--memory", "much", model=str(models["llama"])))
    assert "'much' is no number such as 24Gi or 1.5T" in capsys.readouterr().err


def test_sizes_have_the_units_of_kubernetes() -> None:
    found = [_bytes(text) for text in ("24Gi", "1.5T", "7", "2k", "3MiB")]
    assert found == [24 << 30, 15 * 10**11, 7, 2000, 3 << 20]
