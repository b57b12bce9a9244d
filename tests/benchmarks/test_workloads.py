from __future__ import annotations

import statistics
from collections import Counter
from itertools import pairwise

import pytest

from benchmarks.workloads import (
    POPULARITIES,
    arriving,
    fixed_shape,
    gamma_arrivals,
    power_law,
    punica_adapters,
    s_lora,
    synthetic_adapters,
    uniform,
)

NAMES = [f"a{i}" for i in range(64)]


def test_the_same_seed_gives_the_same_requests_and_another_seed_others() -> None:
    first, again, other = (fixed_shape(4, 8, 3, vocab_size=500, seed=s) for s in (1, 1, 2))
    assert first == again
    assert {r.prompt for r in first}.isdisjoint(r.prompt for r in other)


def test_a_fixed_shape_has_that_shape_and_takes_turns_with_its_adapters() -> None:
    requests = fixed_shape(5, 8, 3, vocab_size=500, seed=0, adapters=["x", None])
    assert {(len(r.prompt), r.new_tokens, r.arrival) for r in requests} == {(8, 3, 0.0)}
    assert [r.adapter for r in requests] == ["x", None, "x", None, "x"]
    assert all(20 <= token < 500 for r in requests for token in r.prompt)
    assert len({r.prompt for r in requests}) == 5


def test_s_lora_lengths_are_uniform_and_do_not_depend_on_the_adapters() -> None:
    few = s_lora((8, 40), ["x"] * 400, vocab_size=500, seed=3)
    many = s_lora((8, 40), [f"a{i}" for i in range(400)], vocab_size=500, seed=3)
    assert [(r.prompt, r.new_tokens) for r in few] == [(r.prompt, r.new_tokens) for r in many]
    for lengths in ([len(r.prompt) for r in few], [r.new_tokens for r in few]):
        assert (min(lengths), max(lengths)) == (8, 40)
        assert statistics.mean(lengths) == pytest.approx(24, abs=1.5)


@pytest.mark.parametrize("cv", [1.0, 4.0])
def test_gamma_arrivals_have_their_rate_and_coefficient_of_variation(cv: float) -> None:
    times = gamma_arrivals(40_000, 5.0, cv, seed=0)
    gaps = [b - a for a, b in pairwise(times)]
    assert times[0] == 0.0
    assert min(gaps) >= 0
    assert statistics.mean(gaps) == pytest.approx(1 / 5, rel=0.1)
    assert statistics.stdev(gaps) / statistics.mean(gaps) == pytest.approx(cv, rel=0.1)


def test_arriving_changes_only_the_times() -> None:
    requests = fixed_shape(3, 4, 2, vocab_size=500, seed=0)
    later = arriving(requests, [0.0, 0.5, 2.0])
    assert [r.arrival for r in later] == [0.0, 0.5, 2.0]
    assert [r.prompt for r in later] == [r.prompt for r in requests]


def test_shares_sum_to_one_and_the_power_law_falls_with_the_rank() -> None:
    shares = power_law(100)
    assert sum(shares) == pytest.approx(1)
    assert sum(uniform(7)) == pytest.approx(1)
    assert shares[0] / shares[9] == pytest.approx(10)
    assert power_law(100, 2.0)[0] / power_law(100, 2.0)[9] == pytest.approx(100)


def test_synthetic_adapters_follow_their_shares() -> None:
    names = NAMES[:4]
    counts = Counter(synthetic_adapters(20_000, names, power_law(4), seed=0))
    for name, share in zip(names, power_law(4), strict=True):
        assert counts[name] / 20_000 == pytest.approx(share, rel=0.1)


def test_punica_popularities() -> None:
    def drawn(popularity: str) -> Counter[str]:
        return Counter(punica_adapters(popularity, 64, NAMES, 16, seed=0))

    assert set(drawn("distinct").values()) == {1}
    assert sorted(drawn("uniform").values()) == [16, 16, 16, 16]
    assert drawn("identical") == {NAMES[0]: 64}
    skewed = Counter(punica_adapters("skewed", 20_000, NAMES, 16, seed=0))
    assert skewed[NAMES[0]] / skewed[NAMES[1]] == pytest.approx(1.5, rel=0.1)
    assert skewed[NAMES[1]] / skewed[NAMES[2]] == pytest.approx(1.5, rel=0.1)


def test_punica_refuses_what_it_cannot_draw() -> None:
    with pytest.raises(ValueError, match="65 requests need as many adapters"):
        punica_adapters("distinct", 65, NAMES, 16, seed=0)
    with pytest.raises(ValueError, match="must be one of distinct"):
        punica_adapters("zipf", 4, NAMES, 16, seed=0)
    assert set(POPULARITIES) == {"distinct", "uniform", "skewed", "identical"}
