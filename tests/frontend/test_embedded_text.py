"""Tokens of the embedded model's own vocabulary become text in whole characters."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lorax_serve.core import ChatMessage
from lorax_serve.errors import InvalidRequest
from lorax_serve.frontend.text import Detokenizer, StopMatcher, Tokenizer

TEXTS = [
    "The quick brown fox; it jumps, doesn't it?  Yes.\n\n\tNo .",
    "def f(x):\n    return x ** 2  # squared\n",
    "naïve café Ærøskøbing ß",
    "日本語のテキスト、中文，한국어",
    "Привет, мир! שלום عالم नमस्ते ไทย",
    "👍🏽 👨‍👩‍👧‍👦 🇩🇪🏴󠁧󠁢󠁥󠁮󠁧󠁿 ok😀",
    "e\u0301 a\u200bb \u00a0 \u2028 end",
    " leading and trailing ",
    "\x00\x01\x7f",
    "𒀀𝔘𝔫𝔦𝔠𝔬𝔡𝔢",
]

# Hypothesis and fixtures of a function's scope do not go together.
_TOKENIZERS: list[Tokenizer] = []


@pytest.fixture(scope="module", autouse=True)
def _tokenizer(embedded_model: Path) -> None:
    _TOKENIZERS[:] = [Tokenizer(embedded_model)]


def pieces_of(text: str, prompt: str = "") -> list[str]:
    """What a detokenizer says after each token of ``text``."""
    (tokenizer,) = _TOKENIZERS
    detokenizer = Detokenizer(tokenizer, tokenizer.encode(prompt) if prompt else [])
    return [detokenizer.push(token) for token in tokenizer.encode(text)]


@pytest.mark.parametrize("prompt", ["", "Say: ", "語", "😀 and a long prompt before it"])
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_make_up_the_full_decode(text: str, prompt: str) -> None:
    (tokenizer,) = _TOKENIZERS
    pieces = pieces_of(text, prompt)
    assert "".join(pieces) == tokenizer.decode(tokenizer.encode(text)) == text
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("character", ["𒀀", "🏴", "ↂ", "👨‍👩‍👧"])
def test_characters_of_several_tokens(character: str) -> None:
    """Nothing appears before a character is whole; nothing of it is held back after."""
    (tokenizer,) = _TOKENIZERS
    tokens = tokenizer.encode(character)
    assert len(tokens) > 1
    pieces = pieces_of(character, "x")
    shown = ""
    for n, piece in enumerate(pieces, 1):
        shown += piece
        assert shown == tokenizer.decode(tokens[:n]).rstrip("\ufffd")


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.text(st.characters(exclude_characters="\ufffd", exclude_categories=["Cs"]), min_size=1),
    st.sampled_from(["", "x", "語"]),
)
def test_any_text(text: str, prompt: str) -> None:
    (tokenizer,) = _TOKENIZERS
    # The vocabulary lacks a few bytes, of control characters say; no tokens bring those back.
    try:
        tokens = tokenizer.encode(text)
    except InvalidRequest:
        tokens = []
    assume(tokenizer.decode(tokens) == text)
    pieces = pieces_of(text, prompt)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 49151), min_size=1, max_size=30))
def test_any_tokens(tokens: list[int]) -> None:
    """A model may produce bytes that are no text: what is shown is a part of the full decode."""
    (tokenizer,) = _TOKENIZERS
    detokenizer = Detokenizer(tokenizer, [])
    shown = ""
    for n, token in enumerate(tokens, 1):
        shown += detokenizer.push(token)
        full = tokenizer.decode(tokens[:n])
        if "\ufffd" not in full:
            assert shown == full
    assert not shown.endswith("\ufffd")


def test_special_tokens_in_between_are_not_text() -> None:
    (tokenizer,) = _TOKENIZERS
    ids = [*tokenizer.encode("one 😀"), *tokenizer.encode("<|im_end|>"), *tokenizer.encode(" two")]
    assert len(tokenizer.encode("<|im_end|>")) == 1
    detokenizer = Detokenizer(tokenizer, [])
    assert "".join(detokenizer.push(token) for token in ids) == "one 😀 two"


def test_stop_sequence_over_several_tokens() -> None:
    matcher = StopMatcher(["😀 fin"])
    shown = [matcher.push(piece) for piece in pieces_of("go 😀 fine")]
    assert "".join(text for text, _ in shown if text) == "go "
    assert [stop for _, stop in shown if stop] == ["😀 fin"]


def test_chat_prompt_has_the_templates_special_tokens_once() -> None:
    (tokenizer,) = _TOKENIZERS
    ids = tokenizer.encode((ChatMessage("user", "Hi"),))
    pieces = [tokenizer.piece(token) for token in ids]
    assert pieces.count("<|im_start|>") == pieces.count("<|im_end|>") + 1
    assert pieces[0] == "<|im_start|>"
    assert tokenizer.decode(ids).endswith("assistant\n")
