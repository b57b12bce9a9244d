"""DoRA, PiSSA, rsLoRA, chosen layers, embeddings and heads: what is saved is what was trained, for
PEFT and for the server's reader alike."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig

from lorax_serve.adapter import match_weights, read
from lorax_serve.config import EngineConfig
from lorax_serve.core import Batch, SamplingParams, Sequence
from lorax_serve.errors import TrainingError
from lorax_train.config import (
    DataConfig,
    InjectionConfig,
    LoopConfig,
    OptimizerConfig,
    OutputConfig,
    TrainConfig,
)
from lorax_train.console import Console
from lorax_train.model.base import load_model
from lorax_train.model.inject import inject, module_shapes
from lorax_train.model.quantized_base import original_weights
from lorax_train.run import TrainResult, train
from tests.helpers import TINY_GPT2, TINY_LLAMA, save_tiny_model
from tests.model.logits_runner import LogitsRunner, load

Rows = list[dict[str, Any]]
Configure = Callable[..., TrainConfig]
WriteRows = Callable[..., Path]

CPU = torch.device("cpu")
TOKENS = torch.arange(5, 35)
WORDS: Rows = [{"text": f"w{i + 50} w9 w11 w{i + 6} w{i + 40}"} for i in range(8)]

VARIANTS = {
    "plain": InjectionConfig(r=4),
    "rslora": InjectionConfig(r=4, alpha=6, rslora=True),
    "gaussian, dropout": InjectionConfig(r=2, dropout=0.1, targets="qkv", init="gaussian"),
    "an expression": InjectionConfig(r=4, targets=r"regex:.*\.1\..*(q_proj|up_proj|c_attn|c_fc)"),
    "dora": InjectionConfig(r=4, dora=True),
    "dora with rslora": InjectionConfig(r=4, dora=True, rslora=True, targets="qkv"),
    "pissa": InjectionConfig(r=4, init="pissa"),
    "pissa with rslora": InjectionConfig(r=3, init="pissa", rslora=True, targets="qkv"),
    "pissa with dora": InjectionConfig(r=4, init="pissa", dora=True),
    "layers": InjectionConfig(r=4, layers=(1,)),
}
ENDS = {
    "embedding": {"gpt2": "wte", "llama": "embed_tokens"},
    "head": {"gpt2": "lm_head", "llama": "lm_head"},
    "both and more": {"gpt2": "wte,lm_head,qkv", "llama": "embed_tokens,lm_head,qkv"},
}
BASES = ["llama", "tied", "gpt2"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models that the server has too, with words as tokens."""
    root = tmp_path_factory.mktemp("bases")
    tied = LlamaConfig(**TINY_LLAMA.to_dict() | {"tie_word_embeddings": True})
    configs = {"llama": TINY_LLAMA, "tied": tied, "gpt2": TINY_GPT2}
    for name, config in configs.items():
        save_tiny_model(root / name, config)
    return {name: root / name for name in configs}


# What the other flags that change the files may change beside the adapter's own settings.
OTHERS: dict[str, dict[str, Any]] = {
    "loraplus": {"optimizer": OptimizerConfig(lr=5e-3, loraplus_ratio=8.0)},
    "bfloat16 file": {"save_dtype": "bfloat16"},
    "portable": {"portable": True, "lora": InjectionConfig(r=4, rslora=True)},
    "portable pissa": {"portable": True, "lora": InjectionConfig(r=4, init="pissa")},
    "nf4": {"quantize": "nf4"},
    "int8": {"quantize": "int8"},
    "int8 dora": {"quantize": "int8", "lora": InjectionConfig(r=4, dora=True)},
}


def run(
    configure: Configure, base: Path, data: Path, lora: InjectionConfig, **more: Any
) -> TrainResult:
    config = configure(base, data, lora=lora, steps=4, lr=2e-2, **more)
    return train(config, Console(io.StringIO()))


def logits_of(result: TrainResult) -> torch.Tensor:
    result.adapter.train(False)
    with torch.no_grad(), result.adapter.alone():
        logits: torch.Tensor = result.model(input_ids=TOKENS[None]).logits[0]
    return logits


def served(base: Path, directory: Path) -> torch.Tensor:
    """What the server computes of the same."""
    config = EngineConfig(str(base), dtype="float32", kernels="torch", max_sequence_length=64)
    runner = LogitsRunner(config)
    load(runner, 0, directory)
    tokens = TOKENS.tolist()
    sequence = Sequence(
        0, tokens, len(tokens), None, SamplingParams(), 1, 0, frozenset(), kv_slot=0
    )
    sequence.adapter_slot = 0
    runner.step(Batch(prefills=[(sequence, len(tokens))]))
    return runner.logits[0]


def check(result: TrainResult, base: Path, saved: torch.dtype = torch.float32) -> None:
    """The files give the logits of the model in training, in PEFT and in the server; of one that
    was trained on a quantised base, those with the base's own weights."""
    assert result.directory is not None
    with result.adapter.rounded(saved), original_weights(result.model, base):
        ours = logits_of(result)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        before = plain(input_ids=TOKENS[None]).logits[0]
        loaded = PeftModel.from_pretrained(plain, result.directory).eval()
        theirs = loaded(input_ids=TOKENS[None]).logits[0]
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert (ours - before).abs().max() > 1e-2
    files = read(result.directory)
    shapes = module_shapes(load_model("tiny", base, torch.float32, CPU))
    weights = match_weights(files.config, files.tensors, shapes)
    assert list(weights.pairs) == list(result.adapter.layers)
    torch.testing.assert_close(served(base, result.directory), ours[-1], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("base", ["llama", "gpt2"])
@pytest.mark.parametrize("name", VARIANTS)
def test_the_files_of_each_kind_compute_what_was_trained(
    name: str, base: str, bases: dict[str, Path], configure: Configure, write_rows: WriteRows
) -> None:
    lora = VARIANTS[name]
    result = run(configure, bases[base], write_rows(WORDS), lora)
    check(result, bases[base])
    assert result.directory is not None
    raw = json.loads((result.directory / "adapter_config.json").read_text())
    assert raw.get("use_dora", False) == lora.dora
    assert raw["layers_to_transform"] == (list(lora.layers) or None)
    assert raw["init_lora_weights"] == ("gaussian" if lora.init == "gaussian" else True)
    assert raw["r"] == lora.r * (2 if lora.init == "pissa" else 1)


@pytest.mark.parametrize("base", ["llama", "gpt2"])
@pytest.mark.parametrize("name", OTHERS)
def test_the_files_of_other_flags_do_so_too(
    name: str,
    base: str,
    bases: dict[str, Path],
    configure: Configure,
    write_rows: WriteRows,
    tmp_path: Path,
) -> None:
    others = {"lora": InjectionConfig(r=4)} | OTHERS[name]
    output = {key: others.pop(key) for key in ("save_dtype", "portable") if key in others}
    place = OutputConfig(tmp_path / "out", **output)
    result = run(configure, bases[base], write_rows(WORDS), output=place, **others)
    check(result, bases[base], getattr(torch, place.save_dtype))


@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings")  # for merging it matters
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")  # of Conv1D and Linear together
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", ENDS)
def test_embeddings_and_heads_can_be_targets(
    name: str, base: str, bases: dict[str, Path], configure: Configure, write_rows: WriteRows
) -> None:
    lora = InjectionConfig(r=4, targets=ENDS[name]["gpt2" if base == "gpt2" else "llama"])
    said = io.StringIO()
    config = configure(bases[base], write_rows(WORDS), lora=lora, steps=4, lr=2e-2)
    check(train(config, Console(said)), bases[base])
    assert ("shares its weight with another module" in said.getvalue()) == (base != "llama")


@pytest.mark.parametrize("dora", [False, True])
def test_pissas_first_loss_is_the_bases_and_it_trains_the_principal_part(
    dora: bool, llama: Path, configure: Configure, write_rows: WriteRows, pairs: Rows
) -> None:
    data = DataConfig(write_rows(pairs), eval_file=write_rows(pairs, "eval.jsonl"))
    result = train(
        configure(llama, data, lora=InjectionConfig(r=4, init="pissa", dora=dora)),
        Console(io.StringIO()),
    )
    with result.adapter.switched_off():
        again = train(
            configure(llama, data, out="plain", steps=1, lora=InjectionConfig(r=4)),
            Console(io.StringIO()),
        )
    assert result.record.eval_losses[0] == again.record.eval_losses[0]
    path, pair = next(iter(result.adapter.pairs().items()))
    assert pair.start is not None
    weight = result.adapter.layers[path].weight
    singular = torch.linalg.svdvals(weight)
    start = torch.linalg.svdvals(pair.scale * pair.start[1] @ pair.start[0])
    torch.testing.assert_close(start[:4], singular[:4], atol=1e-4, rtol=1e-4)
    assert not torch.equal(pair.a, pair.start[0])


def test_pissa_in_bfloat16_files_is_rounded_in_proportion_to_what_was_learned(
    llama: Path, configure: Configure, write_rows: WriteRows, pairs: Rows, tmp_path: Path
) -> None:
    def train_with(save_dtype: Any, lr: float) -> TrainResult:
        output = OutputConfig(tmp_path / f"{save_dtype} {lr}", save_dtype=save_dtype)
        lora = InjectionConfig(r=4, init="pissa")
        config = configure(llama, write_rows(pairs), lora=lora, output=output, lr=lr)
        return train(config, Console(io.StringIO()))

    result = train_with("bfloat16", 1e-5)
    exact = logits_of(result)
    with result.adapter.rounded(torch.bfloat16):
        rounded = logits_of(result)
    with result.adapter.switched_off():
        base = logits_of(result)
    learned = (exact - base).abs().max()
    assert 0 < (rounded - exact).abs().max() < 0.05 * learned


def test_what_cannot_be_exact_is_refused(
    llama: Path, gpt2: Path, configure: Configure, write_rows: WriteRows, pairs: Rows
) -> None:
    def attempt(base: Path, **lora: Any) -> None:
        inject(load_model("tiny", base, torch.float32, CPU), InjectionConfig(**lora), "tiny", 0)

    with pytest.raises(TrainingError, match=r"--dora: model.embed_tokens is an embedding"):
        attempt(llama, targets="embed_tokens,q_proj", dora=True)
    with pytest.raises(TrainingError, match=r"--init pissa: transformer.wte is an embedding"):
        attempt(gpt2, targets="wte", init="pissa")
    with pytest.raises(TrainingError, match=r"k_proj is 16 x 32, so .* at most 16; lower --r"):
        attempt(llama, targets="k_proj", init="pissa", r=17)


def test_an_embedding_that_is_scaled_is_refused() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 32}
    model = Gemma3ForCausalLM(Gemma3TextConfig(**sizes, **heads))  # type: ignore[arg-type]
    with pytest.raises(TrainingError, match=r"scales what model\.embed_tokens gives"):
        inject(model, InjectionConfig(targets="embed_tokens"), "tiny", 0)


def test_checkpointing_trains_the_same_adapter(
    llama: Path, configure: Configure, write_rows: WriteRows, pairs: Rows
) -> None:
    found = []
    for checkpointing in (False, True):
        loop = LoopConfig(max_steps=3, batch_size=4, checkpointing=checkpointing)
        lora = InjectionConfig(r=4, dropout=0.2)
        config = configure(llama, write_rows(pairs), out=f"o{checkpointing}", lora=lora, loop=loop)
        found.append(train(config, Console(io.StringIO())).adapter.tensors(torch.float32))
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, atol=1e-6, rtol=1e-5)
