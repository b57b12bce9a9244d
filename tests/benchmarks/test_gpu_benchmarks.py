"""The GPU's benchmarks on a tiny model and a CPU: that all of it runs and is counted right."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu.__main__ import PARTS, plot, run
from benchmarks.gpu.arena import CHUNK, plan_of, random_arena
from benchmarks.gpu.bench import Bench, advance
from benchmarks.gpu.report import figures, read_parts
from benchmarks.gpu.shapes import SHAPES, Shape
from benchmarks.gpu.weights import RandomLlama
from lorax_serve.checkpoint.architectures import read_spec
from lorax_serve.core import Batch
from lorax_serve.gpu.lora import ALIGNMENT, HEADER, MAX_SLICES, SiteShape

CPU = torch.device("cpu")
TINY = SHAPES["tiny"]
HAS_OPS = importlib.util.find_spec("lorax_serve.gpu.reference.norm") is not None
needs_ops = pytest.mark.skipif(
    not HAS_OPS, reason="the calls of gpu.ops are not there yet (lorax_serve.gpu.reference.norm)"
)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """What is tiny is slower on several threads; the engine's setting of the interpreter ends."""
    threads, interval = torch.get_num_threads(), sys.getswitchinterval()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    sys.setswitchinterval(interval)


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench(TINY, CPU, "torch")


def _line(out: Path, *parts: str) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    assert run(TINY, CPU, "torch", list(parts), out) == []
    results = read_parts(out, TINY.name, tuple(PARTS))
    assert results.keys() == set(parts)
    line = figures(TINY, results)
    assert line["parts"].keys() == set(parts)
    return line, results


def _assert_measured(line: dict[str, Any], *names: str) -> None:
    """These figures are there, and no others."""
    rest = {"shape", "devices", "parts"}
    assert {name for name, value in line.items() if value is not None} == rest | set(names)
    for name in names:
        assert math.isfinite(line[name])


def test_steps_of_every_batch_have_their_floor_and_their_base(tmp_path: Path) -> None:
    line, results = _line(tmp_path, "decode", "prefill")
    ratios = [
        *("lora_over_base_b1_d1", "lora_over_base_b4_d1"),
        *("lora_over_base_b4_d2", "lora_over_base_b4_d4"),
    ]
    steps = [f"decode_b4_{name}" for name in ("ms", "floor_ms", "over_floor", "tb_per_s")]
    prefill = ["prefill_tokens_per_s", "prefill_lora_over_base"]
    _assert_measured(line, *steps, *ratios, "base_tax", "top_p_over_greedy", *prefill)
    assert line["decode_b4_over_floor"] > 1
    cases = [(row["batch"], row["rank"], row["distinct"]) for row in results["decode"]["cases"]]
    left = [tuple(row.values()) for row in results["decode"]["left_out_for_memory"]]
    counts = {1: (1,), 4: (1, 2, 4)}
    wanted = [(b, rank, n) for rank in (4, 8) for b, some in counts.items() for n in some]
    assert sorted(cases + left) == sorted(
        wanted + [(b, rank, 0) for rank in (4, 8) for b in counts]
    )
    plot(TINY, results, tmp_path)
    assert (tmp_path / "gpu_decode_tiny.png").stat().st_size > 10_000


def test_adapters_come_from_every_tier_and_beside_streams(tmp_path: Path) -> None:
    line, results = _line(tmp_path, "adapter_load", "disturbance")
    ttft = ["host_added_ttft_ms", "disk_added_ttft_ms"]
    _assert_measured(line, *ttft, "host_itl_p99_ratio", "disk_itl_p99_ratio")
    assert results["adapter_load"]["ttft_ms"].keys() == {"base", "device", "host", "disk"}
    assert results["adapter_load"]["adapter_bytes"] > 0
    runs = results["disturbance"]["runs"]
    assert runs["quiet"]["intrusions"] == 0
    assert all(runs[name]["intrusions"] > 0 for name in ("requests", "host", "disk"))


def test_more_and_more_adapters_answer_the_same_requests(tmp_path: Path) -> None:
    line, results = _line(tmp_path, "slora")
    _assert_measured(line, "slora_most_over_fewest")
    assert [row["adapters"] for row in results["slora"]["runs"]] == [0, 2, 10]
    assert results["slora"]["runs"][-1]["device_evictions"] > 0


def test_peers_run_on_the_same_weights(tmp_path: Path) -> None:
    line, results = _line(tmp_path, "peers")
    batching = [f"{what}_over_continuous_batching" for what in ("throughput", "itl")]
    _assert_measured(line, "step_over_peft_mixed", *batching)
    assert "error" not in json.dumps(results["peers"])


@needs_ops
def test_every_call_is_timed(tmp_path: Path) -> None:
    line, results = _line(tmp_path, "kernels")
    _assert_measured(line, "kernels_failed")
    assert line["kernels_failed"] == 0
    names = {row["name"].partition(" ")[0] for row in results["kernels"]["cases"]}
    assert names == {
        *("rms_norm", "add_rms_norm", "silu_mul", "rotate_and_store", "decode_attention"),
        *("lora_shrink", "lora_expand", "draw", "linear"),
    }
    plot(TINY, results, tmp_path)
    assert (tmp_path / "gpu_kernels_tiny.png").stat().st_size > 10_000


def test_what_did_not_run_has_no_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(bench: Bench) -> dict[str, Any]:
        raise RuntimeError("no device memory")

    def half(bench: Bench) -> dict[str, Any]:
        return {"peft": {"error": "it failed"}, "continuous_batching": {"error": "it too"}}

    monkeypatch.setitem(PARTS, "decode", fail)
    monkeypatch.setitem(PARTS, "peers", half)
    (tmp_path / "gpu_decode_tiny.json").write_text('{"cases": []}')  # of an earlier run
    failed = run(TINY, CPU, "torch", ["decode", "peers"], tmp_path)
    assert failed == ["decode", "peers (2 of its cases)"]
    results = read_parts(tmp_path, TINY.name, tuple(PARTS))
    assert results.keys() == {"peers"}
    _assert_measured(figures(TINY, results))


def test_transformers_has_the_same_weights(bench: Bench) -> None:
    request = bench.request(0, 12)
    bench.prefill([request])
    for _ in range(5):
        advance(bench.runner, Batch(decodes=[request]))
    prompt = torch.tensor([request.tokens[:12]])
    model = bench.llama.transformers_model()
    theirs = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=6,
        pad_token_id=0,
    )
    assert theirs[0].tolist() == request.tokens
    assert model.model.layers[1].self_attn.k_proj.weight.data_ptr() == (
        bench.llama.layers[1].qkv.weight[64:].data_ptr()
    )
    bench.release()


@pytest.mark.parametrize(("name", "billions"), [("8b", 8.03), ("1b", 1.24)])
def test_the_large_shapes_are_those_of_llama(name: str, billions: float, tmp_path: Path) -> None:
    from transformers import LlamaConfig

    config: Any = LlamaConfig(**SHAPES[name].config, architectures=["LlamaForCausalLM"])
    config.save_pretrained(tmp_path)
    spec = read_spec(tmp_path)
    assert round(spec.num_parameters / 1e9, 2) == billions
    assert spec.inv_freq is not None


def test_the_floor_is_what_a_step_must_read(bench: Bench) -> None:
    spec, floor = bench.llama.spec, bench.floor(batch=3, context=10, adapters=7)
    layers = spec.num_layers * (64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 128)
    assert floor.weights == 4 * (layers + 256 * 64)
    assert floor.keys_and_values == 4 * 3 * 10 * spec.num_layers * 2 * 32
    assert floor.bytes == floor.weights + floor.keys_and_values + 7


def test_an_arena_is_laid_out_as_its_header_says() -> None:
    sites = [SiteShape(0, 8, (6, 4, 4)), SiteShape(1, 6, (8,))]
    arena, starts = random_arena(sites, 3, 2, torch.bfloat16, CPU)
    places: list[tuple[int, int]] = [(0, 2 * len(sites) * HEADER)]
    header = arena[: places[0][1]].view(torch.int32).view(len(sites), HEADER)
    assert torch.equal(arena[starts[1] :][: places[0][1]], arena[: places[0][1]])
    assert header[:, :MAX_SLICES].tolist() == [[3, 3, 3], [3, 0, 0]]
    for site, numbers in zip(sites, header.tolist(), strict=True):
        for part, width in enumerate(site.widths):
            a, b = numbers[MAX_SLICES + part], numbers[2 * MAX_SLICES + part]
            places += [(a, a + 3 * site.in_features), (b, b + 3 * width)]
    assert all(2 * begin % ALIGNMENT == 0 for begin, _ in places)
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(places))
    assert places[-1][1] <= starts[1] == arena.numel() // 2


def test_a_plan_names_every_row_once() -> None:
    plan = plan_of(70, [0, 100, 200], 12, CPU)
    assert plan.max_rank == 16
    assert plan.rows.shape == (6, CHUNK)
    assert plan.blobs.tolist() == [0, 0, 100, 100, 200, 200]
    assert sorted(plan.rows[plan.rows >= 0].tolist()) == list(range(70))
    assert plan.rows[2, :3].tolist() == [1, 4, 7]


def test_it_imports_only_what_a_gpu_machine_has() -> None:
    """A server's and the embedded model's packages are not installed there."""
    absent = ["grpc", "grpc_health", "grpc_reflection", "gguf", "boto3", "prometheus_client"]
    program = f"""
import importlib.machinery as machinery
found = machinery.PathFinder.find_spec.__func__
def find_spec(cls, name, *rest):
    return None if name.partition(".")[0] in {absent} else found(cls, name, *rest)
machinery.PathFinder.find_spec = classmethod(find_spec)
import benchmarks.gpu.__main__
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_tied_embeddings_are_one_tensor() -> None:
    tied = Shape("tied", {**TINY.config, "tie_word_embeddings": True}, TINY.sizes)
    weights = RandomLlama(tied, torch.float32, CPU).decoder_weights()
    assert weights.head is weights.embedding
