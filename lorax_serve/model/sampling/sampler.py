"""From logits to tokens: penalty, temperature, top-k, top-p, draw, log-probabilities.

Each request's draws depend on nothing but its seed and its own position, so they are the same
alone and in any batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from lorax_serve import core
from lorax_serve.kernels.cpu import Kernels

__all__ = ["Sample", "draw", "kept_by_filters", "sample", "uniform"]

_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Sample:
    """A row's result; ``token_id`` is None if its logits were not finite."""

    token_id: int | None
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


def uniform(seed: int, position: int, attempt: int) -> float:
    """A number in [0, 1) that is a pure function of its arguments (SplitMix64, OOPSLA 2014)."""
    z = seed
    for word in (position, attempt):
        z = (z + 0x9E3779B97F4A7C15 * (word + 1)) & _MASK
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
        z ^= z >> 31
    return (z >> 11) * 2.0**-53


def sample(
    logits: torch.Tensor, sequences: Sequence[core.Sequence], kernels: Kernels | None = None
) -> list[Sample]:
    """Choose the next token of each sequence.

    Args:
        logits: float32 ``[len(sequences), vocab]``, contiguous; changed in place.
        sequences: whose next token each row is.
        kernels: compiled ones that do the same for rows on the CPU; None is plain torch.
    """
    if kernels is not None:
        best = kernels.most_probable(logits)
        finite = [token >= 0 for token in best]
    else:
        # A sum is finite only if all its terms are: one pass over the logits finds every NaN.
        finite = torch.isfinite(logits.sum(dim=-1)).tolist()
    with_logprobs = [
        row for row, s in enumerate(sequences) if finite[row] and s.sampling.logprobs is not None
    ]
    logprobs = logits[with_logprobs].log_softmax(dim=-1) if with_logprobs else logits[:0]
    changed = [_penalise(logits, row, sequence) for row, sequence in enumerate(sequences)]
    drawn = [row for row, s in enumerate(sequences) if finite[row] and not s.sampling.greedy]
    if kernels is None or any(changed):
        best = logits.argmax(dim=-1).tolist()
    tokens = best
    if drawn:
        for row, token in zip(drawn, _draw_rows(logits, drawn, sequences, kernels), strict=True):
            tokens[row] = token
    samples = [Sample(token if ok else None) for token, ok in zip(tokens, finite, strict=True)]
    for row, values in zip(with_logprobs, logprobs, strict=True):
        samples[row] = _with_logprobs(tokens[row], values, sequences[row].sampling.logprobs or 0)
    return samples


def _penalise(logits: torch.Tensor, index: int, sequence: core.Sequence) -> bool:
    """Repetition penalty (arXiv:1909.05858) and the ban on EOS on one row; whether it changed."""
    penalty = sequence.sampling.repetition_penalty
    banned = sequence.generated < sequence.min_new_tokens and bool(sequence.eos_token_ids)
    if penalty != 1:
        row = logits[index]
        seen = torch.tensor(sorted(set(sequence.tokens)), device=row.device)
        values = row[seen]
        row[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if banned:
        logits[index][list(sequence.eos_token_ids)] = -torch.inf
    return banned or penalty != 1


def _draw_rows(
    logits: torch.Tensor,
    rows: list[int],
    sequences: Sequence[core.Sequence],
    kernels: Kernels | None,
) -> list[int]:
    """Draw a token for each of ``rows``: each row's by the same way whatever the others want, since
    the ways round differently."""
    if kernels is None:
        return _draw_by_torch(logits, rows, sequences)
    plain = [row for row in rows if sequences[row].sampling.top_k == 0]
    cut = [row for row in rows if sequences[row].sampling.top_k]
    found: dict[int, int] = {}
    if plain:
        chosen = [sequences[row] for row in plain]
        drawn = kernels.draw(
            logits,
            plain,
            [s.sampling.temperature for s in chosen],
            [s.sampling.top_p for s in chosen],
            [s.sampling.seed for s in chosen],
            [s.generated for s in chosen],
        )
        found |= zip(plain, drawn, strict=True)
    if cut:
        found |= zip(cut, _draw_by_torch(logits, cut, sequences), strict=True)
    return [found[row] for row in rows]


def _draw_by_torch(
    logits: torch.Tensor, rows: list[int], sequences: Sequence[core.Sequence]
) -> list[int]:
    chosen = [sequences[row] for row in rows]
    params = [s.sampling for s in chosen]
    temperature = torch.tensor([p.temperature for p in params], device=logits.device)
    scaled = logits if len(rows) == len(logits) else logits[rows]
    probs = (scaled / temperature[:, None]).softmax(dim=-1)

    def uniforms(which: Sequence[int], attempt: int) -> list[float]:
        return [uniform(params[i].seed, chosen[i].generated, attempt) for i in which]

    return draw(probs, [p.top_k for p in params], [p.top_p for p in params], uniforms)


def draw(
    probs: torch.Tensor,
    top_k: Sequence[int],
    top_p: Sequence[float],
    uniforms: Callable[[Sequence[int], int], list[float]],
) -> list[int]:
    """Draw a token of each row from its distribution cut by top-k, then by top-p.

    Args:
        probs: float32 ``[rows, vocab]``, each row summing to 1.
        top_k: 0 keeps all.
        top_p: 1 keeps all.
        uniforms: random numbers of these rows for this attempt.

    Rows with a top-k are cut by ``torch.topk``. The others need no sort: a token is in the nucleus
    exactly if the tokens more probable than it have less mass than top_p. One that is not rules
    out all that are no more probable, and the next attempt draws from the rest.
    """
    vocab = probs.shape[-1]
    result = [0] * len(probs)
    cut = [row for row, k in enumerate(top_k) if 0 < k < vocab]
    for row in cut:
        result[row] = _draw_sorted(probs[row], top_k[row], top_p[row], uniforms([row], 0)[0])
    pending = [row for row, k in enumerate(top_k) if not 0 < k < vocab]
    if not pending:
        return result
    left = probs if not cut else probs[pending]
    total = left.sum(dim=-1, dtype=torch.float64)
    attempt = 0
    while True:
        cdf = left.cumsum(dim=-1, dtype=torch.float64)
        u = torch.tensor(uniforms(pending, attempt), dtype=torch.float64, device=probs.device)
        tokens = torch.searchsorted(cdf, (u * cdf[:, -1])[:, None], right=True)
        tokens.clamp_(max=vocab - 1)
        left = torch.where(left > left.gather(1, tokens), left, 0)
        above = (left.sum(dim=-1, dtype=torch.float64) / total).tolist()
        kept = [top_p[row] >= 1 or a < top_p[row] for row, a in zip(pending, above, strict=True)]
        for row, token, ok in zip(pending, tokens[:, 0].tolist(), kept, strict=True):
            if ok:
                result[row] = token
        again = [i for i, ok in enumerate(kept) if not ok]
        if not again:
            return result
        left, total = left[again], total[again]
        pending = [pending[i] for i in again]
        attempt += 1


def _draw_sorted(probs: torch.Tensor, top_k: int, top_p: float, u: float) -> int:
    """Draw from one row ``[vocab]``, its ``top_k`` most probable tokens in order."""
    values, tokens = probs.topk(top_k)
    mass = values.cumsum(dim=-1, dtype=torch.float64)
    keep = 1 + int((mass[:-1] < top_p * mass[-1]).sum())
    at = torch.searchsorted(mass[:keep], u * mass[keep - 1], right=True)
    return int(tokens[min(int(at), keep - 1)])


def kept_by_filters(probs: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """The reference: which tokens of one row ``[vocab]`` may be drawn, bool ``[vocab]``.

    By a full sort, as transformers' ``TopKLogitsWarper`` and ``TopPLogitsWarper`` do it.
    """
    values, order = probs.double().sort(descending=True)
    if 0 < top_k < len(values):
        values[top_k:] = 0
    values /= values.sum()
    keep = (values.cumsum(dim=-1) - values < top_p) & (values > 0)
    result = torch.zeros_like(keep)
    result[order] = keep
    return result


def _with_logprobs(token: int, logprobs: torch.Tensor, top: int) -> Sample:
    values, ids = logprobs.topk(top)
    pairs = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return Sample(token, float(logprobs[token]), pairs)
