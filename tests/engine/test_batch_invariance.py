"""A request says the same alone and among neighbours, in random batches through the real engine."""

from __future__ import annotations

import random
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from lorax_serve.core import TokenOutput
from lorax_serve.engine.kv_rows import BLOCK
from tests.engine.test_engine import Local
from tests.fidelity.variants import INVOCATION, UNTIED, everywhere, write_variant
from tests.helpers import TINY_LLAMA, needs_kernels, save_tiny_model

LONGEST, NEW, TOGETHER = 60, 12, 6
BATCHES_PER_ENGINE = 5
VARIANTS = (
    everywhere(r=2),
    everywhere(r=5, target_modules=["q_proj", "up_proj"]),
    everywhere(r=16, use_dora=True),
    everywhere(modules_to_save=["lm_head", "embed_tokens", "norm"]),
    everywhere(alora_invocation_tokens=list(INVOCATION)),
    everywhere(target_modules=["embed_tokens", "lm_head", "v_proj"]),
    everywhere(trainable_token_indices=[3, 9, 77, 20], bias="all"),
)

# And how many batches a quick run has.
MODES: tuple[tuple[str, dict[str, Any], int, list[pytest.MarkDecorator]], ...] = (
    ("float32-torch", {"dtype": "float32", "kernels": "torch"}, 30, []),
    ("float32-compiled", {"dtype": "float32", "kernels": "compiled"}, 50, [needs_kernels]),
    (
        "bfloat16-invariant",
        {"dtype": "bfloat16", "kernels": "compiled", "batch_invariant": True},
        120,
        [needs_kernels],
    ),
)


@dataclass(frozen=True)
class Request:
    tokens: tuple[int, ...]
    adapter: int | None
    sampling: dict[str, Any]

    def submit(self, local: Local, request_id: int) -> None:
        local.submit(request_id, self.tokens, self.adapter, NEW, logprobs=3, **self.sampling)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of sizes that the bfloat16 kernels take."""
    config: Any = LlamaConfig
    sizes = {"hidden_size": 96, "head_dim": 32, "attention_bias": True}
    directory: Path = tmp_path_factory.mktemp("model")
    save_tiny_model(directory, config(**{**TINY_LLAMA.to_diff_dict(), **sizes}))
    return directory


@pytest.fixture(scope="module")
def adapters(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    directories = []
    for seed, variant in enumerate(VARIANTS):
        directories.append(tmp_path_factory.mktemp("adapter"))
        with warnings.catch_warnings():
            # On what it stores of embeddings.
            warnings.simplefilter("ignore")
            write_variant(variant, model, UNTIED, directories[-1], seed)
    return directories


def pool(rng: random.Random) -> list[Request]:
    """Requests of every adapter and of none, greedy and drawn; some begin alike."""
    shared = [rng.randrange(12, 119) for _ in range(BLOCK + 8)]
    requests = []
    for number in range(4 * (len(VARIANTS) + 1)):
        which, kind = divmod(number, 4)
        # Half of them soon need another block of the cache, which may be another's.
        length = (rng.randint(8, LONGEST), LONGEST, BLOCK - 2, BLOCK - 5)[kind]
        tokens = [rng.randrange(12, 119) for _ in range(length)]
        if kind == 1:
            tokens[: len(shared)] = shared
        tokens[-5:-3] = INVOCATION
        sampling = rng.choice(
            (
                {},
                {},
                {"temperature": 0.9, "seed": number},
                {"temperature": 1.2, "seed": number, "top_p": 0.8},
                {"temperature": 1.0, "seed": number, "top_k": 9},
                {"temperature": 0.7, "seed": number, "repetition_penalty": 1.3},
            )
        )
        requests.append(Request(tuple(tokens), which or None, sampling))
    return requests


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Steps this small wait for their threads longer than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def start(model: Path, adapters: list[Path], mode: dict[str, Any], **settings: Any) -> Local:
    local = Local(model, max_sequence_length=96, **{**mode, **settings})
    for version, directory in enumerate(adapters, start=1):
        local.load(version, directory)
    return local


def alone(local: Local, requests: list[Request]) -> list[list[TokenOutput]]:
    for number, request in enumerate(requests):
        request.submit(local, number)
        local.run()
    return [local.outputs[number] for number in range(len(requests))]


def together(
    model: Path,
    adapters: list[Path],
    mode: dict[str, Any],
    batches: int,
    seen: Counter[str],
) -> Iterator[tuple[int, list[TokenOutput]]]:
    """A request's place in the pool and what it got, of each request of all batches.

    ``seen`` counts what happened meanwhile, so that no batch was easier than it should be.
    """
    requests, rng = pool(random.Random(0)), random.Random(1)
    for _ in range(batches // BATCHES_PER_ENGINE):
        local = start(
            model,
            adapters,
            mode,
            max_batch_size=rng.randint(2, TOGETHER),
            max_batch_tokens=rng.choice((1, 3, 7, 64, 256)),
            kv_cache_tokens=rng.choice((96, 128, None)),
            adapter_slots=rng.randint(1, 4),
            adapter_quantum=rng.choice((10, 200)),
        )
        for _ in range(BATCHES_PER_ENGINE):
            chosen = [rng.randrange(len(requests)) for _ in range(TOGETHER)]
            arrivals = sorted(rng.randint(0, 12) for _ in chosen)
            local.outputs.clear()
            for request_id, arrival in enumerate(arrivals):
                for _ in range(arrival - (arrivals[request_id - 1] if request_id else 0)):
                    if local.engine.busy:
                        local.step()
                requests[chosen[request_id]].submit(local, request_id)
            local.run()
            for request_id, number in enumerate(chosen):
                yield number, local.outputs[request_id]
        seen["preemptions"] += local.stats.preemptions
        seen["cached tokens"] += local.stats.prefix_cache_hits
        seen["evictions"] += local.stats.adapters.device_evictions


def tokens_of(outputs: list[TokenOutput]) -> list[int | None]:
    return [output.token_id for output in outputs]


def logprobs_of(outputs: list[TokenOutput]) -> list[object]:
    return [(output.logprob, output.top_logprobs) for output in outputs]


@pytest.mark.parametrize(
    ("mode", "batches"),
    [
        pytest.param(mode, count, id=f"{name}-{count}", marks=marks)
        for name, mode, few, needs in MODES
        for count, marks in ((few, needs), (200, [*needs, pytest.mark.slow]))
    ],
)
def test_neighbours_change_nothing(
    model: Path, adapters: list[Path], mode: dict[str, Any], batches: int
) -> None:
    wanted = alone(start(model, adapters, mode, prefix_caching=False), pool(random.Random(0)))
    # Each says something of its own, so that a row that got another's would be seen.
    assert len({tuple(tokens_of(outputs)) for outputs in wanted}) == len(wanted)
    seen: Counter[str] = Counter()
    checked = 0
    for number, outputs in together(model, adapters, mode, batches, seen):
        assert tokens_of(outputs) == tokens_of(wanted[number]), number
        if "batch_invariant" in mode:
            assert logprobs_of(outputs) == logprobs_of(wanted[number]), number
        checked += 1
    assert checked == batches * TOGETHER
    assert seen["preemptions"] > 5
    assert seen["cached tokens"] > 100
    assert seen["evictions"] > 100


@needs_kernels
@pytest.mark.parametrize("batch_invariant", [True, False])
def test_a_cached_answer_needs_the_mode(
    model: Path, adapters: list[Path], batch_invariant: bool
) -> None:
    """A second turn that has the first answer from the cache, and one that computes it anew."""
    mode = {"dtype": "bfloat16", "kernels": "compiled", "batch_invariant": batch_invariant}
    requests = pool(random.Random(0))
    cached = start(model, adapters, mode)
    seconds, found = [], []
    for request in requests:
        (first,) = alone(cached, [request])
        answer = [output.token_id for output in first if output.token_id is not None]
        seconds.append(replace(request, tokens=(*request.tokens, *answer, 20, 21)))
        found += alone(cached, seconds[-1:])
    wanted = alone(start(model, adapters, mode, prefix_caching=False), seconds)
    same = [logprobs_of(a) == logprobs_of(b) for a, b in zip(found, wanted, strict=True)]
    assert all(same) == batch_invariant


@needs_kernels
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_how_a_prompt_is_cut_changes_no_bit_in_any_mode(
    model: Path, adapters: list[Path], dtype: str
) -> None:
    mode = {"dtype": dtype, "kernels": "compiled", "prefix_caching": False}
    requests = pool(random.Random(0))[::3]
    whole = alone(start(model, adapters, mode), requests)
    cut = alone(start(model, adapters, mode, max_batch_tokens=1), requests)
    assert [*map(logprobs_of, cut)] == [*map(logprobs_of, whole)]
