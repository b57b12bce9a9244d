"""Rows of preferences to pairs of token ids: an answer to prefer, and one to avoid."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lorax_serve.errors import TrainingError
from lorax_train.data.content import Messages, Preference
from lorax_train.data.encode import Encoder, Example, render
from lorax_train.data.rows import Row
from lorax_train.data.tokenizer import Tokenizer

__all__ = ["PreferenceEncoder", "PreferencePair", "encode_preferences"]

_UNLIMITED = 1 << 62


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


class PreferenceEncoder:
    """Turns rows of preferences into pairs one at a time, and counts what it leaves out.

    What is compared is what follows the prompt. A pair of which either row is longer than
    ``max_length`` is left out.

    Args:
        tokenizer: of the base model.
        max_length: most tokens in an answer with its prompt.
    """

    def __init__(self, tokenizer: Tokenizer, max_length: int) -> None:
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._answers = Encoder(tokenizer, _UNLIMITED)
        self._rows = self._left_out = self._longest = 0

    def encode(self, row: Row) -> PreferencePair | None:
        """The pair as the model sees it; None if it is left out.

        Raises:
            TrainingError: naming the row, when it is no preference, an answer is empty, or its chat
                template cannot be masked.
        """
        content = row.content
        if not isinstance(content, Preference):
            raise TrainingError(
                f"{row.where}: no row of preferences; for --objective dpo a row must have exactly "
                '{"prompt", "chosen", "rejected"}'
            )
        answers = []
        for answer in (content.chosen, content.rejected):
            example = self._answers.encode(Row(row.where, answer))
            assert example is not None  # nothing is too long
            answers.append(example)
        chosen, rejected = answers
        longest = max(len(answer.tokens) for answer in answers)
        self._rows += 1
        self._longest = max(self._longest, longest)
        if longest > self._max_length:
            self._left_out += 1
            return None
        start = self._prompt_length(row.where, content)
        learned = [
            (*[False] * start, *each.trained[start:])[: len(each.tokens)] for each in answers
        ]
        if not all(map(any, learned)):
            raise TrainingError(f"{row.where}: an answer has no token to learn: it is empty")
        return PreferencePair(
            chosen.tokens + rejected.tokens,
            learned[0] + learned[1],
            row.where,
            chosen_length=len(chosen.tokens),
        )

    def finish(self) -> list[str]:
        """What to warn of, once all rows are encoded.

        Raises:
            TrainingError: no pair was short enough.
        """
        limit = self._max_length
        if self._rows == self._left_out:
            raise TrainingError(
                f"every row is longer than --max-length {limit} tokens (the longest answer with "
                f"its prompt has {self._longest}); raise --max-length or shorten the rows"
            )
        warnings = self._answers.finish()
        if self._left_out:
            warnings.append(
                f"{self._left_out} of {self._rows} rows were left out: an answer with its prompt "
                f"is longer than --max-length {limit} tokens"
            )
        return warnings

    def _prompt_length(self, where: str, content: Preference) -> int:
        """Tokens of a prompt of messages; a string is never learned anyway."""
        if not isinstance(content.chosen, Messages) or not content.prompt:
            return 0
        count = len(content.prompt)
        return len(render(where, content.chosen, count, self._tokenizer, answer=True))


def encode_preferences(
    rows: Iterable[Row], tokenizer: Tokenizer, max_length: int
) -> tuple[list[PreferencePair], list[str]]:
    """All rows' pairs in memory, and what to warn of; see ``PreferenceEncoder``."""
    encoder = PreferenceEncoder(tokenizer, max_length)
    pairs = [pair for row in rows if (pair := encoder.encode(row)) is not None]
    return pairs, encoder.finish()
