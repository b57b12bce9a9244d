"""Between text and tokens: prompts in, whole characters out, stop sequences in between."""

from __future__ import annotations

import json
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from lorax_serve.core import ChatMessage
from lorax_serve.errors import InvalidRequest, ModelUnsupported

__all__ = ["Detokenizer", "StopMatcher", "Tokenizer"]

_INCOMPLETE = "\ufffd"
_CONTEXT = 6
_PLAIN_CLASSES = ("TokenizersBackend", "PreTrainedTokenizerFast")


class Tokenizer:
    """A model's tokenizer, as transformers loads it.

    Args:
        directory: the model's directory.

    Raises:
        ModelUnsupported: the directory has no tokenizer that transformers can load.
    """

    def __init__(self, directory: str | PathLike[str]) -> None:
        try:
            loader: Any = _loader(directory)
            self._tokenizer: Any = loader.from_pretrained(directory, local_files_only=True)
        except (OSError, ValueError) as error:
            raise ModelUnsupported(f"{directory} has no usable tokenizer: {error}") from error
        self.special_ids: frozenset[int] = frozenset(self._tokenizer.all_special_ids)

    def encode(self, prompt: str | Sequence[int] | Sequence[ChatMessage]) -> list[int]:
        """Token ids of a prompt; chat messages go through the chat template, ids as they are.

        Raises:
            InvalidRequest: the prompt is empty, or the model has no chat template, or it refuses
                these messages.
        """
        if isinstance(prompt, str):
            ids: list[int] = self._tokenizer(prompt)["input_ids"]
        elif prompt and isinstance(prompt[0], ChatMessage):
            ids = self._encode_chat(prompt)
        else:
            ids = list(prompt)  # type: ignore[arg-type]
        if not ids:
            raise InvalidRequest(
                "prompt is empty: the model needs at least one token to go on from"
            )
        return ids

    def _encode_chat(self, messages: Sequence[Any]) -> list[int]:
        if not self._tokenizer.chat_template:
            raise InvalidRequest("chat: this model has no chat template; send a text prompt")
        try:
            text = self._tokenizer.apply_chat_template(
                [{"role": role, "content": content} for role, content in messages],
                tokenize=False,
                add_generation_prompt=True,
            )
        except Exception as error:  # templates raise whatever they like on roles they refuse
            raise InvalidRequest(f"chat: the chat template refuses these messages: {error}") from (
                error
            )
        # The template has written the special tokens itself.
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids`` without special tokens."""
        text: str = self._tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def piece(self, token_id: int) -> str:
        """One token as the vocabulary spells it, special tokens included."""
        piece = self._tokenizer.convert_ids_to_tokens(token_id)
        return piece if isinstance(piece, str) else ""


def _loader(directory: str | PathLike[str]) -> Any:
    """The class that reads this tokenizer.

    Where its files name a plain one, it is imported alone: the search through all models brings
    torch with it, seconds of start-up and memory that the server has no other use for.
    """
    try:
        settings = json.loads(Path(directory, "tokenizer_config.json").read_text())
    except (OSError, ValueError):
        settings = {}  # AutoTokenizer says what is wrong
    if settings.get("tokenizer_class") in _PLAIN_CLASSES and "auto_map" not in settings:
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast
    from transformers import AutoTokenizer

    return AutoTokenizer


class Detokenizer:
    """Text of a growing sequence of tokens, in whole characters.

    A token may hold part of a character, and how it decodes may depend on the tokens before it. So
    a window of the last tokens is decoded with and without the new ones; their difference is new
    text, held back while it ends in an incomplete character.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        # A few prompt tokens give the decoder its context (the space before a first word). They
        # must not begin inside a character: with byte tokens, all of a broken run is unreadable.
        first = max(0, len(prompt) - _CONTEXT)
        while first > max(0, len(prompt) - _CONTEXT - 3):
            if not tokenizer.decode(prompt[first:]).startswith(_INCOMPLETE):
                break
            first -= 1
        self._ids = list(prompt[first:])
        self._start = 0
        self._read = len(self._ids)

    def push(self, token_id: int) -> str:
        """Add a token; returns the text that has become certain, perhaps none."""
        if token_id in self._tokenizer.special_ids:
            return ""  # no text; kept, a run of them would only make the window grow
        self._ids.append(token_id)
        before = self._tokenizer.decode(self._ids[self._start : self._read])
        after = self._tokenizer.decode(self._ids[self._start :])
        if not after.startswith(before):  # a prompt's last character was completed just now
            before = before.rstrip(_INCOMPLETE)
        if len(after) <= len(before) or after.endswith(_INCOMPLETE):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return after[len(before) :]


class StopMatcher:
    """Finds the first stop sequence in a stream of text, and lets no part of one slip out.

    Args:
        stops: the stop sequences.
        include: whether the emitted text ends with the one that matched.
    """

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        self._stops = stops
        self._include = include
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """Add text. Returns what may be shown now, and the stop sequence that was found, if any."""
        if not self._stops:
            return text, None
        text = self._held + text
        found = [(text.find(stop), stop) for stop in self._stops if stop in text]
        if found:
            # The first to be complete, whatever chunks the text comes in; of those, the longest.
            at, stop = min(found, key=lambda each: (each[0] + len(each[1]), each[0]))
            self._held = ""
            return text[: at + len(stop) if self._include else at], stop
        keep = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], None

    def flush(self) -> str:
        """What was held back, when no more text will come."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a proper beginning of ``stop``."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if stop.startswith(text[-n:])), 0)
