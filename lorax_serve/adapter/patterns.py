"""A bound on what an adapter's regular expressions can cost, before any of them is matched.

Python's ``re`` tries all ways in which an expression can match, and holds the interpreter's lock
meanwhile: ``(a+)+$`` would stop the engine. So the ways are counted on the parsed expression, and
one that has too many is refused. The count is an upper bound: it is over all texts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from itertools import pairwise
from re import _constants as op  # type: ignore[attr-defined]
from re import _parser  # type: ignore[attr-defined]
from typing import Any, NamedTuple

__all__ = ["MAX_CHARACTERS", "MAX_WAYS", "ways"]

MAX_CHARACTERS = 16_384
MAX_WAYS = 1_000_000
"""A second or so for all modules of a model."""
_LENGTH = 48  # of a module's path
_MOST_ROUNDS = 8  # of a group that is repeated


class _Cost(NamedTuple):
    """Choices: ends of runs of characters, and all others.

    The ends of n runs after one another are ascending places of the text: ``comb(L + n, n)``.
    """

    runs: int = 0
    others: float = 1

    def then(self, other: _Cost) -> _Cost:
        return _Cost(self.runs + other.runs, self.others * other.others)

    @property
    def ways(self) -> float:
        runs = min(self.runs, 32)  # which is too many
        return math.comb(_LENGTH + runs, runs) * self.others


_ENDLESS = _Cost(0, math.inf)
_FIXED = (op.LITERAL, op.NOT_LITERAL, op.ANY, op.IN, op.AT, op.GROUPREF)
_REPEATS = (op.MAX_REPEAT, op.MIN_REPEAT, op.POSSESSIVE_REPEAT)


def ways(expression: str) -> float:
    """An upper bound of the ways to match an expression; infinite if it is exponential.

    Raises:
        re.error, OverflowError, RecursionError: it is not an expression.
    """
    re.compile(expression)
    return _sequence(_parser.parse(expression)).ways


def _sequence(items: Iterable[tuple[Any, Any]]) -> _Cost:
    cost = _Cost()
    for kind, value in items:
        cost = cost.then(_item(kind, value))
    return cost


def _item(kind: Any, value: Any) -> _Cost:
    if kind in _FIXED:
        return _Cost()
    if kind is op.BRANCH:
        return _branch([list(each) for each in value[1]])
    if kind is op.SUBPATTERN:
        return _sequence(value[-1])
    if kind is op.ATOMIC_GROUP:
        return _sequence(value)
    if kind in (op.ASSERT, op.ASSERT_NOT):
        return _sequence(value[1])
    if kind in _REPEATS:
        return _repeat(*value)
    return _ENDLESS


def _branch(branches: list[list[tuple[Any, Any]]]) -> _Cost:
    if all(kind is op.LITERAL for branch in branches for kind, _ in branch):
        words = sorted([code for _, code in branch] for branch in branches)
        if all(b[: len(a)] != a for a, b in pairwise(words)):
            return _Cost()  # at most one of them is there
    costs = [_sequence(branch) for branch in branches]
    return _Cost(max(cost.runs for cost in costs), sum(cost.others for cost in costs))


def _repeat(least: int, most: int, body: Any) -> _Cost:
    cost = _sequence(body)
    if most <= 1:
        return _Cost(cost.runs, cost.others + 1)
    if cost == _Cost():
        return _Cost() if least == most else _Cost(1)
    if most > _MOST_ROUNDS:
        return _ENDLESS
    return _Cost(cost.runs * int(most), (cost.others + 1) ** int(most))
