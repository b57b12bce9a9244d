from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import pytest

from lorax_serve.errors import TrainingError
from lorax_train.console import Console
from lorax_train.data.content import Content, Message, Messages, PromptCompletion, Text
from lorax_train.data.encode import Example, encode_rows
from lorax_train.data.rows import Row
from lorax_train.data.tokenizer import Tokenizer, load_tokenizer
from lorax_train.report import mark

EOS = "<|im_end|>"


def encode(tokenizer: Tokenizer, content: Content, max_length: int = 100) -> Example:
    (example,), warnings = encode_rows([Row("row 1", content)], tokenizer, max_length)
    assert warnings == []
    return example


def learned(tokenizer: Tokenizer, example: Example) -> str:
    pairs = zip(example.tokens, example.trained, strict=True)
    return tokenizer.decode([token for token, trained in pairs if trained])


def chat(*turns: str) -> Messages:
    roles = ("user", "assistant")
    return Messages(tuple(Message(roles[i % 2], text) for i, text in enumerate(turns)))


def with_template(tokenizer: Tokenizer, llama: Path, template: str) -> Tokenizer:
    own = load_tokenizer("tiny", llama, chat=True)
    own.hf.chat_template = template
    return dataclasses.replace(tokenizer, hf=own.hf)


def test_a_text_is_learned_whole_and_ends(tokenizer: Tokenizer) -> None:
    example = encode(tokenizer, Text("hello"))
    assert tokenizer.decode(example.tokens) == "hello" + EOS
    assert example.trained == (False,) + (True,) * 5  # nothing comes before the first


def test_a_completion_is_learned_with_its_end_and_the_prompt_is_not(tokenizer: Tokenizer) -> None:
    example = encode(tokenizer, PromptCompletion("2+2=", " 4"))
    assert tokenizer.decode(example.tokens) == f"2+2= 4{EOS}"
    assert learned(tokenizer, example) == f" 4{EOS}"


def test_the_end_is_learned_though_padding_is_the_same_token(tokenizer: Tokenizer) -> None:
    assert tokenizer.pad_id == tokenizer.eos_id
    example = encode(tokenizer, PromptCompletion(f"a{EOS}b", "c"))
    assert learned(tokenizer, example) == f"c{EOS}"  # the prompt's own EOS is not


def test_every_answer_of_a_conversation_is_learned_with_its_end(tokenizer: Tokenizer) -> None:
    example = encode(tokenizer, chat("hi", "hello", "bye", "see you"))
    assert learned(tokenizer, example) == f"hello{EOS}see you{EOS}"
    start = "<|im_start|>"
    assert tokenizer.decode(example.tokens) == (
        f"{start}user\nhi{EOS}\n{start}assistant\nhello{EOS}\n"
        f"{start}user\nbye{EOS}\n{start}assistant\nsee you{EOS}\n"
    )


def test_what_follows_the_last_answer_is_left_out(tokenizer: Tokenizer) -> None:
    assert encode(tokenizer, chat("hi", "yo", "unanswered")) == encode(tokenizer, chat("hi", "yo"))


def test_a_system_message_is_read_only(tokenizer: Tokenizer) -> None:
    messages = (Message("system", "be brief"), *chat("hi", "yo").messages)
    assert learned(tokenizer, encode(tokenizer, Messages(messages))) == f"yo{EOS}"


def test_a_template_that_rewrites_earlier_turns_is_refused(
    tokenizer: Tokenizer, llama: Path
) -> None:
    template = "{% for m in messages %}{{ m.content if loop.last else '-' }}|{% endfor %}"
    own = with_template(tokenizer, llama, template)
    with pytest.raises(TrainingError, match=r"row 1: messages\[1\] cannot be masked"):
        encode(own, chat("hi", "yo", "and", "so"))


def test_a_template_that_leaves_answers_out_is_refused_with_what_to_do(
    tokenizer: Tokenizer, llama: Path
) -> None:
    template = "{% for m in messages if m.role == 'user' %}{{ m.content }}|{% endfor %}"
    own = with_template(tokenizer, llama, template)
    with pytest.raises(TrainingError, match=r"messages\[1\] cannot be masked: .* use prompt and c"):
        encode(own, chat("hi", "yo"))


def test_a_template_that_refuses_is_named(tokenizer: Tokenizer, llama: Path) -> None:
    own = with_template(tokenizer, llama, "{{ raise_exception('no system role') }}")
    with pytest.raises(TrainingError, match=r"row 1: the chat template refuses .* no system role"):
        encode(own, chat("hi", "yo"))


def test_a_template_without_an_end_of_turn_is_warned_of(tokenizer: Tokenizer, llama: Path) -> None:
    own = with_template(
        tokenizer, llama, "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    )
    rows = [Row("row 1", chat("hi", "yo", "and", "so"))]
    (example,), warnings = encode_rows(rows, own, 100)
    assert learned(own, example) == "assistant: yo\nassistant: so\n"
    assert [w for w in warnings if "ends 2 assistant turns without" in w] == warnings != []


def test_the_generation_configs_stop_tokens_end_a_turn(tokenizer: Tokenizer, llama: Path) -> None:
    own = with_template(
        tokenizer,
        llama,
        "{% for m in messages %}<|im_start|>{{ m.content }}!\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>{% endif %}",
    )
    stop = own.encode("!", special=False)[0]
    own = dataclasses.replace(own, stop_ids=own.stop_ids | {stop})
    assert learned(own, encode(own, chat("hi", "yo"))) == "yo!"


def test_a_long_text_is_cut_and_counted(tokenizer: Tokenizer) -> None:
    rows = [Row("row 1", Text("x" * 50)), Row("row 2", Text("y"))]
    examples, warnings = encode_rows(rows, tokenizer, 10)
    assert [len(example.tokens) for example in examples] == [10, 2]
    assert tokenizer.eos_id not in examples[0].tokens  # its end was not seen
    assert warnings == ["1 of 2 rows were cut to --max-length 10 tokens"]


@pytest.mark.parametrize("long", [PromptCompletion("p" * 50, "c"), chat("p" * 50, "c")])
def test_a_long_row_that_would_lose_its_end_is_left_out_and_counted(
    tokenizer: Tokenizer, long: Content
) -> None:
    rows = [Row("row 1", long), Row("row 2", PromptCompletion("p", "c"))]
    examples, warnings = encode_rows(rows, tokenizer, 10)
    assert [example.where for example in examples] == ["row 2"]
    assert warnings[0].startswith("1 of 2 rows were left out")


def test_only_long_rows_are_refused(tokenizer: Tokenizer) -> None:
    rows = [Row("row 1", PromptCompletion("p" * 50, "c"))]
    with pytest.raises(TrainingError, match=r"every row is longer than --max-length 10 .* has 52"):
        encode_rows(rows, tokenizer, 10)


@pytest.mark.parametrize("empty", [Text(""), PromptCompletion("", "")])
def test_an_empty_row_is_refused(tokenizer: Tokenizer, empty: Content) -> None:
    with pytest.raises(TrainingError, match="row 1: no token to learn"):
        encode(tokenizer, empty)


def test_a_tokenizer_without_an_eos_or_a_template_is_refused(llama: Path, tmp_path: Path) -> None:
    own = load_tokenizer("tiny", llama, chat=True).hf
    own.chat_template = None
    own.save_pretrained(tmp_path / "plain")
    with pytest.raises(TrainingError, match="model tiny: its tokenizer has no chat template"):
        load_tokenizer("tiny", tmp_path / "plain", chat=True)
    own.eos_token = None
    own.save_pretrained(tmp_path / "endless")
    with pytest.raises(TrainingError, match="model tiny: its tokenizer has no EOS token"):
        load_tokenizer("tiny", tmp_path / "endless", chat=False)


def test_the_shown_example_marks_what_is_only_read(tokenizer: Tokenizer) -> None:
    example = encode(tokenizer, PromptCompletion("2+2=", " 4"))
    assert mark(Console(io.StringIO()), example, tokenizer) == f"⟦2+2=⟧ 4{EOS}"


def test_a_long_shown_example_is_cut(tokenizer: Tokenizer) -> None:
    example = encode(tokenizer, PromptCompletion("x" * 300, "y"), 400)
    shown = mark(Console(io.StringIO()), example, tokenizer)
    assert shown == f"⟦{'x' * 200}⟧ … (102 more tokens)"
