"""Files of data to rows, one at a time: JSONL, Parquet and plain text.

A row knows the file and line that it came from. Knows nothing of tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from lorax_serve.errors import TrainingError
from lorax_train.config import TextMode
from lorax_train.data.content import FORMATS, Content, Text, format_of, read_content

__all__ = ["SUFFIXES", "Row", "find_files", "place", "read_rows", "read_text"]

SUFFIXES = (".jsonl", ".parquet", ".txt")
_BOM = b"\xef\xbb\xbf"
_BLOCK = 1 << 18


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a file.

    Attributes:
        where: names it in messages: ``train.jsonl line 3``.
        content: what it says.
        number: of its line, or of its row in a Parquet file, from 1; 0: it is the whole file.
    """

    where: str
    content: Content
    number: int = 0


def find_files(path: Path) -> list[Path]:
    """The data files that ``--data`` or ``--eval-data`` means: one file, or those in a directory
    (not below it, not hidden) whose names have a known suffix, sorted by name.

    Raises:
        TrainingError: when there is none.
    """
    known = f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
    try:
        if path.is_dir():
            files = sorted(
                file
                for file in path.iterdir()
                if file.suffix in SUFFIXES and not file.name.startswith(".") and file.is_file()
            )
            if not files:
                raise TrainingError(f"{path} is a directory without a {known} file")
            return files
        path.open("rb").close()
    except OSError as error:
        raise TrainingError(f"{path} cannot be read: {error.strerror}") from error
    if path.suffix not in SUFFIXES:
        raise TrainingError(
            f"{path}: its format is told by its name, which must end in {known}; rename or "
            "convert it"
        )
    return [path]


def place(path: Path, number: int) -> str:
    """How messages name row ``number`` of a file."""
    unit = "row" if path.suffix == ".parquet" else "line"
    return f"{path} {unit} {number}" if number else str(path)


def read_rows(path: Path, text_mode: TextMode = "lines") -> Iterator[Row]:
    """Read the rows of a file, all of one format, one at a time; blank lines are passed over.

    Args:
        path: of a file that ``find_files`` found.
        text_mode: whether a row of a .txt file is a line, or the file.

    Raises:
        TrainingError: naming the file, the line and what is wrong with it.
    """
    first: Row | None = None
    for number, content in _contents(path, text_mode):
        row = Row(place(path, number), content, number)
        first = first or row
        if format_of(content) != format_of(first.content):
            raise TrainingError(
                f"{row.where}: another format than {first.where}; a file's rows must all be "
                f"{FORMATS}"
            )
        yield row
    if first is None:
        raise TrainingError(f"{path} holds no rows; fill it or leave it out")


def read_text(path: Path) -> Iterator[str]:
    """Read a text file in pieces of about 256 kB that can be tokenised one by one.

    A piece ends with a line that has text before and after its end, because tokenizers part words
    there; where no line ends for long, before a space.

    Raises:
        TrainingError: when it cannot be read, or is not UTF-8, naming the line.
    """
    line = 1
    for piece in _pieces(path):
        try:
            text = piece.decode("utf-8")
        except UnicodeDecodeError as error:
            at = line + piece.count(b"\n", 0, error.start)
            raise TrainingError(f"{place(path, at)}: not UTF-8; save the file as UTF-8") from error
        line += piece.count(b"\n")
        yield text


def _pieces(path: Path) -> Iterator[bytes]:
    with _reading(path) as file:
        rest = file.read(_BLOCK).removeprefix(_BOM)
        while block := file.read(_BLOCK):
            rest += block
            end = _last_break(rest)
            if end:
                yield rest[:end]
                rest = rest[end:]
    if rest:
        yield rest


def _last_break(text: bytes) -> int:
    """Where a piece may end; 0: nowhere yet."""
    end = len(text) - 1
    while (end := text.rfind(b"\n", 1, end)) > 0:
        if not text[end - 1 : end].isspace() and not text[end + 1 : end + 2].isspace():
            return end + 1
    end = len(text)
    while len(text) >= 4 * _BLOCK and (end := text.rfind(b" ", 1, end)) > 0:
        if not text[end - 1 : end].isspace():
            return end
    return 0


def _contents(path: Path, text_mode: TextMode) -> Iterator[tuple[int, Content]]:
    if path.suffix == ".parquet":
        return _parquet_rows(path)
    if path.suffix != ".txt":
        return _json_rows(path)
    return _whole_file(path) if text_mode == "file" else _text_lines(path)


def _json_rows(path: Path) -> Iterator[tuple[int, Content]]:
    for number, line in _lines(path):
        where = place(path, number)
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise TrainingError(f"{where}: not valid JSON: {error}") from error
        if not isinstance(row, dict):
            raise TrainingError(f"{where}: expected a JSON object, found {type(row).__name__}")
        yield number, read_content(where, row)


def _text_lines(path: Path) -> Iterator[tuple[int, Content]]:
    for number, line in _lines(path):
        yield number, Text(line.rstrip("\r\n"))


def _whole_file(path: Path) -> Iterator[tuple[int, Content]]:
    text = "".join(read_text(path))
    if text.strip():
        yield 0, Text(text)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, with their numbers from 1."""
    with _reading(path) as file:
        for number, raw in enumerate(file, start=1):
            line = raw.removeprefix(_BOM) if number == 1 else raw
            if not line.strip():
                continue
            try:
                yield number, line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise TrainingError(
                    f"{place(path, number)}: not UTF-8 (byte {error.start + 1} of the line); save "
                    "the file as UTF-8"
                ) from error


def _parquet_rows(path: Path) -> Iterator[tuple[int, Content]]:
    try:
        from lorax_train.data.parquet import read_parquet
    except ImportError as error:
        raise TrainingError(
            f"{path}: reading Parquet needs pyarrow; pip install 'lorax-serve[parquet]'"
        ) from error
    for number, row in enumerate(read_parquet(path), start=1):
        yield number, read_content(place(path, number), row)


@contextmanager
def _reading(path: Path) -> Iterator[BinaryIO]:
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise TrainingError(f"{path} cannot be read: {error.strerror}") from error
