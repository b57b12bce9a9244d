"""Drawing tokens, by the way of ``model.sampler.draw``: rejection, with no sort."""

from __future__ import annotations

import torch

__all__ = ["draw", "uniform"]


def draw(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    seeds: torch.Tensor,
    draws: torch.Tensor,
) -> torch.Tensor:
    """See ``ops.Draw``."""
    best = logits.amax(dim=-1)  # NaN where a logit is
    tokens = logits.argmax(dim=-1)
    finite = torch.isfinite(best)
    tokens[~finite] = -1
    rows = (finite & (temperature > 0)).nonzero()[:, 0]
    weights = ((logits[rows] - best[rows, None]) / temperature[rows, None]).exp()
    for at, (row, k) in enumerate(zip(rows.tolist(), top_k[rows].tolist(), strict=True)):
        if 0 < k < logits.shape[-1]:
            weights[at][logits[row] < logits[row].topk(k).values[-1]] = 0
    total = weights.sum(dim=-1, dtype=torch.float64)
    attempt = 0
    while len(rows):
        cdf = weights.cumsum(dim=-1, dtype=torch.float64)
        target = uniform(seeds[rows], draws[rows], attempt) * cdf[:, -1]
        chosen = torch.searchsorted(cdf, target[:, None], right=True)
        tokens[rows] = chosen[:, 0]
        # Those that are no more probable are ruled out, should this one be too.
        values = logits[rows]
        weights = torch.where(values > values.gather(1, chosen), weights, 0)
        above = weights.sum(dim=-1, dtype=torch.float64)
        again = (above > 0) & (above >= top_p[rows].double() * total)
        rows, weights, total = rows[again], weights[again], total[again]
        attempt += 1
    return tokens.to(torch.int32)


def uniform(seeds: torch.Tensor, positions: torch.Tensor, attempt: int) -> torch.Tensor:
    """``model.sampler.uniform``, bit for bit, of int64 seeds and int32 positions; float64."""
    z = seeds
    for word in (positions.long(), torch.full_like(seeds, attempt)):
        z = z + _signed(0x9E3779B97F4A7C15) * (word + 1)
        z = (z ^ _shifted(z, 30)) * _signed(0xBF58476D1CE4E5B9)
        z = (z ^ _shifted(z, 27)) * _signed(0x94D049BB133111EB)
        z = z ^ _shifted(z, 31)
    return _shifted(z, 11).double() * 2.0**-53


def _signed(bits: int) -> int:
    return bits - (1 << 64)


def _shifted(z: torch.Tensor, places: int) -> torch.Tensor:
    """To the right, zeros coming in from the left, where torch copies the sign."""
    return (z >> places) & ((1 << (64 - places)) - 1)
