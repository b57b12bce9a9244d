"""Seeded requests as plain data: the same arguments give the same requests on every machine.

Each property (prompts, lengths, arrivals, adapters) has a random stream of its own, so that
changing one leaves the others as they were.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

__all__ = [
    "POPULARITIES",
    "Request",
    "arriving",
    "fixed_shape",
    "gamma_arrivals",
    "power_law",
    "punica_adapters",
    "s_lora",
    "synthetic_adapters",
    "uniform",
]

# Lower ids are the tokenizer's special tokens.
_FIRST_TOKEN = 20

POPULARITIES = ("distinct", "uniform", "skewed", "identical")
"""Punica's (arXiv:2310.18547, section 7)."""


@dataclass(frozen=True, slots=True)
class Request:
    """One request: token ids, how many to generate, for which adapter, and when.

    ``arrival`` is in seconds from the start of the run. Sampling is the same for all, but for the
    seed; ``greedy`` requests, which peers do not know, take the most probable tokens instead.
    """

    prompt: tuple[int, ...]
    new_tokens: int
    adapter: str | None = None
    arrival: float = 0.0
    seed: int = 0
    greedy: bool = False


def fixed_shape(
    count: int,
    prompt_tokens: int,
    new_tokens: int,
    *,
    vocab_size: int,
    seed: int,
    adapters: Sequence[str | None] = (None,),
) -> list[Request]:
    """``count`` requests of one shape, all at once; the adapters take turns."""
    prompts = _prompts([prompt_tokens] * count, vocab_size, seed)
    return [
        Request(prompt, new_tokens, adapters[i % len(adapters)], seed=i)
        for i, prompt in enumerate(prompts)
    ]


def s_lora(
    lengths: tuple[int, int],
    adapters: Sequence[str | None],
    *,
    vocab_size: int,
    seed: int,
) -> list[Request]:
    """S-LoRA's synthetic workload (arXiv:2311.03285, section 7.1): one request for each adapter
    named, prompt and output lengths uniform in ``lengths``, bounds included, all at once."""
    rng = _stream(seed, "lengths")
    least, most = lengths
    prompt_lengths, new_tokens = rng.integers(least, most + 1, size=(2, len(adapters))).tolist()
    prompts = _prompts(prompt_lengths, vocab_size, seed)
    rows = zip(prompts, new_tokens, adapters, strict=True)
    return [Request(*row, seed=i) for i, row in enumerate(rows)]


def arriving(requests: Sequence[Request], arrivals: Sequence[float]) -> list[Request]:
    """The same requests at other times."""
    return [replace(r, arrival=at) for r, at in zip(requests, arrivals, strict=True)]


def gamma_arrivals(count: int, rate: float, cv: float, *, seed: int) -> list[float]:
    """Times of arrival with Gamma intervals of mean ``1 / rate`` and coefficient of variation
    ``cv``: 1 is a Poisson process, 4 comes in bursts. The first request comes at 0."""
    shape = 1 / cv**2
    intervals = _stream(seed, "arrivals").gamma(shape, 1 / (rate * shape), size=count)
    intervals[0] = 0.0
    times: list[float] = np.cumsum(intervals).tolist()
    return times


def uniform(count: int) -> list[float]:
    """The shares of equally popular adapters."""
    return [1 / count] * count


def power_law(count: int, exponent: float = 1.0) -> list[float]:
    """Shares that fall with ``rank ** -exponent``."""
    weights = [rank**-exponent for rank in range(1, count + 1)]
    total = sum(weights)
    return [weight / total for weight in weights]


def synthetic_adapters(
    count: int, adapters: Sequence[str], shares: Sequence[float], *, seed: int
) -> list[str]:
    """An adapter for each of ``count`` requests, drawn by popularity."""
    draws = _stream(seed, "adapters").random(count)
    places = np.searchsorted(np.cumsum(shares), draws, side="right")
    # The shares' sum may be rounded to less than 1.
    return [adapters[min(int(place), len(adapters) - 1)] for place in places]


def punica_adapters(
    popularity: str, count: int, adapters: Sequence[str], batch: int, *, seed: int
) -> list[str]:
    """An adapter for each of ``count`` requests in one of Punica's ``POPULARITIES``.

    distinct: one for each request; uniform: ``sqrt(batch)`` of them, equally often; skewed: each
    has 1.5 times the requests of the next; identical: one for all.
    """
    if popularity == "distinct":
        if len(adapters) < count:
            raise ValueError(f"{count} requests need as many adapters, not {len(adapters)}")
        return list(adapters[:count])
    if popularity == "identical":
        return [adapters[0]] * count
    if popularity == "uniform":
        some = adapters[: math.ceil(math.sqrt(batch))]
        order = _stream(seed, "adapters").permutation(count).tolist()
        return [some[place % len(some)] for place in order]
    if popularity == "skewed":
        weights = [1.5**-rank for rank in range(len(adapters))]
        shares = [weight / sum(weights) for weight in weights]
        return synthetic_adapters(count, adapters, shares, seed=seed)
    raise ValueError(f"popularity must be one of {', '.join(POPULARITIES)}, found {popularity!r}")


def _prompts(lengths: Sequence[int], vocab_size: int, seed: int) -> list[tuple[int, ...]]:
    rng = _stream(seed, "prompts")
    return [tuple(rng.integers(_FIRST_TOKEN, vocab_size, size=n).tolist()) for n in lengths]


def _stream(seed: int, what: str) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(what.encode())])
