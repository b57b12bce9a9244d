"""What a row of data says, in one of four formats, and the checks of its keys and values.

Knows nothing of files and nothing of tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lorax_serve.errors import TrainingError

__all__ = [
    "FORMATS",
    "Content",
    "Message",
    "Messages",
    "Preference",
    "PromptCompletion",
    "Text",
    "format_of",
    "is_chat",
    "read_content",
]

_ROLES = ("system", "user", "assistant")
FORMATS = (
    '{"text"}, {"prompt", "completion"} or {"messages"}, the last with or without "tools"; for '
    '--objective dpo {"prompt", "chosen", "rejected"}, all strings or all lists of messages'
)
_PREFERENCE = ("prompt", "chosen", "rejected")


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
    """A conversation of which the assistant's turns are learned.

    Attributes:
        messages: the turns.
        tools: descriptions of functions, as the chat template takes them; read, never learned.
    """

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Preference:
    """An answer to prefer and one to avoid, after the same prompt.

    Attributes:
        chosen, rejected: the prompt and the answer, both of one form.
        prompt: its messages, of which earlier answers are read and not compared; empty where the
            prompt is a string.
    """

    chosen: PromptCompletion | Messages
    rejected: PromptCompletion | Messages
    prompt: tuple[Message, ...] = ()


Content = Text | PromptCompletion | Messages | Preference


def format_of(content: Content) -> tuple[type, ...]:
    """Equal for contents that may be in one file."""
    if isinstance(content, Preference):
        return Preference, type(content.chosen)
    return (type(content),)


def is_chat(content: Content) -> bool:
    """Whether a chat template must render it."""
    return Messages in format_of(content)


def read_content(where: str, row: Mapping[str, object]) -> Content:
    """Check a row and tell its format by its keys.

    Args:
        where: names the row in messages.
        row: as it was read.

    Raises:
        TrainingError: naming the row, the key and what is wrong with it.
    """
    match sorted(row):
        case ["text"]:
            return Text(_string(where, row, "text"))
        case ["completion", "prompt"]:
            completion = _string(where, row, "completion")
            if not completion:
                raise TrainingError(
                    f"{where}: no token to learn: the completion is empty; fill it or take the "
                    "row out"
                )
            return PromptCompletion(_string(where, row, "prompt"), completion)
        case ["messages"] | ["messages", "tools"]:
            messages = _conversation(where, row["messages"])
            return Messages(messages, _tools(where, row["tools"]) if "tools" in row else ())
        case ["chosen", "prompt", "rejected"]:
            return _preference(where, row)
        case keys:
            raise TrainingError(
                f"{where}: found the keys {{{', '.join(map(repr, keys))}}}; a row must have "
                f"exactly {FORMATS}"
            )


def _preference(where: str, row: Mapping[str, object]) -> Preference:
    if row["chosen"] == row["rejected"]:
        raise TrainingError(f"{where}: chosen and rejected are the same; take the row out")
    if all(isinstance(row[key], str) for key in _PREFERENCE):
        text, good, bad = (_string(where, row, key) for key in _PREFERENCE)
        return Preference(PromptCompletion(text, good), PromptCompletion(text, bad))
    if not all(isinstance(row[key], list) for key in _PREFERENCE):
        found = ", ".join(f"{key} is {type(row[key]).__name__}" for key in _PREFERENCE)
        raise TrainingError(
            f"{where}: prompt, chosen and rejected must be three strings, or three lists of "
            f"messages; {found}"
        )
    prompt, chosen, rejected = (_messages(where, key, row[key]) for key in _PREFERENCE)
    for key, answer in (("chosen", chosen), ("rejected", rejected)):
        if not answer or answer[-1].role != "assistant":
            raise TrainingError(f"{where}: {key} must end with an assistant message")
    if prompt and prompt[-1].role == "assistant":
        raise TrainingError(
            f"{where}: prompt ends with an assistant message; move it into chosen and rejected"
        )
    return Preference(Messages(prompt + chosen), Messages(prompt + rejected), prompt)


def _conversation(where: str, value: object) -> tuple[Message, ...]:
    messages = _messages(where, "messages", value)
    answers = [message.content for message in messages if message.role == "assistant"]
    if not answers:
        raise TrainingError(
            f"{where}: no assistant message, so there is nothing to learn; add the answer or take "
            "the row out"
        )
    if not any(answers):
        raise TrainingError(
            f"{where}: no token to learn: the assistant's messages are empty; fill them or take "
            "the row out"
        )
    return messages


def _messages(where: str, key: str, value: object) -> tuple[Message, ...]:
    if not isinstance(value, list):
        raise TrainingError(f"{where}: {key} must be a list, found {type(value).__name__}")
    messages = []
    for index, item in enumerate(value):
        place = f"{where}: {key}[{index}]"
        if not isinstance(item, dict) or item.keys() != {"role", "content"}:
            raise TrainingError(f'{place} must be an object with exactly "role" and "content"')
        role = _string(place, item, "role")
        if role not in _ROLES:
            raise TrainingError(f"{place}: role must be one of {', '.join(_ROLES)}, not {role!r}")
        messages.append(Message(role, _string(place, item, "content")))
    return tuple(messages)


def _tools(where: str, value: object) -> tuple[Mapping[str, Any], ...]:
    """A list of functions' descriptions, or the same as a string of JSON, which is how columnar
    files keep what has no one schema."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise TrainingError(f"{where}: tools is a string but not JSON: {error}") from error
    if not isinstance(value, list):
        raise TrainingError(f"{where}: tools must be a list, found {type(value).__name__}")
    for index, tool in enumerate(value):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or not name:
            raise TrainingError(
                f"{where}: tools[{index}] must be an object that describes a function: "
                '{"type": "function", "function": {"name": ..., "parameters": ...}}'
            )
    return tuple(value)


def _string(where: str, row: Mapping[str, object], key: str) -> str:
    value = row[key]
    if not isinstance(value, str):
        raise TrainingError(f"{where}: {key} must be a string, found {type(value).__name__}")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise TrainingError(f"{where}: {key} holds half of a surrogate pair") from error
    return value
