"""Prompts to tokens, tokens to whole characters, and stop sequences in between."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorax_serve.core import ChatMessage
from lorax_serve.errors import InvalidRequest, ModelUnsupported
from lorax_serve.frontend.text import Detokenizer, StopMatcher, Tokenizer
from tests.frontend.toy_tokenizers import (
    EOS,
    WORDS,
    save_byte_tokenizer,
    save_fallback_tokenizer,
    save_word_tokenizer,
)

# Hypothesis and fixtures of a function's scope do not go together.
_TOKENIZERS: dict[str, Tokenizer] = {}


@pytest.fixture(scope="module", autouse=True)
def _tokenizers(tmp_path_factory: pytest.TempPathFactory) -> None:
    _TOKENIZERS["bytes"] = Tokenizer(save_byte_tokenizer(tmp_path_factory.mktemp("bytes")))
    _TOKENIZERS["fallback"] = Tokenizer(
        save_fallback_tokenizer(tmp_path_factory.mktemp("fallback"))
    )
    _TOKENIZERS["words"] = Tokenizer(save_word_tokenizer(tmp_path_factory.mktemp("words")))


def pieces_of(text: str, prompt: str = "") -> list[str]:
    """What a detokenizer says after each byte of ``text``."""
    tokenizer = _TOKENIZERS["bytes"]
    detokenizer = Detokenizer(tokenizer, tokenizer.encode(prompt) if prompt else [])
    return [detokenizer.push(token) for token in tokenizer.encode(text)]


def test_words_keep_the_spaces_between_them() -> None:
    tokenizer = _TOKENIZERS["words"]
    detokenizer = Detokenizer(tokenizer, tokenizer.encode("one two"))
    pieces = [detokenizer.push(token) for token in tokenizer.encode("three four")]
    assert pieces == [" three", " four"]


def test_special_tokens_are_not_text() -> None:
    tokenizer = _TOKENIZERS["words"]
    detokenizer = Detokenizer(tokenizer, [])
    assert [detokenizer.push(token) for token in (WORDS.index("one"), EOS)] == ["one", ""]
    assert tokenizer.piece(EOS) == "</s>"
    assert tokenizer.piece(10_000) == ""


@pytest.mark.parametrize("character", ["ä", "€", "語", "😀"])
def test_a_character_appears_with_its_last_byte(character: str) -> None:
    size = len(character.encode())
    assert pieces_of(f"a{character}b") == ["a", *[""] * (size - 1), character, "b"]


def test_emoji_of_several_characters() -> None:
    family = "👨‍👩‍👧"
    assert "".join(pieces_of(family)) == family


def test_an_unfinished_character_is_never_shown() -> None:
    tokenizer = _TOKENIZERS["bytes"]
    detokenizer = Detokenizer(tokenizer, [])
    pieces = [detokenizer.push(token) for token in tokenizer.encode("ok😀")[:-1]]
    assert "".join(pieces) == "ok"


@given(st.text(st.characters(exclude_characters="\ufffd", exclude_categories=["Cs"]), min_size=1))
def test_pieces_make_up_the_text(text: str) -> None:
    pieces = pieces_of(text, prompt="before: ")
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("kind", ["bytes", "fallback"])
@pytest.mark.parametrize("prompt", ["", "a", "😀", "😀😀", "x😀😀", "語語語", "é語😀", "a語bc"])
@pytest.mark.parametrize("text", ["😀b", "語😀", "b😀"])
def test_what_the_prompt_ends_with_does_not_matter(kind: str, prompt: str, text: str) -> None:
    tokenizer = _TOKENIZERS[kind]
    detokenizer = Detokenizer(tokenizer, tokenizer.encode(prompt) if prompt else [])
    assert "".join(detokenizer.push(token) for token in tokenizer.encode(text)) == text


@pytest.mark.parametrize("kind", ["bytes", "fallback"])
@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_character_that_the_prompt_begins_is_completed(kind: str, cut: int) -> None:
    tokenizer = _TOKENIZERS[kind]
    ids = tokenizer.encode("so😀on")
    detokenizer = Detokenizer(tokenizer, ids[: 2 + cut])
    assert "".join(detokenizer.push(token) for token in ids[2 + cut :]) == "😀on"


def run(matcher: StopMatcher, chunks: list[str]) -> tuple[str, str | None]:
    """All that is emitted, and the stop sequence that was found."""
    shown = ""
    for chunk in chunks:
        text, stop = matcher.push(chunk)
        shown += text
        if stop is not None:
            return shown, stop
    return shown + matcher.flush(), None


def test_a_stop_sequence_may_span_chunks() -> None:
    matcher = StopMatcher(["END"])
    assert matcher.push("one E") == ("one ", None)
    assert matcher.push("N") == ("", None)
    assert matcher.push("Dless") == ("", "END")


def test_what_only_looked_like_one_is_shown() -> None:
    matcher = StopMatcher(["END"])
    assert matcher.push("E") == ("", None)
    assert matcher.push("Nough") == ("ENough", None)
    assert matcher.push(" EN") == (" ", None)
    assert matcher.flush() == "EN"
    assert matcher.flush() == ""


def test_the_sequence_itself_is_shown_if_asked_for() -> None:
    assert run(StopMatcher(["END"], include=True), ["one EN", "D two"]) == ("one END", "END")


def test_the_first_to_be_complete_wins() -> None:
    assert run(StopMatcher(["two", "one"]), ["zero one two"]) == ("zero ", "one")
    assert run(StopMatcher(["b", "ab"]), ["xab"]) == ("x", "ab")
    assert run(StopMatcher(["abc", "b"]), ["abc"]) == ("a", "b")


def test_without_stop_sequences_nothing_is_held_back() -> None:
    matcher = StopMatcher([])
    assert matcher.push("anything") == ("anything", None)


def first_stop(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """What ``run`` must give, by looking at the text one character at a time."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            stop = max(complete, key=len)
            return (text[:end] if include else text[: end - len(stop)]), stop
    return text, None


@given(
    text=st.text("ab", max_size=30),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=4),
    cuts=st.lists(st.integers(0, 30)),
    include=st.booleans(),
)
def test_the_cuts_between_chunks_do_not_matter(
    text: str, stops: list[str], cuts: list[int], include: bool
) -> None:
    bounds = [0, *sorted(cut for cut in cuts if cut <= len(text)), len(text)]
    chunks = [text[start:end] for start, end in pairwise(bounds)]
    assert run(StopMatcher(stops, include), chunks) == first_stop(text, stops, include)


def test_prompts() -> None:
    tokenizer = _TOKENIZERS["words"]
    assert tokenizer.encode("one") == [WORDS.index("one")]
    assert tokenizer.encode((3, 1)) == [3, 1]
    chat = tokenizer.encode((ChatMessage("system", "one"), ChatMessage("user", "two")))
    assert " ".join(WORDS[token] for token in chat) == (
        "<s> system one </s> <s> user two </s> <s> assistant"
    )


def test_prompts_that_are_refused(tmp_path: Path) -> None:
    tokenizer = _TOKENIZERS["words"]
    for empty in ("", ()):
        with pytest.raises(InvalidRequest, match="prompt is empty"):
            tokenizer.encode(empty)
    with pytest.raises(InvalidRequest, match="chat template refuses these messages: no robots"):
        tokenizer.encode((ChatMessage("robot", "beep"),))
    plain = Tokenizer(save_word_tokenizer(tmp_path, chat=False))
    with pytest.raises(InvalidRequest, match="no chat template"):
        plain.encode((ChatMessage("user", "one"),))


def test_a_directory_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ModelUnsupported, match="has no usable tokenizer"):
        Tokenizer(tmp_path)
