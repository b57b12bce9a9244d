"""The sampler against its sorting reference, transformers' processors, and plain counting."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lorax_serve.core import SamplingParams, Sequence
from lorax_serve.model.sampling.sampler import draw, kept_by_filters, sample, uniform

VOCAB = 60


def logits_of(seed: int, rows: int = 1, spread: float = 2.0) -> torch.Tensor:
    return spread * torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed))


def sequence(tokens: list[int] | None = None, **params: Any) -> Sequence:
    prompt = tokens or [1, 2, 3]
    return Sequence(0, prompt, len(prompt), None, SamplingParams(**params), 99, 0, frozenset({2}))


def draws(probs: torch.Tensor, top_k: int, top_p: float, number: int) -> Counter[int]:
    rows = probs.expand(number, -1)

    def uniforms(which: Any, attempt: int) -> list[float]:
        return [uniform(row, 0, attempt) for row in which]

    return Counter(draw(rows, [top_k] * number, [top_p] * number, uniforms))


@pytest.mark.parametrize("spread", [0.01, 1.0, 4.0], ids=["flat", "usual", "peaked"])
@pytest.mark.parametrize(
    ("top_k", "top_p"), [(0, 1.0), (0, 0.8), (0, 0.06), (5, 1.0), (12, 0.7), (1, 0.5), (99, 0.9)]
)
def test_draws_follow_the_filtered_distribution(top_k: int, top_p: float, spread: float) -> None:
    probs = logits_of(4, spread=spread).softmax(dim=-1)[0]
    kept = kept_by_filters(probs, top_k, top_p)
    number = 4000
    counts = draws(probs, top_k, top_p, number)
    assert all(kept[token] for token in counts)
    expected = torch.where(kept, probs, 0) / probs[kept].sum()
    seen = torch.tensor([counts[token] / number for token in range(VOCAB)])
    # Six standard deviations of a count, for each of the tokens.
    limit = 6 * (expected * (1 - expected) / number).sqrt() + 1e-9
    assert bool(((seen - expected).abs() <= limit).all())


@given(
    seed=st.integers(0, 999),
    spread=st.floats(0.01, 8),
    top_k=st.integers(1, VOCAB - 1) | st.just(0),
    top_p=st.floats(0.01, 1),
)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_reference_keeps_what_transformers_keeps(
    seed: int, spread: float, top_k: int, top_p: float
) -> None:
    logits = logits_of(seed, spread=spread).double()
    scores = logits
    if top_k:
        scores = TopKLogitsWarper(top_k)(torch.empty(0), scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(torch.empty(0), scores)
    theirs = torch.isfinite(scores[0])
    ours = kept_by_filters(logits.softmax(dim=-1)[0], top_k, top_p)
    # At the edge of the nucleus rounding may decide: at most that one token may differ.
    assert int((theirs != ours).sum()) <= (0 if top_p == 1 else 1)


def test_penalty_and_temperature_equal_transformers() -> None:
    logits = logits_of(8)
    tokens = [5, 9, 9, 41]
    want = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([tokens]), logits.clone())
    greedy = sample(logits.clone(), [sequence(tokens, repetition_penalty=1.7)])
    assert greedy[0].token_id == int(want.argmax())
    # A draw is a step function of one number: the same number picks the same token of both.
    warmed = TemperatureLogitsWarper(0.6)(torch.empty(0), want)
    for seed in range(50):
        one = sequence(tokens, repetition_penalty=1.7, temperature=0.6, seed=seed)
        cdf = warmed.softmax(dim=-1)[0].double().cumsum(0)
        token = int(torch.searchsorted(cdf, uniform(seed, 0, 0) * cdf[-1], right=True))
        assert sample(logits.clone(), [one])[0].token_id == token


def test_logprobs_are_the_models_own() -> None:
    logits = logits_of(3)
    want = logits.log_softmax(dim=-1)[0]
    params: dict[str, Any] = {
        "temperature": 0.3,
        "top_p": 0.5,
        "repetition_penalty": 2.0,
        "seed": 4,
    }
    result = sample(logits.clone(), [sequence(logprobs=3, **params)])[0]
    assert result.token_id is not None
    assert result.logprob == pytest.approx(want[result.token_id].item())
    top = want.topk(3)
    assert [token for token, _ in result.top_logprobs] == top.indices.tolist()
    assert [value for _, value in result.top_logprobs] == pytest.approx(top.values.tolist())


def test_a_rows_token_does_not_depend_on_the_others() -> None:
    logits = logits_of(6, rows=6)
    rows = [
        sequence(temperature=1.0, seed=1),
        sequence(),
        sequence(temperature=0.7, top_p=0.3, seed=2),
        sequence(temperature=1.0, top_k=4, seed=3),
        sequence(temperature=2.0, top_p=0.05, seed=4, logprobs=1),
        sequence(repetition_penalty=3.0),
    ]
    together = [s.token_id for s in sample(logits.clone(), rows)]
    alone = [sample(logits[i : i + 1].clone(), [row])[0].token_id for i, row in enumerate(rows)]
    assert together == alone


def test_rows_that_are_not_finite_fail_alone() -> None:
    logits = logits_of(2, rows=3)
    logits[0, 7], logits[2, 7] = float("nan"), float("inf")
    rows = [sequence(temperature=1.0, logprobs=2), sequence(), sequence(temperature=1.0)]
    tokens = [s.token_id for s in sample(logits.clone(), rows)]
    assert tokens == [None, int(logits[1].argmax()), None]


def test_eos_cannot_be_drawn_before_min_new_tokens() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 2] = 50.0
    banned = sequence()
    banned.min_new_tokens = 1
    assert sample(logits.clone(), [sequence()])[0].token_id == 2
    assert sample(logits.clone(), [banned])[0].token_id != 2


def test_uniform_is_uniform_and_a_function_of_its_arguments() -> None:
    numbers = [uniform(seed, position, 0) for seed in range(60) for position in range(60)]
    assert len(set(numbers)) == len(numbers)
    assert 0 <= min(numbers) < max(numbers) < 1
    assert sum(numbers) / len(numbers) == pytest.approx(0.5, abs=0.02)
    neighbours = [(uniform(s, 0, 0), uniform(s + 1, 0, 0)) for s in range(3000)]
    assert torch.corrcoef(torch.tensor(neighbours).T)[0, 1].abs() < 0.06
    assert uniform(5, 6, 7) == uniform(5, 6, 7) != uniform(5, 7, 6)
