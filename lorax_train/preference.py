"""Rows of preferences: a prompt, an answer to prefer, and one to avoid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lorax_serve.errors import TrainingError
from lorax_train.base import Tokenizer
from lorax_train.encode import Example, encode_rows
from lorax_train.rows import (
    Message,
    Messages,
    PromptCompletion,
    Row,
    check_messages,
    check_string,
    read_objects,
)

__all__ = ["PreferencePair", "PreferenceRow", "encode_preferences", "read_preferences"]

_FIELDS = ("prompt", "chosen", "rejected")
_UNLIMITED = 1 << 62


@dataclass(frozen=True, slots=True)
class PreferenceRow:
    """One line of a file: the prompt with either answer.

    Attributes:
        where: names it in messages.
        chosen, rejected: the prompt and the answer.
        prompt: its messages, of which earlier answers are read and not compared; empty where the
            prompt is a string.
    """

    where: str
    chosen: Row
    rejected: Row
    prompt: tuple[Message, ...] = ()

    @property
    def content(self) -> object:
        """The chosen answer's; the other has the same form."""
        return self.chosen.content


@dataclass(frozen=True, slots=True)
class PreferencePair(Example):
    """Both answers to one prompt as the model sees them, the chosen before the rejected.

    Attributes:
        chosen_length: tokens of the first, with its prompt.
    """

    chosen_length: int = 0

    @property
    def chosen(self) -> Example:
        """The row to make more likely."""
        end = self.chosen_length
        return Example(self.tokens[:end], self.trained[:end], self.where)

    @property
    def rejected(self) -> Example:
        """The row to make less likely."""
        start = self.chosen_length
        return Example(self.tokens[start:], self.trained[start:], self.where)

    @property
    def rows(self) -> tuple[Example, ...]:
        """Both."""
        return self.chosen, self.rejected

    @property
    def n_targets(self) -> int:
        """The loss is a mean over pairs."""
        return 1


def read_preferences(path: Path) -> list[PreferenceRow]:
    """Read a JSONL file whose rows have ``prompt``, ``chosen`` and ``rejected``: three strings, or
    three lists of messages. Answers are then the messages that follow the prompt's.

    Raises:
        TrainingError: naming the file, the line and what is wrong with it.
    """
    rows: list[PreferenceRow] = []
    for where, row in read_objects(path):
        if sorted(row) != sorted(_FIELDS):
            raise TrainingError(
                f"{where}: found the keys {{{', '.join(map(repr, sorted(row)))}}}; for --objective "
                'dpo a row must have exactly {"prompt", "chosen", "rejected"}'
            )
        if all(isinstance(row[key], str) for key in _FIELDS):
            parsed = _of_strings(where, row)
        elif all(isinstance(row[key], list) for key in _FIELDS):
            parsed = _of_messages(where, row)
        else:
            found = ", ".join(f"{key} is {type(row[key]).__name__}" for key in _FIELDS)
            raise TrainingError(
                f"{where}: prompt, chosen and rejected must be three strings, or three lists of "
                f"messages; {found}"
            )
        if rows and type(parsed.content) is not type(rows[0].content):
            raise TrainingError(
                f"{where}: another format than {rows[0].where}; a file's rows must all be strings "
                "or all be lists of messages"
            )
        if row["chosen"] == row["rejected"]:
            raise TrainingError(f"{where}: chosen and rejected are the same; take the row out")
        rows.append(parsed)
    return rows


def encode_preferences(
    rows: Sequence[PreferenceRow], tokenizer: Tokenizer, max_length: int
) -> tuple[list[PreferencePair], list[str]]:
    """Encode pairs of answers. What is compared is what follows the prompt.

    A pair of which either row is longer than ``max_length`` is left out.

    Returns:
        The pairs, and warnings to show.

    Raises:
        TrainingError: as ``encode_rows``.
    """
    chosen, warnings = encode_rows([row.chosen for row in rows], tokenizer, _UNLIMITED)
    rejected, more = encode_rows([row.rejected for row in rows], tokenizer, _UNLIMITED)
    warnings += [warning for warning in more if warning not in warnings]
    pairs = []
    longest = 0
    for row, *answers in zip(rows, chosen, rejected, strict=True):
        lengths = [len(answer.tokens) for answer in answers]
        longest = max(longest, *lengths)
        if max(lengths) > max_length:
            continue
        messages = [(message.role, message.content) for message in row.prompt]
        start = len(tokenizer.render(messages, answer=True)) if messages else 0
        learned = [
            (*[False] * min(start, n), *answer.trained[start:])
            for answer, n in zip(answers, lengths, strict=True)
        ]
        if not all(map(any, learned)):
            raise TrainingError(f"{row.where}: an answer has no token to learn: it is empty")
        tokens = answers[0].tokens + answers[1].tokens
        pairs.append(PreferencePair(tokens, learned[0] + learned[1], row.where, lengths[0]))
    if not pairs:
        raise TrainingError(
            f"every row is longer than --max-length {max_length} tokens (the longest answer with "
            f"its prompt has {longest}); raise --max-length or shorten the rows"
        )
    if left := len(rows) - len(pairs):
        warnings.append(
            f"{left} of {len(rows)} rows were left out: an answer with its prompt is longer than "
            f"--max-length {max_length} tokens"
        )
    return pairs, warnings


def _of_strings(where: str, row: Mapping[str, object]) -> PreferenceRow:
    prompt, chosen, rejected = (check_string(where, row, key) for key in _FIELDS)
    return PreferenceRow(
        where,
        Row(where, PromptCompletion(prompt, chosen)),
        Row(where, PromptCompletion(prompt, rejected)),
    )


def _of_messages(where: str, row: Mapping[str, object]) -> PreferenceRow:
    prompt, chosen, rejected = (check_messages(where, key, row[key]) for key in _FIELDS)
    for key, answer in (("chosen", chosen), ("rejected", rejected)):
        if not answer or answer[-1].role != "assistant":
            raise TrainingError(f"{where}: {key} must end with an assistant message")
    if prompt and prompt[-1].role == "assistant":
        raise TrainingError(
            f"{where}: prompt ends with an assistant message; move it into chosen and rejected"
        )
    return PreferenceRow(
        where,
        Row(where, Messages(prompt + chosen)),
        Row(where, Messages(prompt + rejected)),
        prompt,
    )
