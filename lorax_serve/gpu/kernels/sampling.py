"""Drawing tokens, by the way of ``model.sampler.draw``: rejection, with no sort.

A row of 128k logits takes one program longer to read than all the rest of the work, so each pass
over the rows is split in chunks, a program each, and a small program a row takes the next decision:

    _scan      the most probable token of each chunk, and whether a logit is NaN
    _begin     of each row; where there is a top-k, the k-th largest logit
    _mass      the weight of each chunk
    _propose   a token, drawn by the weights: an attempt
    _mass      the weight of what is more probable than that token, by chunk
    _propose   whether it stands; if not, the next attempt
    _mass
    _finish    likewise, until one stands

Between them each row has a *floor*: what may still be drawn is above it, or, before the first
attempt, no less. +infinity says that the row's token is final.

The launches and their grids depend on shapes alone, and nothing is read back, so that they can be
captured in a CUDA graph. ``_finish`` reads a whole row by one program, for the few that come to it.

Weights are float32, ``exp((logit - best) / temperature)``; all their sums are float64, in which
200k terms of at most 1 lose nothing that counts, and integers count the rest. No sum's order
depends on timing or on other rows: a row has the same token in any batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = ["draw", "uniform"]

_CHUNK = 4096
# The parameters are uploaded together, and where each begins depends on the number of rows: not a
# reason to compile anew.
_by_row = triton.jit(
    do_not_specialize_on_alignment=[
        "temperature_ptr",
        "top_k_ptr",
        "top_p_ptr",
        "seeds_ptr",
        "draws_ptr",
    ]
)
_SPLIT_ATTEMPTS = 2  # of a top-p of 0.9, one row in 200 or so takes more


def draw(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    seeds: torch.Tensor,
    draws: torch.Tensor,
) -> torch.Tensor:
    """See ``ops.Draw``. The attempts end for certain: each leaves only tokens more probable than
    its own, and one with nothing above it stands. The mass above halves or so each time, so that
    few are needed: 1.1 on average for a top-p of 0.9, 12 at the worst for one near 0."""
    rows, vocab = logits.shape
    tokens = torch.empty(rows, dtype=torch.int32, device=logits.device)
    if not rows:
        return tokens
    chunks = triton.cdiv(vocab, _CHUNK)

    def scratch(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.empty(rows, *shape, dtype=dtype, device=logits.device)

    chunk_best, chunk_tokens = scratch(torch.float32, chunks), scratch(torch.int32, chunks)
    masses, total = scratch(torch.float64, chunks), scratch(torch.float64)
    best, floor = scratch(torch.float32), scratch(torch.float32)
    candidates = scratch(torch.uint32, _CHUNK)
    x = (logits, logits.stride(0))
    scale = (temperature, best, floor)
    by_attempt = (tokens, top_p, seeds, draws, masses, total)
    shape = {"VOCAB": vocab, "CHUNK": _CHUNK, "num_warps": 8}
    by_chunk, by_row = (rows, chunks), (rows,)
    _scan[by_chunk](*x, chunk_best, chunk_tokens, **shape)
    _begin[by_row](*x, *scale, tokens, top_k, chunk_best, chunk_tokens, candidates, **shape)
    for attempt in range(_SPLIT_ATTEMPTS):
        _mass[by_chunk](*x, *scale, masses, FIRST=attempt == 0, **shape)
        _propose[by_row](*x, *scale, *by_attempt, ATTEMPT=attempt, **shape)
    _mass[by_chunk](*x, *scale, masses, FIRST=False, **shape)
    _finish[by_row](*x, *scale, *by_attempt, ATTEMPT=_SPLIT_ATTEMPTS, **shape)
    return tokens


@triton.jit
def uniform(seed, position, attempt):
    """``model.sampler.uniform``, bit for bit: seed int64 or uint64, the others integers."""
    z = _mix(seed.to(tl.uint64, bitcast=True), position.to(tl.uint64))
    z = _mix(z, attempt.to(tl.uint64))
    return (z >> 11).to(tl.float64) * (1.0 / (1 << 53))


@triton.jit
def _mix(z, word):
    z += (word + 1) * 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def _scan(logits_ptr, stride, best_ptr, tokens_ptr, VOCAB: tl.constexpr, CHUNK: tl.constexpr):
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(logits_ptr + row * stride + column, mask=column < VOCAB, other=-float("inf"))
    best = tl.max(tl.where(x == x, x, -float("inf")))
    token = tl.min(tl.where(x == best, column, VOCAB))
    broken = tl.sum((x != x).to(tl.int32)) > 0
    at = row * tl.num_programs(1) + chunk
    tl.store(best_ptr + at, tl.where(broken, float("nan"), best))
    tl.store(tokens_ptr + at, token)


@_by_row
def _begin(
    logits_ptr,
    stride,
    temperature_ptr,
    best_ptr,
    floor_ptr,
    tokens_ptr,
    top_k_ptr,
    chunk_best_ptr,
    chunk_tokens_ptr,
    candidates_ptr,
    VOCAB: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """What is true of a row whatever is drawn: -1 if it is not finite, else its best logit and the
    token of it; and the floor, the least logit that top-k keeps."""
    row = tl.program_id(0).to(tl.int64)
    chunks: tl.constexpr = triton.cdiv(VOCAB, CHUNK)
    chunk = tl.arange(0, triton.next_power_of_2(chunks))
    at = row * chunks + chunk
    bests = tl.load(chunk_best_ptr + at, mask=chunk < chunks, other=-float("inf"))
    tokens = tl.load(chunk_tokens_ptr + at, mask=chunk < chunks, other=VOCAB)
    best = tl.max(tl.where(bests == bests, bests, -float("inf")))
    broken = tl.sum((bests != bests).to(tl.int32)) > 0
    finite = (tl.abs(best) < float("inf")) & (broken == 0)
    token = tl.min(tl.where(bests == best, tokens, VOCAB))
    tl.store(tokens_ptr + row, tl.where(finite, token, -1))
    tl.store(best_ptr + row, best)
    floor = -float("inf")
    top_k = tl.load(top_k_ptr + row)
    if not (finite & (tl.load(temperature_ptr + row) > 0)):
        floor = float("inf")
    elif (top_k > 0) & (top_k < VOCAB):
        x_ptr = logits_ptr + row * stride
        floor = _kth_largest(x_ptr, top_k, candidates_ptr + row * CHUNK, VOCAB, CHUNK)
    tl.store(floor_ptr + row, floor)


@triton.jit
def _kth_largest(x_ptr, k, candidates_ptr, VOCAB: tl.constexpr, CHUNK: tl.constexpr):
    """Most often of a few candidates. Every CHUNK-th logit makes a group; k groups have a largest
    one that is no less than the k-th of these, so at least k logits are no less either, and those
    that are less cannot matter. What is left is small enough for registers, unless the logits are
    much alike or k is large: then the whole row is read for every bit."""
    lane = tl.arange(0, CHUNK)
    largest = tl.zeros([CHUNK], tl.uint32)
    for start in range(0, VOCAB, CHUNK):
        largest = tl.maximum(largest, _keys(x_ptr, start + lane, VOCAB))
    bound = tl.zeros([1], tl.uint32)
    for bit in range(32):
        trial = bound | _bit(31 - bit)
        bound = tl.where(tl.sum((largest >= trial).to(tl.int32)) >= k, trial, bound)
    count = 0
    for start in range(0, VOCAB, CHUNK):
        keys = _keys(x_ptr, start + lane, VOCAB)
        kept = (keys >= bound) & (start + lane < VOCAB)
        place = count + tl.cumsum(kept.to(tl.int32)) - 1
        tl.store(candidates_ptr + place, keys, mask=kept & (place < CHUNK))
        count += tl.sum(kept.to(tl.int32))
    tl.debug_barrier()  # all threads' stores, before any reads them
    few = count <= CHUNK
    candidates = tl.load(candidates_ptr + lane, mask=few & (lane < count), other=0)
    found = tl.zeros([1], tl.uint32)
    for bit in range(32):
        trial = found | _bit(31 - bit)
        if few:
            number = tl.sum((candidates >= trial).to(tl.int32))
        else:
            number = 0
            for start in range(0, VOCAB, CHUNK):
                keys = _keys(x_ptr, start + lane, VOCAB)
                number += tl.sum((keys >= trial).to(tl.int32))
        found = tl.where(number >= k, trial, found)
    sign = found & _bit(31)
    bits = tl.where(sign != 0, found ^ sign, found ^ 0xFFFFFFFF)
    return tl.sum(bits.to(tl.float32, bitcast=True))  # of one


@triton.jit
def _bit(place):
    return tl.full([1], 1, tl.uint32) << place


@triton.jit
def _keys(x_ptr, column, VOCAB: tl.constexpr):
    """Integers in the order of the logits; 0, less than any logit's, past the end."""
    x = tl.load(x_ptr + column, mask=column < VOCAB, other=0.0)
    x = tl.where(x == 0, 0.0, x)  # -0 is no less than 0
    bits = x.to(tl.uint32, bitcast=True)
    keys = tl.where(bits >> 31 != 0, bits ^ 0xFFFFFFFF, bits | _bit(31))
    return tl.where(column < VOCAB, keys, 0)


@triton.jit
def _weights(x, best, temperature, floor, FIRST: tl.constexpr):
    """Of logits that may be drawn: the floor itself only at the first attempt. -inf has none."""
    kept = x >= floor if FIRST else x > floor
    return tl.where(kept, tl.exp((x - best) / temperature), 0.0).to(tl.float64)


@_by_row
def _mass(
    logits_ptr,
    stride,
    temperature_ptr,
    best_ptr,
    floor_ptr,
    masses_ptr,
    FIRST: tl.constexpr,
    VOCAB: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    floor = tl.load(floor_ptr + row)
    if floor == float("inf"):
        return
    best, temperature = tl.load(best_ptr + row), tl.load(temperature_ptr + row)
    column = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(logits_ptr + row * stride + column, mask=column < VOCAB, other=-float("inf"))
    mass = tl.sum(_weights(x, best, temperature, floor, FIRST))
    tl.store(masses_ptr + row * tl.num_programs(1) + chunk, mass)


@_by_row
def _propose(
    logits_ptr,
    stride,
    temperature_ptr,
    best_ptr,
    floor_ptr,
    tokens_ptr,
    top_p_ptr,
    seeds_ptr,
    draws_ptr,
    masses_ptr,
    total_ptr,
    ATTEMPT: tl.constexpr,
    VOCAB: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    floor = tl.load(floor_ptr + row)
    if floor == float("inf"):
        return
    top_p = tl.load(top_p_ptr + row)
    masses = _load_masses(masses_ptr, row, VOCAB, CHUNK)
    mass = tl.sum(masses)
    if ATTEMPT == 0:
        tl.store(total_ptr + row, mass)
    elif _stands(mass, top_p, tl.load(total_ptr + row)):
        tl.store(floor_ptr + row, float("inf"))
        return
    best, temperature = tl.load(best_ptr + row), tl.load(temperature_ptr + row)
    attempt = tl.full([], ATTEMPT, tl.int32)
    u = uniform(tl.load(seeds_ptr + row), tl.load(draws_ptr + row), attempt)
    x_ptr = logits_ptr + row * stride
    token, value = _pick(x_ptr, best, temperature, floor, masses, u, ATTEMPT == 0, VOCAB, CHUNK)
    tl.store(tokens_ptr + row, token)
    # Without top-p the first token stands: what is above it does not matter.
    tl.store(floor_ptr + row, tl.where(top_p >= 1, float("inf"), value))


@_by_row
def _finish(
    logits_ptr,
    stride,
    temperature_ptr,
    best_ptr,
    floor_ptr,
    tokens_ptr,
    top_p_ptr,
    seeds_ptr,
    draws_ptr,
    masses_ptr,
    total_ptr,
    ATTEMPT: tl.constexpr,
    VOCAB: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    floor = tl.load(floor_ptr + row)
    if floor == float("inf"):
        return
    best, temperature = tl.load(best_ptr + row), tl.load(temperature_ptr + row)
    top_p, total = tl.load(top_p_ptr + row), tl.load(total_ptr + row)
    seed, position = tl.load(seeds_ptr + row), tl.load(draws_ptr + row)
    chunks: tl.constexpr = triton.cdiv(VOCAB, CHUNK)
    chunk = tl.arange(0, triton.next_power_of_2(chunks))
    x_ptr = logits_ptr + row * stride
    token = tl.load(tokens_ptr + row)
    masses = _load_masses(masses_ptr, row, VOCAB, CHUNK)
    attempt = tl.full([], ATTEMPT, tl.int32)
    while not _stands(tl.sum(masses), top_p, total):
        u = uniform(seed, position, attempt)
        token, floor = _pick(x_ptr, best, temperature, floor, masses, u, False, VOCAB, CHUNK)
        masses = tl.zeros_like(masses)
        for start in range(0, chunks, 4):  # four at once, so that their loads overlap
            these = start + tl.arange(0, 4)
            column = these[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
            x = tl.load(x_ptr + column, mask=column < VOCAB, other=-float("inf"))
            found = tl.sum(_weights(x, best, temperature, floor, False), axis=1)
            here = chunk[:, None] == these[None, :]
            masses += tl.sum(tl.where(here, found[None, :], 0.0), axis=1)
        attempt += 1
    tl.store(tokens_ptr + row, token)


@triton.jit
def _load_masses(masses_ptr, row, VOCAB: tl.constexpr, CHUNK: tl.constexpr):
    chunks: tl.constexpr = triton.cdiv(VOCAB, CHUNK)
    chunk = tl.arange(0, triton.next_power_of_2(chunks))
    return tl.load(masses_ptr + row * chunks + chunk, mask=chunk < chunks, other=0.0)


@triton.jit
def _stands(above, top_p, total):
    """Whether a token is in the nucleus, from the mass above it."""
    return (above == 0) | (above < top_p.to(tl.float64) * total)


@triton.jit
def _pick(
    x_ptr,
    best,
    temperature,
    floor,
    masses,
    u,
    FIRST: tl.constexpr,
    VOCAB: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The token, and its logit, at which the running sum of weights passes u times all of it."""
    target = u * tl.sum(masses)
    chunk = _first_past(masses, target)
    target -= tl.sum(tl.where(tl.arange(0, masses.shape[0]) < chunk, masses, 0.0))
    lane = tl.arange(0, CHUNK)
    column = chunk * CHUNK + lane
    x = tl.load(x_ptr + column, mask=column < VOCAB, other=-float("inf"))
    place = _first_past(_weights(x, best, temperature, floor, FIRST), target)
    return chunk * CHUNK + place, tl.max(tl.where(lane == place, x, -float("inf")))


@triton.jit
def _first_past(weights, target):
    """The first place with a weight where the running sum passes target; if rounding has it that
    none does, the last place with a weight."""
    place = tl.arange(0, weights.shape[0])
    passed = (tl.cumsum(weights) > target) & (weights > 0)
    first = tl.min(tl.where(passed, place, weights.shape[0]))
    last = tl.max(tl.where(weights > 0, place, 0))
    return tl.minimum(first, last)
