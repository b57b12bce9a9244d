"""Memory and time of a training base by how its linear layers are kept: bfloat16, int8, or nf4.

Random weights of two 0.5B shapes, as bfloat16 safetensors. ``llama`` has 93 % of its parameters in
linear layers, as models of 7B and more have; ``qwen`` is Qwen2.5-0.5B's shape, of whose parameters
28 % are a vocabulary that stays bfloat16. Each case runs in a process of its own. What is counted
is the process's highest resident memory while the base is loaded, mapped files included, less what
it had after the imports; then LoRA training steps of one row.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config
from transformers import Qwen2ForCausalLM as Qwen2

from benchmarks.command import Result, parser, run
from benchmarks.measure import digits, medians
from benchmarks.plot import Chart
from lorax_train.config import InjectionConfig, Quantize
from lorax_train.data.encode import Example
from lorax_train.loop.loss import TargetLoss
from lorax_train.model.base import load_model
from lorax_train.model.inject import inject
from lorax_train.model.quantize import QuantizedLinear, count_parameters

FORMATS: dict[Quantize, str] = {"none": "bfloat16", "int8": "int8", "nf4": "nf4"}
SHAPES = ("llama", "qwen")
_MIB = 1 << 20


def build(shape: str) -> PreTrainedModel:
    """A model of random bfloat16 weights."""
    with torch.device("meta"):
        if shape == "llama":
            config: Any = LlamaConfig(
                vocab_size=32000,
                hidden_size=1024,
                intermediate_size=4096,
                num_hidden_layers=24,
                num_attention_heads=16,
                num_key_value_heads=16,
                tie_word_embeddings=True,
            )
            model: Any = LlamaForCausalLM(config)
        else:
            config = Qwen2Config(
                vocab_size=151936,
                hidden_size=896,
                intermediate_size=4864,
                num_hidden_layers=24,
                num_attention_heads=14,
                num_key_value_heads=2,
                tie_word_embeddings=True,
            )
            model = Qwen2(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    model.tie_weights()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=0.02)
        else:
            parameter.data.fill_(1)
    found: PreTrainedModel = model
    return found


async def measure(options: argparse.Namespace) -> Result:
    figures: dict[str, dict[str, dict[str, float]]] = {}
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as place:
        for shape in SHAPES:
            torch.manual_seed(options.seed)
            directory = Path(place, shape)
            build(shape).save_pretrained(directory)
            rounds: dict[str, list[dict[str, float]]] = {label: [] for label in FORMATS.values()}
            for _ in range(options.repeats):
                for quantize, label in FORMATS.items():
                    with ProcessPoolExecutor(1, context) as pool:
                        case = pool.submit(one, str(directory), quantize, options.tokens)
                        rounds[label].append(case.result())
            figures[shape] = {label: medians(each) for label, each in rounds.items()}
    headline = {}
    for shape, cases in figures.items():
        whole = cases["bfloat16"]["weights_mib"]
        for label in ("int8", "nf4"):
            share = cases[label]["load_peak_mib"] / whole
            headline[f"{shape}_{label}_peak_of_bfloat16"] = digits(share)
    return Result(
        headline=headline,
        details={"figures": figures},
        chart=Chart(
            "Loading a 0.5B base: highest resident memory",
            "MiB",
            {
                shape: {label: case["load_peak_mib"] for label, case in cases.items()}
                for shape, cases in figures.items()
            },
        ),
    )


def one(directory: str, quantize: Quantize, tokens: int) -> dict[str, float]:
    """One case, in a process of its own."""
    dtype, device = torch.bfloat16, torch.device("cpu")
    # What is needed whatever the model: bitsandbytes, torch's threads.
    QuantizedLinear(torch.randn(1024, 1024), None, "nf4").dense().sum()
    before = _resident("VmRSS")
    _reset_peak()
    started = time.perf_counter()
    model = load_model("random", Path(directory), dtype, device, quantize)
    seconds = time.perf_counter() - started
    peak = _resident("VmHWM") - before
    tensors = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in model.parameters()}
    tensors |= {t.untyped_storage().data_ptr(): t.untyped_storage() for t in model.buffers()}
    weights = sum(storage.nbytes() for storage in tensors.values()) / _MIB
    parameters = count_parameters(model)
    example = Example(tuple(range(100, 100 + tokens)), (False, *[True] * (tokens - 1)), "")
    loss = TargetLoss.prepare(model, example)
    adapter = inject(model, InjectionConfig(r=16), "random", seed=0)
    loss.routing = adapter.routing
    batch = loss.collate([example], 0)
    times = []
    for _ in range(4):
        started = time.perf_counter()
        torch.autograd.backward(loss(batch)[0])
        times.append(time.perf_counter() - started)
    return {
        "parameters": parameters,
        "weights_mib": weights,
        "load_peak_mib": peak,
        "load_seconds": seconds,
        "train_peak_mib": _resident("VmHWM") - before,
        "train_tokens_per_second": tokens / statistics.median(times[1:]),
    }


def _resident(key: str) -> float:
    """MiB of this process: ``VmRSS`` now, ``VmHWM`` at most since ``_reset_peak``."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


if __name__ == "__main__":
    flags = parser(__doc__, repeats=3)
    flags.add_argument("--tokens", type=int, default=256, help="in the row that is trained on")
    run("quantized_base", flags, measure)
