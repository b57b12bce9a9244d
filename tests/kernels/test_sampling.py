"""The compiled sampler against the torch one: the same numbers give the same tokens."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from lorax_serve.kernels.cpu import load
from lorax_serve.model.sampling.sampler import draw, kept_by_filters, uniform
from tests.helpers import each_instruction_set

pytestmark = each_instruction_set


@pytest.mark.parametrize("vocab", [16, 60, 512, 1000, 49152])
@pytest.mark.parametrize("spread", [0.01, 1.0, 6.0], ids=["flat", "usual", "peaked"])
def test_draws_what_the_torch_sampler_draws(
    vocab: int, spread: float, instruction_set: str
) -> None:
    rows = 64
    generator = torch.Generator().manual_seed(vocab)
    logits = spread * torch.randn(rows, vocab, generator=generator)
    temperature = [0.5 + 0.02 * row for row in range(rows)]
    top_p = [1.0 if row % 5 == 0 else 0.02 + 0.98 * row / rows for row in range(rows)]
    seeds = [(1 << 63) + 977 * row for row in range(rows)]
    positions = [3 * row for row in range(rows)]
    order = list(reversed(range(rows)))

    def pick(values: list[float]) -> list[float]:
        return [values[row] for row in order]

    got = load(torch.float32, instruction_set).draw(
        logits,
        order,
        pick(temperature),
        pick(top_p),
        [seeds[row] for row in order],
        [positions[row] for row in order],
    )
    probs = (logits / torch.tensor(temperature)[:, None]).softmax(dim=-1)
    want = draw(
        probs,
        [0] * rows,
        top_p,
        lambda which, attempt: [uniform(seeds[i], positions[i], attempt) for i in which],
    )
    # Where a draw falls on the border of two tokens, the rounding of the sums decides.
    same = sum(a == want[row] for a, row in zip(got, order, strict=True))
    assert same >= rows - 2
    for token, row in zip(got, order, strict=True):
        kept = kept_by_filters(probs[row], 0, min(1.0, top_p[row] * (1 + 1e-5)))
        assert kept[token] or top_p[row] == 1


def test_a_banned_token_is_never_drawn(instruction_set: str) -> None:
    logits = torch.zeros(1, 100)
    logits[0, 10:] = -torch.inf
    seen = Counter(
        load(torch.float32, instruction_set).draw(logits, [0], [1.0], [1.0], [seed], [0])[0]
        for seed in range(400)
    )
    assert set(seen) == set(range(10))


def test_most_probable_is_the_first_largest_and_finds_what_is_not_finite(
    instruction_set: str,
) -> None:
    logits = torch.randn(6, 1003, generator=torch.Generator().manual_seed(1))
    logits[1, 1002] = 50.0
    logits[2, [7, 900]] = 60.0
    logits[3, 1002] = torch.nan
    logits[4, 5] = torch.inf
    logits[5, 17] = -torch.inf
    got = load(torch.float32, instruction_set).most_probable(logits)
    assert got[:3] == logits[:3].argmax(dim=-1).tolist()
    assert got[2] == 7
    assert got[3:] == [-1, -1, -1]
