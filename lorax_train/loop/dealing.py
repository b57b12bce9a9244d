"""Which process computes which rows of a step."""

from __future__ import annotations

from collections.abc import Sequence

from lorax_train.data.encode import Example

__all__ = ["deal"]

Batches = Sequence[Sequence[Example]]


def deal(steps: Sequence[Batches], processes: int) -> list[list[Batches]]:
    """Deal the rows of a step such that each process has about as many tokens.

    Every process computes the same, and takes its own part. The longest rows go first, each to
    whoever has the fewest tokens so far, of all adapters together; a part's rows keep their order.

    Args:
        steps: each adapter's batches of the step.
        processes: how many there are.

    Returns:
        For each process each adapter's batches: one, of all its rows, or none. A single process
        has the batches as they are.
    """
    if processes == 1:
        return [list(steps)]
    loads = [0] * processes
    dealt: list[list[Batches]] = [[] for _ in loads]
    for step in steps:
        rows = [row for batch in step for row in batch]
        owners = [0] * len(rows)
        for i in sorted(range(len(rows)), key=lambda i: -len(rows[i].tokens)):
            owners[i] = loads.index(min(loads))
            loads[owners[i]] += len(rows[i].tokens)
        for process, parts in enumerate(dealt):
            part = [row for row, owner in zip(rows, owners, strict=True) if owner == process]
            parts.append([part] if part else [])
    return dealt
