"""Prompt tokens beside decodes: learned from step times of a machine whose costs are known."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorax_serve.engine.prefill_budget import PrefillBudget


def seconds(decodes: int, prompt_tokens: int, per_token: float) -> float:
    return (0.010 + 0.001 * decodes if decodes else 0.0) + per_token * prompt_tokens


@given(per_token=st.sampled_from([1e-5, 1e-4, 1e-3]), slowdown=st.sampled_from([1.5, 2.0, 3.0]))
def test_steps_stay_within_the_slowdown(per_token: float, slowdown: float) -> None:
    budget = PrefillBudget(slowdown)
    budget.observe(0, 256, seconds(0, 256, per_token))
    for decodes in (1, 8, 32):
        alone = seconds(decodes, 0, per_token)
        for _ in range(3):
            budget.observe(decodes, 0, alone)
        tokens = budget.tokens(decodes)
        budget.observe(decodes, tokens, seconds(decodes, tokens, per_token))
        # At least 8 tokens, or prompts might never end.
        assert tokens == 8 or seconds(decodes, tokens, per_token) <= slowdown * alone * 1.001
        assert seconds(decodes, tokens + 2, per_token) > slowdown * alone


def test_before_anything_is_known_it_is_a_guess() -> None:
    budget = PrefillBudget(2.0)
    assert budget.tokens(4) == 64
    budget.observe(4, 64, 1.0)  # nothing can be said of a mixed step alone
    assert budget.tokens(4) == 64


def test_an_unknown_number_of_sequences_is_like_the_nearest_known() -> None:
    budget = PrefillBudget(2.0)
    budget.observe(0, 100, 0.1)
    budget.observe(2, 0, 0.02)
    budget.observe(30, 0, 0.06)
    assert budget.tokens(5) == 20
    assert budget.tokens(20) == 60


def test_a_prompt_that_gets_dearer_gets_fewer_tokens() -> None:
    budget = PrefillBudget(2.0)
    budget.observe(8, 0, 0.02)
    budget.observe(0, 100, 0.1)
    before = budget.tokens(8)
    for _ in range(20):
        budget.observe(8, 20, 0.02 + 20 * 0.002)
    assert budget.tokens(8) == pytest.approx(before / 2, abs=1)
