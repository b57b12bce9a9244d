"""Text as one stream of tokens, read in windows: the ancestor's way to train on a text file."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np

from lorax_serve.errors import TrainingError
from lorax_train.data.token_store import TABLE, Array, StoredExamples, TokenStore

__all__ = ["RandomWindows", "Windows", "held_out_windows", "random_windows"]


class Windows(StoredExamples):
    """Windows of a text."""


class RandomWindows(Windows):
    """Windows at places drawn uniformly; every epoch draws its own, as many as would fill the
    text. A window of n tokens has n - 1 to learn.

    Args:
        store: whose tokens they are of.
        where: names a window by the place of its first token.
        stop: they end before this token.
        length: tokens in each.
        seed: of the places.
        epoch: whose windows they are.
    """

    def __init__(
        self,
        store: TokenStore,
        where: Callable[[int, int], str],
        stop: int,
        length: int,
        seed: int,
        epoch: int = 0,
    ) -> None:
        rng = random.Random(f"windows {seed} {epoch}")
        starts = [rng.randrange(stop - length + 1) for _ in range(stop // length)]
        super().__init__(store, where, _table(store, np.array(starts), length))
        self._again = (stop, length, seed)

    def of_epoch(self, epoch: int) -> RandomWindows:
        """The windows of another epoch."""
        stop, length, seed = self._again
        return RandomWindows(self.store, self.where, stop, length, seed, epoch)


def random_windows(
    store: TokenStore, path: Path, share: float, length: int, seed: int
) -> tuple[RandomWindows, Windows | None]:
    """Windows at random places of the text but for its last ``share``, and that in order.

    Raises:
        TrainingError: when there are fewer tokens than one window has.
    """
    total = len(store.tokens)
    stop = total - round(total * share)
    if stop < length:
        raise TrainingError(
            f"{path}: {stop} tokens to train on, fewer than --window {length}; lower --window, or "
            "give more text"
        )
    if 0 < total - stop < 2:
        stop = total
    examples = RandomWindows(store, _place(path), stop, length, seed)
    return examples, held_out_windows(store, path, length, stop) if stop < total else None


def held_out_windows(store: TokenStore, path: Path, length: int, start: int = 0) -> Windows:
    """Windows one after another from token ``start`` on, without what is left at the end; what is
    shorter than a window is one.

    Raises:
        TrainingError: when there are fewer than two tokens.
    """
    total = len(store.tokens)
    if total - start < 2:
        raise TrainingError(f"{path}: fewer than two tokens to evaluate on; give more text")
    length = min(length, total - start)
    starts = np.arange(start, total - length + 1, length)
    return Windows(store, _place(path), _table(store, starts, length))


def _place(path: Path) -> Callable[[int, int], str]:
    return lambda file, number: f"{path} from token {number}"


def _table(store: TokenStore, starts: Array, length: int) -> Array:
    table = np.zeros(len(starts), TABLE)
    table["start"] = table["number"] = starts
    table["length"] = length
    table["targets"] = length - 1
    table["highest"] = store.table["highest"].max()
    return table
