"""What ``model.sampler.sample`` does, launched on a GPU without waiting for it.

The parameters go to the device in two copies, the results come back in one, and between them the
host reads nothing, so that it can prepare the next step while the device computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lorax_serve import core
from lorax_serve.gpu.ops import Draw
from lorax_serve.model.copies import ToHost
from lorax_serve.model.sampling.sampler import Sample

__all__ = ["DeviceSamples", "sample_on_device"]


@dataclass(frozen=True, slots=True)
class DeviceSamples:
    """A token of each row, which the device may still be computing.

    Attributes:
        tokens: int32 ``[rows]`` on the device; -1 where the logits are not finite.
    """

    tokens: torch.Tensor
    _to_host: ToHost
    _logprobs: _Logprobs | None

    def samples(self) -> list[Sample]:
        """What ``sampler.sample`` returns; waits until the device has drawn them."""
        host = self._to_host.wait()
        if self._logprobs is None:
            return [Sample(None if token < 0 else token) for token in host.tolist()]
        asked = self._logprobs
        rows, most = len(asked.rows), max(asked.tops)
        sizes = [len(self.tokens), rows, rows * most, rows * most]
        tokens, chosen, values, ids = torch.split(host, sizes)
        samples = [Sample(None if token < 0 else token) for token in tokens.tolist()]
        each = zip(
            asked.rows,
            asked.tops,
            chosen.view(torch.float32).tolist(),
            values.view(torch.float32).view(rows, most).tolist(),
            ids.view(rows, most).tolist(),
            strict=True,
        )
        for row, top, logprob, best, best_ids in each:
            token = samples[row].token_id
            if token is not None:
                pairs = tuple(zip(best_ids[:top], best[:top], strict=True))
                samples[row] = Sample(token, logprob, pairs)
        return samples


@dataclass(frozen=True, slots=True)
class _Logprobs:
    """Of the rows that want them: ``rows``, each with the ``tops`` most probable tokens."""

    rows: list[int]
    tops: list[int]


def sample_on_device(
    logits: torch.Tensor, sequences: Sequence[core.Sequence], draw: Draw
) -> DeviceSamples:
    """Launch the choice of each sequence's next token.

    As ``sampler.sample``, with ``draw``'s ways: ties at the k-th place of a top-k are kept, what
    top-k leaves is drawn from by rejection too, and -infinity is a ban, not a failure.

    Args:
        logits: float32 ``[len(sequences), vocab]``, contiguous; changed in place.
        sequences: whose next token each row is.
        draw: of ``gpu.ops``.
    """
    vocab, device = logits.shape[-1], logits.device
    params = [s.sampling for s in sequences]
    seen, penalties, banned = _places(sequences, vocab)
    with_logprobs = [row for row, p in enumerate(params) if p.logprobs is not None]
    seeds, draws, top_k, seen_at, banned_at, rows = _upload(
        [
            [_signed(p.seed) for p in params],
            [s.generated for s in sequences],
            [min(p.top_k, vocab) for p in params],
            seen,
            banned,
            with_logprobs,
        ],
        torch.int64,
        device,
    )
    temperature, top_p, penalty = _upload(
        [[p.temperature for p in params], [p.top_p for p in params], penalties],
        torch.float32,
        device,
    )
    # The model's own, so before anything changes them.
    logprobs = logits[rows].log_softmax(dim=-1) if with_logprobs else None
    flat = logits.view(-1)
    if seen:
        values = flat[seen_at]
        flat[seen_at] = torch.where(values > 0, values / penalty, values * penalty)
    if banned:
        flat.index_fill_(0, banned_at, -torch.inf)
    tokens = draw(logits, temperature, top_k.to(torch.int32), top_p, seeds, draws.to(torch.int32))
    if logprobs is None:
        return DeviceSamples(tokens, ToHost(tokens), None)
    tops = [params[row].logprobs or 0 for row in with_logprobs]
    best = logprobs.topk(max(tops))
    # A row without a token has no log-probability either; whatever is gathered is not looked at.
    chosen = logprobs.gather(1, tokens[rows].clamp(min=0).long()[:, None])[:, 0]
    bits = [part.flatten().view(torch.int32) for part in (chosen, best.values)]
    together = torch.cat([tokens, *bits, best.indices.flatten().to(torch.int32)])
    return DeviceSamples(tokens, ToHost(together), _Logprobs(with_logprobs, tops))


def _places(
    sequences: Sequence[core.Sequence], vocab: int
) -> tuple[list[int], list[float], list[int]]:
    """Among all logits in a row: those to penalise, the penalty of each, and those to ban."""
    seen: list[int] = []
    penalties: list[float] = []
    banned: list[int] = []
    for row, sequence in enumerate(sequences):
        penalty, start = sequence.sampling.repetition_penalty, row * vocab
        if penalty != 1:
            tokens = set(sequence.tokens)
            seen += [start + token for token in tokens]
            penalties += [penalty] * len(tokens)
        if sequence.generated < sequence.min_new_tokens:
            banned += [start + token for token in sequence.eos_token_ids]
    return seen, penalties, banned


def _upload(
    parts: Sequence[Sequence[float]], dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, ...]:
    """Lists of numbers as tensors on the device, in one copy that is not waited for."""
    together = torch.tensor(
        [number for part in parts for number in part],
        dtype=dtype,
        pin_memory=device.type == "cuda",
    )
    there = together.to(device, non_blocking=True)
    return tuple(there.split_with_sizes([len(part) for part in parts]))


def _signed(seed: int) -> int:
    """The same 64 bits as a signed number."""
    return seed - (1 << 64) if seed >= 1 << 63 else seed
