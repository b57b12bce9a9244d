"""JSONL files: rows of one format, each checked, with the line that it came from.

Knows nothing of tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from lorax_serve.errors import TrainingError

__all__ = [
    "Message",
    "Messages",
    "PromptCompletion",
    "Row",
    "Text",
    "check_messages",
    "check_string",
    "read_objects",
    "read_rows",
]

_ROLES = ("system", "user", "assistant")
_FORMATS = '{"text"}, {"prompt", "completion"} or {"messages"}'


@dataclass(frozen=True, slots=True)
class Text:
    """A text of which everything is learned."""

    text: str


@dataclass(frozen=True, slots=True)
class PromptCompletion:
    """A completion to learn, and the prompt that it follows."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation; the role is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Messages:
    """A conversation of which the assistant's turns are learned."""

    messages: tuple[Message, ...]


Content = Text | PromptCompletion | Messages


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a file. ``where`` names it in messages: ``train.jsonl line 3``."""

    where: str
    content: Content


def read_rows(path: Path) -> list[Row]:
    """Read a JSONL file whose rows all have the same format; blank lines are passed over.

    Raises:
        TrainingError: naming the file, the line and what is wrong with it.
    """
    rows: list[Row] = []
    for where, row in read_objects(path):
        content = _content(where, row)
        if rows and type(content) is not type(rows[0].content):
            raise TrainingError(
                f"{where}: another format than {rows[0].where}; a file's rows must all be "
                f"{_FORMATS}"
            )
        rows.append(Row(where, content))
    return rows


def read_objects(path: Path) -> Iterator[tuple[str, Mapping[str, object]]]:
    """The JSON objects of a JSONL file, each with what names it; blank lines are passed over.

    Raises:
        TrainingError: naming the file, the line and what is wrong with it; or when there is none.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise TrainingError(f"{path} cannot be read: {error.strerror}") from error
    empty = True
    for number, line in enumerate(raw.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        yield where, _parse(where, line)
        empty = False
    if empty:
        raise TrainingError(f"{path} holds no rows")


def _parse(where: str, line: bytes) -> Mapping[str, object]:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise TrainingError(
            f"{where}: not UTF-8 (byte {error.start + 1} of the line); save the file as UTF-8"
        ) from error
    except (ValueError, RecursionError) as error:
        raise TrainingError(f"{where}: not valid JSON: {error}") from error
    if not isinstance(row, dict):
        raise TrainingError(f"{where}: expected a JSON object, found {type(row).__name__}")
    return row


def _content(where: str, row: Mapping[str, object]) -> Content:
    match sorted(row):
        case ["text"]:
            return Text(check_string(where, row, "text"))
        case ["completion", "prompt"]:
            return PromptCompletion(
                check_string(where, row, "prompt"), check_string(where, row, "completion")
            )
        case ["messages"]:
            return _messages(where, row["messages"])
        case ["chosen", "prompt", "rejected"]:
            raise TrainingError(f"{where}: a row of preferences; add --objective dpo")
        case keys:
            raise TrainingError(
                f"{where}: found the keys {{{', '.join(map(repr, keys))}}}; a row must have "
                f"exactly {_FORMATS}"
            )


def _messages(where: str, value: object) -> Messages:
    messages = check_messages(where, "messages", value)
    if not any(message.role == "assistant" for message in messages):
        raise TrainingError(f"{where}: no assistant message, so there is nothing to learn")
    return Messages(messages)


def check_messages(where: str, key: str, value: object) -> tuple[Message, ...]:
    """The messages in a row's field.

    Raises:
        TrainingError: naming the message.
    """
    if not isinstance(value, list):
        raise TrainingError(f"{where}: {key} must be a list, found {type(value).__name__}")
    messages = []
    for index, item in enumerate(value):
        place = f"{where}: {key}[{index}]"
        if not isinstance(item, dict) or item.keys() != {"role", "content"}:
            raise TrainingError(f'{place} must be an object with exactly "role" and "content"')
        role = check_string(place, item, "role")
        if role not in _ROLES:
            raise TrainingError(f"{place}: role must be one of {', '.join(_ROLES)}, not {role!r}")
        messages.append(Message(role, check_string(place, item, "content")))
    return tuple(messages)


def check_string(where: str, row: Mapping[str, object], key: str) -> str:
    """The text in a row's field.

    Raises:
        TrainingError: when it is none, or cannot be written as UTF-8.
    """
    value = row[key]
    if not isinstance(value, str):
        raise TrainingError(f"{where}: {key} must be a string, found {type(value).__name__}")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise TrainingError(f"{where}: {key} holds half of a surrogate pair") from error
    return value
