"""Conversations of two turns, answered alone and among others: who gets another answer, and where.

A second turn begins with the first one and its answer. Where the prefix cache has that, the
answer's keys and values are those of tokens that were decoded; without it they are computed as a
prompt's.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from benchmarks.measure import drive
from benchmarks.ours import OfflineEngine
from benchmarks.workloads import Request, arriving, s_lora

__all__ = [
    "Conversation",
    "Divergence",
    "among_others",
    "answered_alone",
    "compare",
    "openings",
    "same_before",
]

# Of what the other side says between the turns.
_REPLY_TOKENS = 16


TURNS = ("first_turn", "second_turn")

Answers = tuple[list[int], list[int]]
"""The tokens of both turns' answers."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """Both turns, and their answers when each was alone."""

    turns: tuple[Request, Request]
    answers: Answers


@dataclass(frozen=True, slots=True)
class Divergence:
    """Of some answers that were compared."""

    answers: int
    different: int
    same_before: float | None
    """Median over those that differ: tokens that are the same before the first other one."""

    @property
    def rate(self) -> float:
        """The share of answers that differ."""
        return self.different / self.answers


async def openings(
    engine: OfflineEngine,
    count: int,
    lengths: tuple[int, int],
    new_tokens: int,
    names: Sequence[str | None],
    *,
    seed: int,
) -> list[Request]:
    """First turns: prompts that the base model writes after a random token, of ``lengths``, bounds
    included. The adapters take turns, and each of them at being greedy."""
    shape = s_lora(lengths, [None] * count, vocab_size=engine.vocab_size, seed=seed)
    begun = [replace(r, prompt=r.prompt[:1], new_tokens=len(r.prompt) - 1) for r in shape]
    written = (await drive(engine, begun)).traces
    return [
        Request(
            (*trace.request.prompt, *trace.token_ids),
            new_tokens,
            names[number % len(names)],
            seed=number,
            greedy=number // len(names) % 2 == 0,
        )
        for number, trace in enumerate(written)
    ]


async def answered_alone(engine: OfflineEngine, first: Sequence[Request]) -> list[Conversation]:
    """Go on with each of these first turns, while the engine has nothing else to do."""

    async def answers(requests: Sequence[Request]) -> list[list[int]]:
        return [trace.token_ids for trace in (await drive(engine, requests, in_flight=1)).traces]

    one = await answers(first)
    replies = itertools.islice(itertools.cycle(first), 1, None)
    second = [
        replace(request, prompt=(*request.prompt, *answer, *other.prompt[:_REPLY_TOKENS]))
        for request, answer, other in zip(first, one, replies, strict=False)
    ]
    two = await answers(second)
    pairs = zip(zip(first, second, strict=True), zip(one, two, strict=True), strict=True)
    return [Conversation(turns, both) for turns, both in pairs]


async def among_others(
    engine: OfflineEngine,
    conversations: Sequence[Conversation],
    most: int,
    seconds: float,
    *,
    seed: int,
) -> list[Answers]:
    """Each conversation's answers when they are had in random groups of 2 to ``most``: first their
    first turns, which come at random times within ``seconds``, then so their second ones."""
    rng = np.random.default_rng(seed)
    order: list[int] = rng.permutation(len(conversations)).tolist()
    answers: dict[int, Answers] = {}
    while order:
        size = int(rng.integers(2, most + 1))
        group, order = order[:size], order[size:]
        turns = []
        for turn in range(2):
            times: list[float] = rng.uniform(0, seconds, size=len(group)).tolist()
            requests = [conversations[number].turns[turn] for number in group]
            traces = (await drive(engine, arriving(requests, times))).traces
            turns.append([trace.token_ids for trace in traces])
        answers |= dict(zip(group, zip(*turns, strict=True), strict=True))
    return [answers[number] for number in range(len(conversations))]


def compare(
    conversations: Sequence[Conversation], again: Iterable[Sequence[Answers]]
) -> dict[str, Divergence]:
    """What of the answers that were had again is other than alone, by turn and kind of request."""
    before: dict[str, list[int | None]] = {}
    for answers in again:
        for conversation, others in zip(conversations, answers, strict=True):
            both = zip(TURNS, conversation.turns, conversation.answers, others, strict=True)
            for turn, request, alone, other in both:
                kind = f"{turn}_{'greedy' if request.greedy else 'drawn'}"
                before.setdefault(kind, []).append(same_before(alone, other))
    return {kind: _divergence(some) for kind, some in before.items()}


def same_before(one: Sequence[int], other: Sequence[int]) -> int | None:
    """How many tokens are the same before the first that is not; None if all are."""
    differ = [a != b for a, b in zip(one, other, strict=True)]
    return differ.index(True) if any(differ) else None


def _divergence(before: Sequence[int | None]) -> Divergence:
    known = [tokens for tokens in before if tokens is not None]
    return Divergence(len(before), len(known), statistics.median(known) if known else None)
