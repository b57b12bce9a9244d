"""Examples on disk: tokenised once, then read one by one, so that data may be larger than memory.

A store is a directory of three arrays and a summary: every example's tokens one after another, as
many marks of what is learned, and a table of where each example lies. They are mapped into memory,
which the system takes back when it needs it.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from lorax_serve.errors import TrainingError
from lorax_train.data.encode import Example
from lorax_train.data.preference import PreferencePair

__all__ = ["TABLE", "StoreWriter", "StoredExamples", "TokenStore", "open_store"]

Array = npt.NDArray[Any]

TABLE = np.dtype(
    [
        ("start", "<u8"),  # of its tokens among all
        ("length", "<u4"),
        ("targets", "<u4"),
        ("highest", "<u4"),  # of its token ids
        ("file", "<u4"),
        ("number", "<u8"),  # of its line in the file
        ("first", "<u4"),  # tokens of the chosen answer, of a pair; else 0
    ]
)
_TOKENS, _TRAINED, _TABLE, _SUMMARY = "tokens.u32", "trained.u8", "table.bin", "summary.json"


class StoreWriter:
    """Appends to a new store.

    Attributes:
        warnings: kept with the store, to be shown whenever it is used.
    """

    def __init__(self, directory: Path) -> None:
        self.warnings: list[str] = []
        self._summary = directory / _SUMMARY
        with ExitStack() as opened:
            self._tokens, self._trained, self._table = (
                opened.enter_context((directory / name).open("wb"))
                for name in (_TOKENS, _TRAINED, _TABLE)
            )
            self._files = opened.pop_all()
        self._n_tokens = self._n_examples = 0

    def add(self, example: Example, file: int, number: int) -> None:
        """Append an example, of line ``number`` of the file with this index."""
        first = example.chosen_length if isinstance(example, PreferencePair) else 0
        self._add(example.tokens, example.trained, file, number, first)

    def add_text(self, tokens: Sequence[int], file: int, number: int) -> None:
        """Append a part of a text that is learned whole."""
        self._add(tokens, [True] * len(tokens), file, number)

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Write the rest; without an error also the summary, without which there is no store."""
        self._files.close()
        if kind is None:
            counts = {"tokens": self._n_tokens, "examples": self._n_examples}
            self._summary.write_text(json.dumps(counts | {"warnings": self.warnings}))

    def _add(
        self, tokens: Sequence[int], trained: Sequence[bool], file: int, number: int, first: int = 0
    ) -> None:
        self._tokens.write(np.array(tokens, "<u4").tobytes())
        self._trained.write(bytes(trained))
        row = (self._n_tokens, len(tokens), sum(trained), max(tokens), file, number, first)
        self._table.write(np.array(row, TABLE).tobytes())
        self._n_tokens += len(tokens)
        self._n_examples += 1


class TokenStore:
    """A complete store, opened.

    Attributes:
        tokens: uint32 ``[tokens]``, of all examples.
        trained: uint8 ``[tokens]``, 1 where the token is learned.
        table: ``TABLE``, one record an example.
        warnings: of what was cut or left out when it was made.
    """

    def __init__(self, directory: Path) -> None:
        summary = json.loads((directory / _SUMMARY).read_text())
        n_tokens, n_examples = summary["tokens"], summary["examples"]
        self.warnings: list[str] = summary["warnings"]
        self.tokens: Array = np.memmap(directory / _TOKENS, "<u4", "r", shape=(n_tokens,))
        self.trained: Array = np.memmap(directory / _TRAINED, "u1", "r", shape=(n_tokens,))
        self.table: Array = np.memmap(directory / _TABLE, TABLE, "r", shape=(n_examples,))


class StoredExamples(Sequence[Example]):
    """Examples that lie in a store until one is asked for.

    Args:
        store: that has the tokens.
        where: from the index of a file and the number of a line to how messages name it.
        table: ``TABLE``, a record an example, in their order; default: all of the store.
    """

    def __init__(
        self, store: TokenStore, where: Callable[[int, int], str], table: Array | None = None
    ) -> None:
        self.store = store
        self.where = where
        self.table: Array = store.table if table is None else table

    def __len__(self) -> int:
        return len(self.table)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> StoredExamples: ...
    def __getitem__(self, index: int | slice) -> Example | StoredExamples:
        if isinstance(index, slice):
            return StoredExamples(self.store, self.where, self.table[index])
        start, length, _, _, file, number, first = self.table[index].item()
        tokens = self.store.tokens[start : start + length].tolist()
        trained = self.store.trained[start + 1 : start + length].astype(bool).tolist()
        fields = tuple(tokens), (False, *trained), self.where(file, number)
        return PreferencePair(*fields, chosen_length=first) if first else Example(*fields)

    def take(self, indices: Sequence[int]) -> StoredExamples:
        """Those at ``indices``, in their order, still in the store."""
        return StoredExamples(self.store, self.where, self.table[np.asarray(indices, "<i8")])

    @property
    def lengths(self) -> Array:
        """Tokens in each example, uint32 ``[examples]``."""
        return np.asarray(self.table["length"])

    @property
    def row_lengths(self) -> Array:
        """Tokens in the longer row of each example, uint32 ``[examples]``."""
        first = self.table["first"]
        return np.asarray(np.maximum(first, self.table["length"] - first))

    @property
    def n_targets(self) -> int:
        """Tokens that are learned, in all examples."""
        return int(self.table["targets"].sum())

    @property
    def highest(self) -> int:
        """The index of an example with the highest token id."""
        return int(self.table["highest"].argmax())


def open_store(build: Callable[[StoreWriter], None], kept: Path | None = None) -> TokenStore:
    """Open a store, building it first unless it was kept.

    Args:
        build: adds the examples.
        kept: the store's directory, where it is and stays for the next run. None: its files are
            deleted at once, and their space is free when nobody uses the store any more, however
            the process ends.

    Raises:
        TrainingError: there is no space for it, or no permission.
    """
    if kept is None:
        with _building(build, None) as directory:
            return TokenStore(directory)
    try:
        return TokenStore(kept)
    except (OSError, ValueError, KeyError):  # none, or a damaged one
        shutil.rmtree(kept, ignore_errors=True)
    with _building(build, kept.parent) as directory:
        try:
            directory.rename(kept)
        except OSError:
            if not kept.is_dir():  # else another run was faster, with the same content
                raise
        return TokenStore(kept)


@contextmanager
def _building(build: Callable[[StoreWriter], None], parent: Path | None) -> Iterator[Path]:
    """A new store in a temporary directory, removed at the end."""
    directory = parent or Path(tempfile.gettempdir())
    try:
        directory.mkdir(parents=True, exist_ok=True)
        directory = Path(tempfile.mkdtemp(prefix="lorax-train-", dir=parent))
        try:
            with StoreWriter(directory) as writer:
                build(writer)
            yield directory
        finally:
            shutil.rmtree(directory, ignore_errors=True)
    except OSError as error:
        raise TrainingError(
            f"the tokens of the data cannot be written to {directory}: {error.strerror}; give "
            "--cache a directory with more space"
        ) from error
