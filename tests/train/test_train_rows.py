from __future__ import annotations

from pathlib import Path

import pytest

from lorax_serve.errors import TrainingError
from lorax_train.data.content import Message, Messages, PromptCompletion, Text
from lorax_train.data.rows import read_rows

PAIR = b'{"prompt": "a", "completion": "b"}\n'


def read(tmp_path: Path, raw: bytes) -> list[object]:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(raw)
    return [row.content for row in read_rows(path)]


def test_each_format_is_recognised(tmp_path: Path) -> None:
    assert read(tmp_path, b'{"text": "x"}\n{"text": "\xc3\xa4"}') == [Text("x"), Text("ä")]
    assert read(tmp_path, PAIR) == [PromptCompletion("a", "b")]
    chat = (
        b'{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}'
    )
    assert read(tmp_path, chat) == [Messages((Message("user", "q"), Message("assistant", "a")))]


def test_blank_lines_a_byte_order_mark_and_windows_line_ends_are_read_over(tmp_path: Path) -> None:
    raw = b"\xef\xbb\xbf" + PAIR + b"\n  \n" + PAIR.replace(b"\n", b"\r\n")
    assert len(read(tmp_path, raw)) == 2


def test_rows_know_their_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(PAIR + b"\n" + PAIR)
    assert [row.where for row in read_rows(path)] == [f"{path} line 1", f"{path} line 3"]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "holds no rows"),
        (b"\n \n", "holds no rows"),
        (PAIR + b"{", r"line 2: not valid JSON"),
        (PAIR + b"[1]", r"line 2: expected a JSON object, found list"),
        (PAIR + b'{"text": "\xff"}', r"line 2: not UTF-8 \(byte 11 of the line\)"),
        (PAIR + b'{"text": "x"}', r"line 2: another format than .* line 1"),
        (b'{"prompt": "x"}', r"line 1: found the keys \{'prompt'\}; a row must have exactly"),
        (b'{"text": "x", "id": 1}', r"line 1: found the keys \{'id', 'text'\}"),
        (b'{"text": 1}', r"line 1: text must be a string, found int"),
        (b'{"text": "\\ud800"}', r"line 1: text holds half of a surrogate pair"),
        (b'{"messages": "x"}', r"line 1: messages must be a list, found str"),
        (b'{"messages": []}', r"line 1: no assistant message"),
        (b'{"messages": [{"role": "user", "content": "x"}]}', r"line 1: no assistant message"),
        (b'{"messages": [{"role": "user"}]}', r"messages\[0\] must be an object with exactly"),
        (
            b'{"messages": [{"role": "human", "content": "x"}]}',
            r"messages\[0\]: role must be one of system, user, assistant, not 'human'",
        ),
        (
            b'{"messages": [{"role": "user", "content": null}]}',
            r"messages\[0\]: content must be a string, found NoneType",
        ),
    ],
)
def test_a_bad_file_is_refused_by_line(tmp_path: Path, raw: bytes, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        read(tmp_path, raw)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="cannot be read: No such file"):
        list(read_rows(tmp_path / "none.jsonl"))
