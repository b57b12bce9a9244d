"""Examples to batches, and the order in which they are trained on.

In a batch, rows lie one after another without padding, those of one adapter together. Models that
cannot attend so get padded rows.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lorax_train.data.encode import Example
from lorax_train.data.token_store import StoredExamples

__all__ = [
    "Batch",
    "Share",
    "Span",
    "by_length",
    "collate",
    "count_targets",
    "lengths",
    "longest_row",
    "plan_epoch",
    "split",
    "take",
]

# How many optimizer steps' rows are sorted by length together: enough that a batch holds like
# lengths, few enough that the order of the rows stays random.
_SORTED_TOGETHER = 50


@dataclass(frozen=True, slots=True)
class Span:
    """The tokens of one adapter in a batch: those from ``start`` to ``stop``."""

    adapter: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Share:
    """One adapter's rows in a batch.

    Attributes:
        adapter: its number.
        examples: the rows.
        weight: of each of their targets in the loss.
    """

    adapter: int
    examples: Sequence[Example]
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of one or more adapters.

    Attributes:
        tokens: int64 ``[1, T]``, rows one after another; or ``[rows, length]``, padded.
        positions: int64, of each token in its row; in tokens' shape.
        bounds: where each row begins, and T; None if the rows are padded.
        mask: int64 ``[rows, length]``, 1 for a token and 0 for padding; None without padding.
        spans: of each adapter, by place in the flattened tokens.
        before: int64 ``[n]``: the place, in the flattened tokens, before each target.
        labels: int64 ``[n]``: the targets.
        weights: float32 ``[n]``: of each target in the loss.
        target_spans: of each adapter, by place in the targets.
        n_tokens: tokens, without padding.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    bounds: tuple[int, ...] | None
    mask: torch.Tensor | None
    spans: tuple[Span, ...]
    before: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    target_spans: tuple[Span, ...]
    n_tokens: int

    @property
    def n_targets(self) -> int:
        """Number of targets."""
        return len(self.labels)

    def to(self, device: torch.device) -> Batch:
        """The same batch on ``device``."""
        moved: dict[str, Any] = {
            field.name: value.to(device)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), torch.Tensor)
        }
        return replace(self, **moved)


def collate(
    shares: Sequence[Share] | Sequence[Example], pad_id: int, *, padded: bool = False
) -> Batch:
    """Lay out the rows of ``shares``, or examples of the first adapter.

    Args:
        shares: in the order of their adapters.
        pad_id: fills up short rows if they are padded; any token does, the padding is masked.
        padded: one row below the other, padded on the right to the longest.
    """
    shares = [
        *(share for share in shares if isinstance(share, Share)),
        *([Share(0, rest)] if (rest := [e for e in shares if isinstance(e, Example)]) else []),
    ]
    rows = [example for share in shares for example in share.examples]
    width = max(len(example.tokens) for example in rows) if padded else 0
    tokens: list[int] = []
    positions: list[int] = []
    mask: list[int] = []
    bounds, spans, target_spans = [0], [], []
    before: list[int] = []
    labels: list[int] = []
    weights: list[float] = []
    for share in shares:
        start, first = len(tokens), len(labels)
        for example in share.examples:
            at = len(tokens)
            places = [i for i, trained in enumerate(example.trained) if trained]
            before += [at + i - 1 for i in places]
            labels += [example.tokens[i] for i in places]
            length = len(example.tokens)
            padding = max(0, width - length)
            tokens += [*example.tokens, *[pad_id] * padding]
            positions += range(length + padding)
            mask += [*[1] * length, *[0] * padding]
            bounds.append(len(tokens))
        weights += [share.weight] * (len(labels) - first)
        spans.append(Span(share.adapter, start, len(tokens)))
        target_spans.append(Span(share.adapter, first, len(labels)))
    shape = (len(rows), width) if padded else (1, len(tokens))
    return Batch(
        tokens=torch.tensor(tokens).view(shape),
        positions=torch.tensor(positions).view(shape),
        bounds=None if padded else tuple(bounds),
        mask=torch.tensor(mask).view(shape) if padded else None,
        spans=tuple(spans),
        before=torch.tensor(before, dtype=torch.int64),
        labels=torch.tensor(labels, dtype=torch.int64),
        weights=torch.tensor(weights, dtype=torch.float32),
        target_spans=tuple(target_spans),
        n_tokens=sum(len(example.tokens) for example in rows),
    )


def plan_epoch(
    examples: Sequence[Example], batch_size: int, grad_accumulation: int, rng: random.Random
) -> Iterator[list[list[Example]]]:
    """Yield each optimizer step's batches, so that every example comes once.

    The rows are shuffled, sorted by length within groups of many steps, and the steps shuffled.
    Which rows share a step depends on ``batch_size * grad_accumulation`` alone. Only the lengths
    of all examples are in memory, and the examples of one step.
    """
    step_rows = batch_size * grad_accumulation
    order = array("q", range(len(examples)))
    rng.shuffle(order)
    all_lengths = lengths(examples)
    together = _SORTED_TOGETHER * step_rows
    for start in range(0, len(order), together):
        group = np.frombuffer(order, np.int64)[start : start + together]
        group[:] = group[np.argsort(all_lengths[group], kind="stable")]
    starts = array("q", range(0, len(order), step_rows))
    rng.shuffle(starts)
    for start in starts:
        step = order[start : start + step_rows]
        yield [
            [examples[i] for i in step[at : at + batch_size]]
            for at in range(0, len(step), batch_size)
        ]


def split(
    examples: Sequence[Example], share: float, seed: int
) -> tuple[Sequence[Example], Sequence[Example]]:
    """Split off ``share`` of the examples, at least one, chosen by ``seed``; order is kept.

    Returns:
        The rest, and the part that was split off.
    """
    n = len(examples)
    count = min(max(1, round(n * share)), n - 1)
    chosen = set(random.Random(f"split {seed}").sample(range(n), count))
    rest = array("q", (i for i in range(n) if i not in chosen))
    return take(examples, rest), take(examples, sorted(chosen))


def lengths(examples: Sequence[Example]) -> npt.NDArray[Any]:
    """Tokens in each example, ``[examples]``, without loading those that are stored."""
    if isinstance(examples, StoredExamples):
        return examples.lengths
    return np.array([len(example.tokens) for example in examples])


def count_targets(examples: Sequence[Example]) -> int:
    """Tokens that are learned, in all examples, without loading those that are stored."""
    if isinstance(examples, StoredExamples):
        return examples.n_targets
    return sum(sum(example.trained) for example in examples)


def longest_row(examples: Sequence[Example]) -> Example:
    """What has the most tokens of all that goes through the model at once."""
    if isinstance(examples, StoredExamples):
        examples = [examples[int(examples.row_lengths.argmax())]]
    rows = (row for example in examples for row in example.rows)
    return max(rows, key=lambda row: len(row.tokens))


def take(examples: Sequence[Example], indices: Sequence[int]) -> Sequence[Example]:
    """Those at ``indices``, in their order; those that are stored stay there."""
    if isinstance(examples, StoredExamples):
        return examples.take(indices)
    return [examples[i] for i in indices]


def by_length(examples: Sequence[Example]) -> Sequence[Example]:
    """Examples from the shortest to the longest."""
    return take(examples, np.argsort(lengths(examples), kind="stable").tolist())
