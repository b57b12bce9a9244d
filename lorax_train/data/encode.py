"""Rows to token ids, each marked as learned or only read.

The marks are positions, never comparisons with a token id: where the padding token is also the EOS
token, as in many base models, the EOS stays a target and the model learns to stop.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import jinja2

from lorax_serve.errors import TrainingError
from lorax_train.data.content import Messages, Preference, PromptCompletion, Text
from lorax_train.data.rows import Row
from lorax_train.data.tokenizer import Tokenizer

__all__ = ["Encoder", "Example", "encode_rows", "render"]


@dataclass(frozen=True, slots=True)
class Example:
    """One row as the model sees it.

    Attributes:
        tokens: token ids.
        trained: for each token whether the model learns to produce it. Never the first one, which
            nothing comes before.
        where: the row's file and line.
    """

    tokens: tuple[int, ...]
    trained: tuple[bool, ...]
    where: str

    @property
    def n_targets(self) -> int:
        """How many tokens are learned."""
        return sum(self.trained)

    @property
    def rows(self) -> tuple[Example, ...]:
        """What goes through the model."""
        return (self,)


class Encoder:
    """Turns rows into examples one at a time, and counts what it cuts or leaves out.

    A text is cut at ``max_length``. A row with a completion or with messages is left out instead,
    because the cut would take the end of what it teaches, the EOS token with it.

    Args:
        tokenizer: of the base model.
        max_length: most tokens in an example.
    """

    def __init__(self, tokenizer: Tokenizer, max_length: int) -> None:
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._counts: Counter[str] = Counter()
        self._longest = 0

    def encode(self, row: Row) -> Example | None:
        """The row as the model sees it; None if it is left out.

        Raises:
            TrainingError: naming the row, when it teaches nothing or its chat template cannot be
                masked.
        """
        counts, limit = self._counts, self._max_length
        tokens, trained = _encode(row, self._tokenizer, counts)
        if not any(trained[1:]):
            raise TrainingError(
                f"{row.where}: no token to learn: the row is empty; fill it or take the row out"
            )
        counts["rows"] += 1
        self._longest = max(self._longest, len(tokens))
        if len(tokens) > limit:
            if not isinstance(row.content, Text):
                counts["dropped"] += 1
                return None
            counts["cut"] += 1
            tokens, trained = tokens[:limit], trained[:limit]
        return Example(tuple(tokens), (False, *trained[1:]), row.where)

    def finish(self) -> list[str]:
        """What to warn of, once all rows are encoded.

        Raises:
            TrainingError: no row was short enough.
        """
        counts, limit = self._counts, self._max_length
        n_rows = counts["rows"]
        if n_rows == counts["dropped"]:
            raise TrainingError(
                f"every row is longer than --max-length {limit} tokens (the longest has "
                f"{self._longest}); raise --max-length or shorten the rows"
            )
        out = []
        if n := counts["cut"]:
            out.append(f"{n} of {n_rows} rows were cut to --max-length {limit} tokens")
        if n := counts["dropped"]:
            out.append(
                f"{n} of {n_rows} rows were left out: they are longer than --max-length {limit} "
                "tokens, and cutting them would cut what they teach"
            )
        if n := counts["endless"]:
            out.append(
                f"the chat template ends {n} assistant turns without an end-of-sequence token, so "
                "the model will not learn to stop there"
            )
        return out


def encode_rows(
    rows: Iterable[Row], tokenizer: Tokenizer, max_length: int
) -> tuple[list[Example], list[str]]:
    """All rows' examples in memory, and what to warn of; see ``Encoder``."""
    encoder = Encoder(tokenizer, max_length)
    examples = [example for row in rows if (example := encoder.encode(row)) is not None]
    return examples, encoder.finish()


def _encode(row: Row, tokenizer: Tokenizer, counts: Counter[str]) -> tuple[list[int], list[bool]]:
    match row.content:
        case Text(text):
            tokens = tokenizer.encode(text, special=True)
            if tokens[-1:] != [tokenizer.eos_id]:  # some tokenizers append it themselves
                tokens.append(tokenizer.eos_id)
            return tokens, [True] * len(tokens)
        case PromptCompletion(prompt, completion):
            # Apart, as the server will see the prompt: no token may span both.
            read = tokenizer.encode(prompt, special=True)
            learned = [*tokenizer.encode(completion, special=False), tokenizer.eos_id]
            return read + learned, [False] * len(read) + [True] * len(learned)
        case Messages():
            return _encode_messages(row.where, row.content, tokenizer, counts)
        case Preference():
            raise TrainingError(f"{row.where}: a row of preferences; add --objective dpo")


def _encode_messages(
    where: str, chat: Messages, tokenizer: Tokenizer, counts: Counter[str]
) -> tuple[list[int], list[bool]]:
    """Mask a conversation by rendering its prefixes; what follows the last answer is left out.

    An assistant turn is what ``messages[:i + 1]`` adds to ``messages[:i]`` with the generation
    prompt, up to its last end-of-sequence token. Both must be prefixes of the whole conversation,
    or what is learned would not be what the model is asked for when it serves.
    """
    turns = [i for i, message in enumerate(chat.messages) if message.role == "assistant"]
    tokens = render(where, chat, turns[-1] + 1, tokenizer, answer=False)
    trained = [False] * len(tokens)
    for turn in turns:
        before = render(where, chat, turn, tokenizer, answer=True)
        after = render(where, chat, turn + 1, tokenizer, answer=False)
        if (
            tokens[: len(before)] != before
            or tokens[: len(after)] != after
            or len(before) >= len(after)
        ):
            raise TrainingError(
                f"{where}: messages[{turn}] cannot be masked: the chat template renders the "
                "conversation up to it differently from the whole; end the row with its only "
                "assistant message, or use prompt and completion rows"
            )
        stops = [i for i in range(len(before), len(after)) if after[i] in tokenizer.stop_ids]
        counts["endless"] += not stops
        end = stops[-1] + 1 if stops else len(after)
        trained[len(before) : end] = [True] * (end - len(before))
    return tokens, trained


def render(
    where: str, chat: Messages, count: int, tokenizer: Tokenizer, *, answer: bool
) -> list[int]:
    """Token ids of the first ``count`` messages; ``answer`` opens the assistant's next turn.

    Raises:
        TrainingError: naming the row, when the chat template refuses them.
    """
    messages = [(message.role, message.content) for message in chat.messages[:count]]
    try:
        return tokenizer.render(messages, answer=answer, tools=chat.tools)
    except (jinja2.TemplateError, ValueError, TypeError, KeyError, IndexError) as error:
        raise TrainingError(
            f"{where}: the chat template refuses messages[:{count}]: {error}"
        ) from error
