"""Rows to token ids, each marked as learned or only read.

The marks are positions, never comparisons with a token id: where the padding token is also the EOS
token, as in many base models, the EOS stays a target and the model learns to stop.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import jinja2

from lorax_serve.errors import TrainingError
from lorax_train.base import Tokenizer
from lorax_train.rows import Message, Messages, PromptCompletion, Row, Text

__all__ = ["Example", "encode_rows"]


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


def encode_rows(
    rows: Sequence[Row], tokenizer: Tokenizer, max_length: int
) -> tuple[list[Example], list[str]]:
    """Encode rows, and say what was cut or left out.

    A text is cut at ``max_length``. A row with a completion or with messages is left out instead,
    because the cut would take the end of what it teaches, the EOS token with it.

    Returns:
        The examples, and warnings to show.

    Raises:
        TrainingError: naming the row, when it teaches nothing or its chat template cannot be
            masked; or when no row is short enough.
    """
    examples: list[Example] = []
    counts: Counter[str] = Counter()
    longest = 0
    for row in rows:
        tokens, trained = _encode(row, tokenizer, counts)
        if not any(trained[1:]):
            raise TrainingError(f"{row.where}: no token to learn: the row is empty")
        longest = max(longest, len(tokens))
        if len(tokens) > max_length:
            if not isinstance(row.content, Text):
                counts["dropped"] += 1
                continue
            counts["cut"] += 1
            tokens, trained = tokens[:max_length], trained[:max_length]
        examples.append(Example(tuple(tokens), (False, *trained[1:]), row.where))
    if not examples:
        raise TrainingError(
            f"every row is longer than --max-length {max_length} tokens (the longest has "
            f"{longest}); raise --max-length or shorten the rows"
        )
    return examples, _warnings(counts, len(rows), max_length)


def _warnings(counts: Counter[str], n_rows: int, max_length: int) -> list[str]:
    out = []
    if n := counts["cut"]:
        out.append(f"{n} of {n_rows} rows were cut to --max-length {max_length} tokens")
    if n := counts["dropped"]:
        out.append(
            f"{n} of {n_rows} rows were left out: they are longer than --max-length {max_length} "
            "tokens, and cutting them would cut what they teach"
        )
    if n := counts["endless"]:
        out.append(
            f"the chat template ends {n} assistant turns without an end-of-sequence token, so the "
            "model will not learn to stop there"
        )
    return out


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
        case Messages(messages):
            return _encode_messages(row.where, messages, tokenizer, counts)


def _encode_messages(
    where: str, messages: tuple[Message, ...], tokenizer: Tokenizer, counts: Counter[str]
) -> tuple[list[int], list[bool]]:
    """Mask a conversation by rendering its prefixes; what follows the last answer is left out.

    An assistant turn is what ``messages[:i + 1]`` adds to ``messages[:i]`` with the generation
    prompt, up to its last end-of-sequence token. Both must be prefixes of the whole conversation,
    or what is learned would not be what the model is asked for when it serves.
    """
    turns = [i for i, message in enumerate(messages) if message.role == "assistant"]
    tokens = _render(where, messages[: turns[-1] + 1], tokenizer, answer=False)
    trained = [False] * len(tokens)
    for turn in turns:
        before = _render(where, messages[:turn], tokenizer, answer=True)
        after = _render(where, messages[: turn + 1], tokenizer, answer=False)
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


def _render(
    where: str, messages: tuple[Message, ...], tokenizer: Tokenizer, *, answer: bool
) -> list[int]:
    try:
        return tokenizer.render([(m.role, m.content) for m in messages], answer=answer)
    except (jinja2.TemplateError, ValueError, TypeError, KeyError, IndexError) as error:
        raise TrainingError(
            f"{where}: the chat template refuses messages[:{len(messages)}]: {error}"
        ) from error
