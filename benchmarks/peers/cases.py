"""The batches that are compared: one shape of request, and which adapters are in the batch."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.workloads import Request, fixed_shape

__all__ = ["CASES", "Case"]

RANK = 16
# Eight ranks, and their mean.
MIXED_RANKS = (4, 4, 8, 8, 16, 20, 36, 64)
MEAN_RANK = 20


class Case(NamedTuple):
    """A batch in which an adapter of each rank takes turns; without ranks it is the base model's.

    ``times``: how many times the usual number of requests it has.
    """

    name: str
    ranks: tuple[int, ...] = ()
    times: int = 1

    def count(self, options: argparse.Namespace) -> int:
        """How many requests it has, all at once."""
        count: int = options.requests * self.times
        return count

    def workload(
        self, options: argparse.Namespace, vocab_size: int, adapters: Sequence[str], number: int
    ) -> list[Request]:
        """Its requests in the round of that number (-1 is for the warm-up).

        No prompt comes twice in a benchmark, whatever the case: no prefix cache can help.
        """
        place = list(CASES).index(self.name)
        return fixed_shape(
            self.count(options),
            options.prompt_tokens,
            options.new_tokens,
            vocab_size=vocab_size,
            seed=options.seed + place + len(CASES) * (number + 1),
            adapters=adapters or [None],
        )

    @staticmethod
    def add_flags(flags: argparse.ArgumentParser) -> None:
        """The flags that say what the requests are like."""
        flags.add_argument(
            "--requests", type=int, default=16, help="at once; lora32 has twice as many"
        )
        flags.add_argument("--prompt-tokens", type=int, default=128)
        flags.add_argument("--new-tokens", type=int, default=64)


CASES = {
    case.name: case
    for case in (
        Case("base"),
        Case("lora8", (RANK,) * 8),
        Case("lora32", (RANK,) * 32, times=2),
        Case("lora1", (RANK,)),
        Case("mixed_ranks", MIXED_RANKS),
        Case("mean_rank", (MEAN_RANK,) * len(MIXED_RANKS)),
    )
}
