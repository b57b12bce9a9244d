"""Jobs by the thousand: power-law adapters, Poisson arrivals, lengths in a range. Seeded."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.cluster_simulation.replica import Job
from benchmarks.workloads import power_law

__all__ = ["jobs", "shares"]


def shares(adapters: int, exponent: float) -> np.ndarray[Any, Any]:
    """Each adapter's share of the requests, by its number."""
    found = np.empty(adapters)
    found[_by_rank(adapters)] = power_law(adapters, exponent)
    return found


def jobs(
    count: int,
    rate: float,
    adapters: int,
    *,
    exponent: float,
    prompt_tokens: tuple[int, int],
    new_tokens: tuple[int, int],
    seed: int,
) -> list[Job]:
    """``count`` jobs by arrival.

    Args:
        count: how many.
        rate: a second.
        adapters: numbered from 0, in no order of popularity.
        exponent: popularity falls with ``rank ** -exponent``.
        prompt_tokens, new_tokens: least and most, all equally often.
        seed: of everything.
    """
    rng = np.random.default_rng(seed)
    arrivals = np.cumsum(rng.exponential(1 / rate, count)).tolist()
    number_of = _by_rank(adapters)
    ranks = np.searchsorted(np.cumsum(power_law(adapters, exponent)), rng.random(count), "right")
    chosen = number_of[np.minimum(ranks, adapters - 1)].tolist()
    prompts = rng.integers(prompt_tokens[0], prompt_tokens[1] + 1, count).tolist()
    answers = rng.integers(new_tokens[0], new_tokens[1] + 1, count).tolist()
    rows = zip(arrivals, chosen, prompts, answers, strict=True)
    return [Job(number, *row) for number, row in enumerate(rows)]


def _by_rank(adapters: int) -> np.ndarray[Any, Any]:
    """The most popular adapter's number, then the next one's. Which are popular depends on nothing
    else, so that another seed asks for the same ones."""
    return np.random.default_rng(adapters).permutation(adapters)
