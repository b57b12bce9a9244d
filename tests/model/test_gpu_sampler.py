"""Sampling as it is launched on a GPU, against the sampler that the CPU has."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lorax_serve.core import SamplingParams, Sequence
from lorax_serve.gpu.reference.sampling import draw
from lorax_serve.model.sampling.gpu_sampler import sample_on_device
from lorax_serve.model.sampling.sampler import Sample, kept_by_filters, sample

VOCAB = 300
EOS = frozenset({2, 5})


def logits_of(seed: int, rows: int) -> torch.Tensor:
    return 2 * torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed))


def sequence(generated: int = 0, min_new_tokens: int = 0, **params: Any) -> Sequence:
    tokens = [1, 7, 7, 299, *range(20, 20 + generated)]
    return Sequence(0, tokens, 4, None, SamplingParams(**params), 99, min_new_tokens, EOS)


def same(got: list[Sample], want: list[Sample]) -> None:
    for mine, theirs in zip(got, want, strict=True):
        assert mine.token_id == theirs.token_id
        assert mine.logprob == pytest.approx(theirs.logprob)
        assert [token for token, _ in mine.top_logprobs] == [t for t, _ in theirs.top_logprobs]
        mine_values = [value for _, value in mine.top_logprobs]
        assert mine_values == pytest.approx([value for _, value in theirs.top_logprobs])


def check(logits: torch.Tensor, sequences: list[Sequence]) -> list[Sample]:
    want = sample(logits.clone(), sequences)
    launched = sample_on_device(logits.clone(), sequences, draw)
    assert launched.tokens.dtype == torch.int32
    same(launched.samples(), want)
    return want


def test_rows_that_want_different_things() -> None:
    rows = [
        sequence(),
        sequence(generated=3, repetition_penalty=1.7),
        sequence(repetition_penalty=0.2, logprobs=3),
        sequence(min_new_tokens=1, logprobs=0),
        sequence(generated=4, temperature=1.0, seed=2**64 - 1, logprobs=5),
        sequence(temperature=0.6, top_p=0.4, seed=2**63, repetition_penalty=30.0),
        sequence(generated=1, min_new_tokens=2, temperature=2.0, seed=9),
        sequence(generated=2, min_new_tokens=2, temperature=2.0, seed=9),
        sequence(temperature=1.0, top_k=VOCAB + 5, seed=1),
        sequence(temperature=1.0, top_k=1, seed=1),
    ]
    for seed in range(20):
        check(logits_of(seed, len(rows)), rows)


@pytest.mark.parametrize("logprobs", [None, 2])
def test_draws_are_the_samplers(logprobs: int | None) -> None:
    rows = [
        sequence(
            generated=i % 7, temperature=0.4 + 0.1 * (i % 9), top_p=1 - 0.09 * (i % 11), seed=i
        )
        for i in range(200)
    ]
    for row in rows:
        assert row.sampling.logprobs is None
    logged = [
        sequence(
            generated=row.generated,
            temperature=row.sampling.temperature,
            top_p=row.sampling.top_p,
            seed=row.sampling.seed,
            logprobs=logprobs,
        )
        for row in rows
    ]
    check(logits_of(1, len(rows)), logged)


def test_top_k_draws_what_it_keeps() -> None:
    rows = [sequence(temperature=1.0, top_k=5, top_p=0.8, seed=i) for i in range(100)]
    logits = logits_of(3, 1).expand(100, -1).contiguous()
    kept = kept_by_filters(logits[0].softmax(dim=-1), 5, 0.8)
    drawn = {s.token_id for s in sample_on_device(logits, rows, draw).samples()}
    assert drawn == set(kept.nonzero()[:, 0].tolist())


def test_an_end_that_is_banned_is_not_chosen() -> None:
    logits = torch.zeros(2, VOCAB)
    logits[:, 2] = 50.0
    got = check(logits, [sequence(min_new_tokens=1), sequence()])
    assert [s.token_id for s in got] == [0, 2]


def test_rows_that_are_not_finite_fail_alone() -> None:
    logits = logits_of(2, 4)
    logits[0, 7], logits[2, 7], logits[3, 8] = torch.nan, torch.inf, torch.nan
    rows = [
        sequence(temperature=1.0, logprobs=2),
        sequence(logprobs=1),
        sequence(repetition_penalty=2.0),
        sequence(temperature=1.0, top_k=3),
    ]
    got = check(logits, rows)
    assert [s.token_id is None for s in got] == [True, False, True, True]


def test_logits_change_in_place_alone() -> None:
    logits = logits_of(5, 2)
    before = logits.clone()
    sample_on_device(logits, [sequence(), sequence(repetition_penalty=2.0)], draw)
    assert torch.equal(logits[0], before[0])
    assert (logits[1] != before[1]).nonzero()[:, 0].tolist() == [1, 7, 299]
