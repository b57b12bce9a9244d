"""The engine's forward against PEFT's, adapter by adapter, in one mixed batch (fp32)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lorax_serve.config import EngineConfig
from lorax_serve.core import BASE, Batch, SamplingParams, Sequence
from tests.helpers import TINY_GPT2, TINY_LLAMA, needs_kernels, save_peft_adapter, save_tiny_model
from tests.model.logits_runner import LogitsRunner, load

ADAPTERS: dict[str, dict[str, Any]] = {
    "rank4": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "rank16_rslora": {
        "r": 16,
        "lora_alpha": 16,
        "use_rslora": True,
        "target_modules": "all-linear",
    },
    "pattern": {
        "r": 8,
        "lora_alpha": 12,
        "target_modules": r".*\.(k_proj|o_proj|down_proj|gate_proj)",
        "rank_pattern": {"down_proj": 3, r"layers\.1\.self_attn\.k_proj": 5},
        "alpha_pattern": {"o_proj": 31, "gate_proj": 2},
    },
    "layers": {
        "r": 2,
        "lora_alpha": 5,
        "target_modules": ["up_proj", "q_proj"],
        "layers_to_transform": [1],
    },
}
GPT2_ADAPTERS: dict[str, dict[str, Any]] = {
    "rank4": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["c_attn", "c_proj"],  # attention's and the MLP's
        "fan_in_fan_out": True,
    },
    "rank16_rslora": {
        "r": 16,
        "lora_alpha": 16,
        "use_rslora": True,
        "target_modules": "all-linear",
        "fan_in_fan_out": True,
    },
    "pattern": {
        "r": 8,
        "lora_alpha": 12,
        "target_modules": r".*\.(attn\.c_proj|c_fc)",
        "rank_pattern": {"c_fc": 3, r"h\.1\.attn\.c_proj": 5},
        "alpha_pattern": {"c_fc": 31},
        "fan_in_fan_out": True,
    },
    "layers": {
        "r": 2,
        "lora_alpha": 5,
        "target_modules": ["c_attn", "c_fc"],
        "layers_to_transform": [1],
    },
}
STEPS = 20
TOLERANCE = 1e-4


# PEFT corrects the flag, which does not change unmerged LoRA, and says so.
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
@pytest.mark.parametrize(
    ("base_name", "adapters", "device", "kernels"),
    [
        pytest.param("tiny_model", ADAPTERS, "cpu", "torch", id="torch"),
        pytest.param("tiny_model", ADAPTERS, "cpu", "compiled", id="compiled", marks=needs_kernels),
        pytest.param("tiny_model", ADAPTERS, "cpu", "paged", id="paged"),
        pytest.param("tiny_gpt2", GPT2_ADAPTERS, "cpu", "torch", id="gpt2"),
        pytest.param("tiny_gpt2", GPT2_ADAPTERS, "cpu", "paged", id="gpt2-paged"),
        *(
            pytest.param(base, adapters, "cuda", kernels, id=f"{base}-{kernels}-cuda", marks=gpu)
            for base, adapters in (("tiny_model", ADAPTERS), ("tiny_gpt2", GPT2_ADAPTERS))
            for kernels in ("torch", "paged", "triton")
            for gpu in [pytest.mark.gpu]
        ),
    ],
)
def test_mixed_batch_equals_peft_alone(
    base_name: str,
    adapters: dict[str, dict[str, Any]],
    device: str,
    kernels: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    model_directory: Path = request.getfixturevalue(base_name)
    runner = LogitsRunner(
        EngineConfig(
            model=str(model_directory),
            dtype="float32",
            max_batch_size=12,
            device=device,
            kernels=kernels,
        )
    )
    names: list[str | None] = [None, *adapters, None, *adapters]
    slots = {name: slot for slot, name in enumerate(adapters)}
    directories = {}
    for seed, (key, config) in enumerate(adapters.items()):
        torch.manual_seed(seed)
        directories[key] = save_peft_adapter(model_directory, tmp_path / key, **config)
        written = directories[key] / "adapter_config.json"
        asked = {"fan_in_fan_out": config.get("fan_in_fan_out", False)}
        written.write_text(json.dumps(json.loads(written.read_text()) | asked))
        load(runner, slots[key], directories[key])
    generator = torch.Generator().manual_seed(3)
    sequences = []
    for row, name in enumerate(names):
        prompt = torch.randint(3, 128, (5 + 3 * row,), generator=generator).tolist()
        sequence = Sequence(row, prompt, len(prompt), row, SamplingParams(), 99, 0, frozenset())
        # Rows out of order and with a hole, as after sequences have come and gone.
        sequence.kv_slot = (row * 7) % 12
        sequence.adapter_slot = BASE if name is None else slots[name]
        sequences.append(sequence)

    def references() -> list[torch.Tensor]:
        rows = []
        for sequence, name in zip(sequences, names, strict=True):
            model = base if name is None else peft_models[name]
            ids = torch.tensor([sequence.tokens[: sequence.computed]])
            with torch.no_grad():
                rows.append(model(ids).logits[0, -1])
        return rows

    base = AutoModelForCausalLM.from_pretrained(model_directory, dtype=torch.float32)
    peft_models = {
        key: PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(model_directory, dtype=torch.float32), path
        ).eval()
        for key, path in directories.items()
    }
    # The first half starts alone, so that later steps mix prompts (in chunks) with decoding rows.
    first, second = sequences[:5], sequences[5:]
    runner.step(Batch(prefills=[(s, len(s.tokens)) for s in first]))
    runner.step(Batch(decodes=first, prefills=[(s, 4) for s in second]))
    for s in second:
        s.computed = 4
    runner.step(Batch(decodes=first, prefills=[(s, len(s.tokens) - 4) for s in second]))
    worst = 0.0
    for _ in range(STEPS):
        runner.step(Batch(decodes=sequences))
        for row, want in enumerate(references()):
            got = runner.logits[row].cpu()
            worst = max(worst, (got - want).abs().max().item())
    assert worst < TOLERANCE
    # The adapters must really change the result, or the test could not fail.
    tokens = torch.tensor([sequences[0].tokens])
    with torch.no_grad():
        plain = base(tokens).logits[0, -1]
        changes = [(m(tokens).logits[0, -1] - plain).abs().max() for m in peft_models.values()]
    assert min(changes) > 100 * TOLERANCE


def test_prefill_logits_equal_peft(tiny_model: Path, make_adapter: Callable[..., Path]) -> None:
    runner = LogitsRunner(EngineConfig(model=str(tiny_model), dtype="float32", max_batch_size=8))
    sequences, wanted = [], []
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    for row, (name, config) in enumerate(ADAPTERS.items()):
        directory = make_adapter(name, row, **config)
        load(runner, row, directory)
        prompt = torch.randint(3, 128, (9 + row,), generator=torch.Generator().manual_seed(row))
        sequence = Sequence(
            row, prompt.tolist(), len(prompt), row, SamplingParams(), 9, 0, frozenset()
        )
        sequence.kv_slot, sequence.adapter_slot = row, row
        sequences.append(sequence)
        model = PeftModel.from_pretrained(base, directory).eval()
        with torch.no_grad():
            wanted.append(model(prompt[None]).logits[0, -1])
        base = model.unload()
    runner.step(Batch(prefills=[(s, len(s.tokens)) for s in sequences]))
    for row, want in enumerate(wanted):
        torch.testing.assert_close(runner.logits[row], want, atol=TOLERANCE, rtol=0)


def architectures() -> dict[str, Any]:
    from transformers import GPT2Config, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

    sizes = {
        key: value
        for key, value in TINY_LLAMA.to_diff_dict().items()
        if key.endswith(("_size", "_heads", "_layers", "_dim", "_id", "_positions"))
        or key.startswith("num_")
    } | {"tie_word_embeddings": True}
    llama3 = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    return {
        "llama3_rope_and_biases": LlamaConfig(
            **sizes, attention_bias=True, mlp_bias=True, rope_parameters=llama3
        ),
        "mistral": MistralConfig(**sizes, sliding_window=None),
        "qwen2": Qwen2Config(**sizes),
        "qwen3": Qwen3Config(**sizes),
        "gpt2": TINY_GPT2,
        "gpt2_relu_and_untied": GPT2Config(
            **TINY_GPT2.to_diff_dict()
            | {"activation_function": "relu", "n_inner": 80, "tie_word_embeddings": False}
        ),
        "gpt2_gelu": GPT2Config(**TINY_GPT2.to_diff_dict() | {"activation_function": "gelu"}),
    }


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
@pytest.mark.parametrize("kind", architectures())
def test_other_architectures_equal_transformers(kind: str, tmp_path: Path) -> None:
    config = architectures()[kind]
    save_tiny_model(tmp_path / "model", config)
    directory = save_peft_adapter(
        tmp_path / "model", tmp_path / "a", r=4, target_modules="all-linear"
    )
    runner = LogitsRunner(EngineConfig(model=str(tmp_path / "model"), dtype="float32"))
    load(runner, 0, directory)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    peft_model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32), directory
    ).eval()
    prompt = torch.arange(5, 95)
    pair = [
        Sequence(row, prompt.tolist(), len(prompt), None, SamplingParams(), 9, 0, frozenset())
        for row in range(2)
    ]
    pair[0].kv_slot, pair[1].kv_slot, pair[1].adapter_slot = 0, 1, 0
    runner.step(Batch(prefills=[(s, len(s.tokens)) for s in pair]))
    for _ in range(3):
        runner.step(Batch(decodes=pair))
    for sequence, model in zip(pair, (base, peft_model), strict=True):
        with torch.no_grad():
            want = model(torch.tensor([sequence.tokens[: sequence.computed]])).logits[0, -1]
        torch.testing.assert_close(runner.logits[sequence.request_id], want, atol=TOLERANCE, rtol=0)
