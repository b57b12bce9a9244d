"""transformers and PEFT on the same weights, in the same process, one after the other."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
import time
import traceback
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch

from benchmarks.gpu.adapters import TARGETS
from benchmarks.gpu.bench import Bench, say
from benchmarks.gpu.decode import step_ms
from benchmarks.gpu.serving import LocalEngine
from benchmarks.measure import digits
from lorax_serve.core import BASE

__all__ = ["measure"]

_PATIENCE_SECONDS = 60.0
_PAGE = 256


def measure(bench: Bench) -> dict[str, Any]:
    """Continuous batching of the base, then PEFT's batch of mixed adapters.

    A peer that fails is named with its error, and has no figures.
    """
    model = bench.llama.transformers_model()
    found = {
        "versions": {name: version(name) for name in ("transformers", "peft", "torch")},
        "continuous_batching": _attempt(lambda: _continuous_batching(bench, model)),
        "peft": _attempt(lambda: _peft(bench, model)),
    }
    bench.release()
    return found


def _attempt(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return run()
    except Exception as error:  # a peer's defect must not cost the other parts their figures
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}


def _continuous_batching(bench: Bench, model: Any) -> dict[str, Any]:
    """The same greedy requests of the base model, all there at once, to both systems."""
    count, prompt, new = bench.sizes.peer_requests
    prompts = [bench.request(number, prompt).tokens for number in range(count)]
    theirs = _their_batching(bench, model, prompts, new)
    _our_batching(bench, prompts, new)  # what is built at first use is built then
    ours = _our_batching(bench, prompts, new)
    say("peers: continuous batching done")
    return {
        "requests": count,
        "prompt_tokens": prompt,
        "new_tokens": new,
        "transformers": theirs,
        "lorax": ours,
        "throughput_over_transformers": digits(
            ours["output_tokens_per_s"] / theirs["output_tokens_per_s"]
        ),
        "itl_over_transformers": digits(ours["itl_ms_p50"] / theirs["itl_ms_p50"]),
    }


def _their_batching(bench: Bench, model: Any, prompts: list[list[int]], new: int) -> dict[str, Any]:
    from transformers import ContinuousBatchingConfig, GenerationConfig
    from transformers.generation.continuous_batching.utils import WorkloadHints

    count, longest = len(prompts), len(prompts[0]) + new
    pages = count * (math.ceil(longest / _PAGE) + 1)
    # As many tokens in a step as ours has, and a cache that holds all requests.
    names = {field.name for field in dataclasses.fields(ContinuousBatchingConfig)}
    page = "page_size" if "page_size" in names else "block_size"  # its name up to some 5.x
    limits: dict[str, Any] = {page: _PAGE, "num_blocks": pages}
    settings = ContinuousBatchingConfig(max_batch_tokens=bench.sizes.prefill_tokens, **limits)
    greedy: Any = GenerationConfig
    manager = model.continuous_batching_context_manager(
        generation_config=greedy(do_sample=False, eos_token_id=-1, pad_token_id=0),
        continuous_batching_config=settings,
        workload_hints=WorkloadHints(
            max_prompt_length=len(prompts[0]), max_generated_length=new, num_requests=count
        ),
    )
    figures: dict[str, Any] = {}
    with manager as running:
        for wanted in (min(8, new), new):  # the first time is a warm-up
            started = time.perf_counter()
            running.add_requests(prompts, max_new_tokens=wanted, record_timestamps=True)
            results: list[Any] = []
            while len(results) < count:
                result = running.get_result(timeout=1)
                if result is not None and result.is_finished():
                    if result.error is not None:
                        raise RuntimeError(result.error)
                    results.append(result)
                if time.perf_counter() - started > _PATIENCE_SECONDS:
                    raise RuntimeError(f"{len(results)} of {count} requests ended in a minute")
            seconds = time.perf_counter() - started
            if any(len(result.generated_tokens) != wanted for result in results):
                raise RuntimeError("requests ended before their last token")
            figures = _figures(seconds, [result.timestamps for result in results])
        figures["attention"] = model.config._attn_implementation
    return figures


def _our_batching(bench: Bench, prompts: list[list[int]], new: int) -> dict[str, Any]:
    engine = LocalEngine(bench)
    started = time.perf_counter()
    requests = [engine.submit(prompt, new) for prompt in prompts]
    engine.finish()
    seconds = time.perf_counter() - started
    bench.release()
    return _figures(seconds, [engine.times[request] for request in requests])


def _figures(seconds: float, times: list[list[float]]) -> dict[str, Any]:
    gaps = [later - earlier for some in times for earlier, later in itertools.pairwise(some)]
    return {
        "output_tokens_per_s": digits(sum(map(len, times)) / seconds),
        "itl_ms_p50": digits(1e3 * statistics.median(gaps)),
    }


def _peft(bench: Bench, model: Any) -> dict[str, Any]:
    """A decoding step of rows that take turns with some adapters, and of the base's rows."""
    sizes, rank = bench.sizes, bench.sizes.ranks[0]
    rows = [bench.request(row, sizes.context - 1) for row in range(sizes.peer_batch)]
    prompts = torch.tensor([row.tokens for row in rows], device=bench.device)
    bench.prefill(rows)
    bench.fill_slots(rank, sizes.peer_adapters)
    ours_base = statistics.median(step_ms(bench, rows, sizes.steps))
    for place, row in enumerate(rows):
        row.adapter_slot = place % sizes.peer_adapters
    ours = statistics.median(step_ms(bench, rows, sizes.steps))
    for row in rows:
        row.adapter_slot = BASE
    bench.release()
    theirs_base = _generate_ms(bench, model, prompts, {})
    mixed = _with_adapters(bench, model, rank, sizes.peer_adapters)
    names = [f"a{place % sizes.peer_adapters}" for place in range(sizes.peer_batch)]
    theirs = _generate_ms(bench, mixed, prompts, {"adapter_names": names})
    say("peers: PEFT done")
    return {
        "batch": sizes.peer_batch,
        "context": sizes.context,
        "rank": rank,
        "adapters": sizes.peer_adapters,
        "step_ms": {
            "lorax_base": digits(ours_base),
            "lorax_mixed": digits(ours),
            "transformers_base": digits(theirs_base),
            "peft_mixed": digits(theirs),
        },
        "lorax_over_peft_mixed": digits(ours / theirs),
        "lorax_over_transformers_base": digits(ours_base / theirs_base),
    }


def _with_adapters(bench: Bench, model: Any, rank: int, count: int) -> Any:
    from peft import LoraConfig, get_peft_model

    def config() -> Any:
        return LoraConfig(
            r=rank,
            lora_alpha=rank,
            target_modules=list(TARGETS),
            init_lora_weights=False,
            task_type="CAUSAL_LM",
        )

    # In the model's dtype: PEFT's own default would compute them in float32.
    own = {"autocast_adapter_dtype": False}
    with torch.device(bench.device):
        mixed = get_peft_model(model, config(), adapter_name="a0", **own)
        for number in range(1, count):
            mixed.add_adapter(f"a{number}", config(), **own)
    return mixed.eval()


@torch.inference_mode()
def _generate_ms(bench: Bench, model: Any, prompts: torch.Tensor, extra: dict[str, Any]) -> float:
    """Milliseconds of a decoding step: what more tokens take than one does."""

    def run(new_tokens: int) -> float:
        return bench.seconds(
            lambda: model.generate(
                input_ids=prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=False,
                max_new_tokens=new_tokens,
                pad_token_id=0,
                **extra,
            )
        )

    steps = bench.sizes.peer_tokens
    run(2)
    differences = [run(1 + steps) - run(1) for _ in range(2)]
    return 1e3 * statistics.median(differences) / steps
