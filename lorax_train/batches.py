"""Examples to padded batches, and the order in which they are trained on.

Rows of like length share a batch, so that little of it is padding.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from lorax_train.encode import Example

__all__ = ["Batch", "collate", "plan_epoch", "split"]

# How many optimizer steps' rows are sorted by length together: enough that a batch holds like
# lengths, few enough that the order of the rows stays random.
_SORTED_TOGETHER = 50


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows padded on the right to one length.

    Attributes:
        tokens: ``[rows, length]`` int64.
        attention: ``[rows, length]`` int64, 1 for a token and 0 for padding.
        trained: ``[rows, length]`` bool, whether the token at that place is a target.
        n_tokens: tokens, without the padding.
        n_targets: targets.
    """

    tokens: torch.Tensor
    attention: torch.Tensor
    trained: torch.Tensor
    n_tokens: int
    n_targets: int

    def to(self, device: torch.device) -> Batch:
        """The same batch on ``device``."""
        return Batch(
            self.tokens.to(device),
            self.attention.to(device),
            self.trained.to(device),
            self.n_tokens,
            self.n_targets,
        )


def collate(examples: Sequence[Example], pad_id: int) -> Batch:
    """Pad ``examples`` on the right to the longest."""
    shape = len(examples), max(len(example.tokens) for example in examples)
    tokens = torch.full(shape, pad_id, dtype=torch.int64)
    attention = torch.zeros(shape, dtype=torch.int64)
    trained = torch.zeros(shape, dtype=torch.bool)
    for i, example in enumerate(examples):
        length = len(example.tokens)
        tokens[i, :length] = torch.tensor(example.tokens)
        attention[i, :length] = 1
        trained[i, :length] = torch.tensor(example.trained)
    return Batch(tokens, attention, trained, int(attention.sum()), int(trained.sum()))


def plan_epoch(
    examples: Sequence[Example], batch_size: int, grad_accumulation: int, rng: random.Random
) -> Iterator[list[list[Example]]]:
    """Yield each optimizer step's batches, so that every example comes once.

    The rows are shuffled, sorted by length within groups of many steps, and the steps shuffled.
    Which rows share a step depends on ``batch_size * grad_accumulation`` alone.
    """
    step_rows = batch_size * grad_accumulation
    order = list(examples)
    rng.shuffle(order)
    steps = []
    for start in range(0, len(order), _SORTED_TOGETHER * step_rows):
        group = order[start : start + _SORTED_TOGETHER * step_rows]
        group.sort(key=lambda example: len(example.tokens))
        steps += _chunks(group, step_rows)
    rng.shuffle(steps)
    for step in steps:
        yield _chunks(step, batch_size)


def split(
    examples: Sequence[Example], share: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """Split off ``share`` of the examples, at least one, chosen by ``seed``; order is kept.

    Returns:
        The rest, and the part that was split off.
    """
    count = min(max(1, round(len(examples) * share)), len(examples) - 1)
    chosen = set(random.Random(f"split {seed}").sample(range(len(examples)), count))
    rest = [example for i, example in enumerate(examples) if i not in chosen]
    return rest, [examples[i] for i in sorted(chosen)]


def _chunks(items: list[Example], size: int) -> list[list[Example]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
