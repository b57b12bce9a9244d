"""draw: the kernels, the reference and the CPU's sampler choose the same tokens."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from lorax_serve.core import SamplingParams, Sequence
from lorax_serve.gpu.kernels import sampling as kernels
from lorax_serve.gpu.reference import sampling as plain
from lorax_serve.model.sampling import sampler
from tests.gpu.poison import poisoned


@dataclass
class Rows:
    """Arguments of draw, on the CPU."""

    logits: torch.Tensor
    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    seeds: torch.Tensor
    draws: torch.Tensor

    def of(self, which: Any) -> Rows:
        return Rows(**{name: tensor[which] for name, tensor in vars(self).items()})

    def on(self, device: torch.device) -> tuple[torch.Tensor, ...]:
        return tuple(tensor.to(device) for tensor in vars(self).values())


def rows_of(
    logits: torch.Tensor,
    temperature: list[float],
    top_p: list[float],
    top_k: list[int],
) -> Rows:
    """Each list is repeated over the rows; seeds and draws differ by row, and cover their range."""
    number = len(logits)

    def cycle(values: list[Any], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor([values[i % len(values)] for i in range(number)], dtype=dtype)

    seeds = [(0x9E3779B97F4A7C15 * i) % 2**64 for i in range(number)]
    return Rows(
        logits,
        cycle(temperature, torch.float32),
        cycle(top_k, torch.int32),
        cycle(top_p, torch.float32),
        torch.tensor([s - 2**64 if s >= 2**63 else s for s in seeds]),
        torch.tensor([3 * i for i in range(number)], dtype=torch.int32),
    )


def random_logits(rows: int, vocab: int, spread: float = 2.0) -> torch.Tensor:
    return spread * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(vocab))


def by_kernels(rows: Rows, device: torch.device) -> list[int]:
    with poisoned():
        got = kernels.draw(*rows.on(device))
    assert got.dtype == torch.int32
    return got.tolist()


def by_reference(rows: Rows, device: torch.device) -> list[int]:
    got = plain.draw(*rows.on(device))
    assert got.dtype == torch.int32
    return got.tolist()


def agree(got: list[int], want: list[int | None], but: int) -> bool:
    """Where a draw falls on the border of two tokens, the rounding of the sums decides."""
    return sum(a != b for a, b in zip(got, want, strict=True)) <= but


BOTH = pytest.mark.parametrize("draw", [by_kernels, by_reference], ids=["kernels", "reference"])


def by_sampler(rows: Rows) -> list[int | None]:
    """``model.sampler.sample``, of rows without top-k."""
    sequences = []
    for i in range(len(rows.logits)):
        params = SamplingParams(
            temperature=rows.temperature[i].item(),
            top_p=rows.top_p[i].item(),
            seed=int(rows.seeds[i]) % 2**64,
        )
        tokens = [1] * (1 + int(rows.draws[i]))
        sequences.append(Sequence(0, tokens, 1, None, params, 999, 0, frozenset()))
    return [s.token_id for s in sampler.sample(rows.logits.clone(), sequences)]


@triton.jit  # type: ignore[untyped-decorator]
def _uniform(seeds, positions, attempts, result, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    lane = tl.arange(0, BLOCK)
    u = kernels.uniform(tl.load(seeds + lane), tl.load(positions + lane), tl.load(attempts + lane))
    tl.store(result + lane, u)


def test_uniform_is_the_samplers_bit_for_bit(device: torch.device) -> None:
    seeds = [0, 1, 2**63 - 1, 2**63, 2**64 - 1, 12345678901234567890, 7, 7]
    positions = [0, 1, 2, 131071, 2**31 - 1, 5, 0, 1]
    attempts = [0, 0, 1, 2, 3, 40, 1, 0]
    want = [sampler.uniform(*each) for each in zip(seeds, positions, attempts, strict=True)]
    signed = torch.tensor([s - 2**64 if s >= 2**63 else s for s in seeds], device=device)
    words = torch.tensor([positions, attempts], dtype=torch.int32, device=device)
    got = torch.empty(len(seeds), dtype=torch.float64, device=device)
    _uniform[(1,)](signed, words[0], words[1], got, BLOCK=len(seeds))
    assert got.tolist() == want
    for i, attempt in enumerate(attempts):
        one = plain.uniform(signed[i : i + 1], words[0][i : i + 1], attempt)
        assert one.tolist() == want[i : i + 1]


@BOTH
@pytest.mark.parametrize(
    ("vocab", "number", "spread"),
    [(1, 3, 1.0), (60, 60, 2.0), (4096, 50, 0.01), (5000, 100, 6.0), (49152, 20, 2.0)],
)
def test_same_tokens_as_the_cpus_sampler(
    draw: Any, vocab: int, number: int, spread: float, device: torch.device
) -> None:
    rows = rows_of(
        random_logits(number, vocab, spread),
        temperature=[0.0, 0.3, 1.0, 2.0, 1.0],
        top_p=[1.0, 0.9, 0.5, 0.05, 1e-6, 0.95, 0.999],
        top_k=[0],
    )
    before = rows.logits.clone()
    assert agree(draw(rows, device), by_sampler(rows), but=number // 50)
    assert torch.equal(rows.logits, before)


@BOTH
def test_a_large_vocabulary(draw: Any, device: torch.device) -> None:
    rows = rows_of(random_logits(6, 200_000), [0.0, 1.0, 0.7], [0.9, 0.1, 1.0, 0.5], [0])
    assert agree(draw(rows, device), by_sampler(rows), but=1)


@BOTH
def test_top_k_is_the_sampler_of_what_it_keeps(draw: Any, device: torch.device) -> None:
    vocab, number = 9001, 24
    logits = random_logits(number, vocab)
    logits[3] = logits[3].round()  # ties, more than fit in registers
    logits[4] = logits[4].abs()
    logits[5] = -logits[5].abs()
    logits[6, 100:] = -1e4
    rows = rows_of(logits, [1.0, 0.5], [1.0, 0.9, 0.3], [1, 5, 50, 0, 4999, vocab, vocab - 1])
    kept = rows.of(slice(None))
    kept.logits = logits.clone()
    for row, k in zip(kept.logits, rows.top_k.tolist(), strict=True):
        if 0 < k < vocab:
            row[row < row.sort(descending=True).values[k - 1]] = -1e4  # no weight, yet finite
    assert agree(draw(rows, device), by_sampler(kept), but=1)


@BOTH
def test_top_k_keeps_ties_and_zeros_of_both_signs(draw: Any, device: torch.device) -> None:
    logits = torch.full((100, 5000), -3.0)
    logits[:, [10, 4999]] = 0.0
    logits[:, [20, 300]] = -0.0
    number = 100 if draw is by_reference else 40
    rows = rows_of(logits[:number], [1.0], [1.0], [2])
    assert set(draw(rows, device)) == {10, 20, 300, 4999}


@BOTH
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (0, 0.7), (6, 0.8)])
def test_draws_follow_the_filtered_distribution(
    draw: Any, top_k: int, top_p: float, device: torch.device
) -> None:
    number = 60 if draw is by_kernels else 2000
    logits = random_logits(1, 20).expand(number, -1).contiguous()
    counts = Counter(draw(rows_of(logits, [1.5], [top_p], [top_k]), device))
    probs = (logits[0] / 1.5).softmax(dim=-1)
    kept = sampler.kept_by_filters(probs, top_k, top_p)
    assert all(kept[token] for token in counts)
    expected = torch.where(kept, probs, 0) / probs[kept].sum()
    seen = torch.tensor([counts[token] / number for token in range(20)])
    # Five standard deviations of a count, for each of the tokens.
    limit = 5 * (expected * (1 - expected) / number).sqrt() + 1e-9
    assert bool(((seen - expected).abs() <= limit).all())


@BOTH
def test_rows_that_are_not_finite_and_rows_beside_them(draw: Any, device: torch.device) -> None:
    logits = random_logits(8, 5000)
    logits[0, 4999] = torch.nan
    logits[1, 17] = torch.inf
    logits[2] = -torch.inf
    logits[3, 0] = torch.nan
    logits[3, 4500] = torch.inf
    logits[4, 1:] = -torch.inf
    logits[5, :4800] = -torch.inf
    logits[6] = 1e4
    logits[7] = torch.where(torch.arange(5000) == 4242, 1e4, -1e4)
    for temperature in (0.0, 1.0):
        for top_k in (0, 3):
            got = draw(rows_of(logits, [temperature], [0.9], [top_k]), device)
            assert got[:5] == [-1, -1, -1, -1, 0]
            assert got[5] >= 4800
            assert 0 <= got[6] < 5000
            assert got[7] == 4242
            if temperature == 0:
                assert got[5:] == logits[5:].argmax(dim=-1).tolist()
                assert got[6] == 0


@BOTH
def test_greedy_takes_the_first_of_ties(draw: Any, device: torch.device) -> None:
    logits = torch.zeros(3, 9000)
    logits[0, [8999, 4096, 4095]] = 1.0
    logits[1, [8191, 8192]] = -0.0
    logits[2, :] = -5.0
    assert draw(rows_of(logits, [0.0], [1.0], [0]), device) == [4095, 0, 0]


@BOTH
def test_a_tiny_top_p_leaves_the_most_probable(draw: Any, device: torch.device) -> None:
    rows = rows_of(random_logits(8, 6000, 0.1), [1.0, 100.0, 1e-3], [1e-6, 1e-30, 1e-45], [0, 0, 7])
    assert draw(rows, device) == rows.logits.argmax(dim=-1).tolist()


@BOTH
def test_a_banned_token_is_never_drawn(draw: Any, device: torch.device) -> None:
    logits = torch.zeros(60, 5000)
    logits[:, 3:4998] = -torch.inf
    assert set(draw(rows_of(logits, [1.0, 30.0], [1.0, 0.99], [0]), device)) == {
        0,
        1,
        2,
        4998,
        4999,
    }


@BOTH
def test_a_rows_token_does_not_depend_on_the_others(draw: Any, device: torch.device) -> None:
    rows = rows_of(random_logits(7, 5000), [1.0, 0.0, 0.6], [0.3, 1.0], [0, 0, 9, 0])
    together = draw(rows, device)
    alone = [draw(rows.of(slice(i, i + 1)), device)[0] for i in range(7)]
    assert alone == together
    rows.logits[[0, 2, 4, 6]] = torch.nan
    assert draw(rows, device) == [-1, together[1], -1, together[3], -1, together[5], -1]


@BOTH
def test_no_rows(draw: Any, device: torch.device) -> None:
    assert draw(rows_of(random_logits(1, 50), [1.0], [1.0], [0]).of(slice(0, 0)), device) == []


@BOTH
def test_rows_of_a_wider_tensor(draw: Any, device: torch.device) -> None:
    rows = rows_of(random_logits(3, 900), [1.0], [0.9], [0])
    want = draw(rows, device)
    padded = torch.full((3, 1000), torch.nan)
    padded[:, :900] = rows.logits
    arguments = list(rows.on(device))
    arguments[0] = padded.to(device)[:, :900]
    module = kernels if draw is by_kernels else plain
    assert module.draw(*arguments).tolist() == want
