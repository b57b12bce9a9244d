"""Files and directories of data, text in windows, and the store of tokens on disk."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import random
import resource
import sys
import tracemalloc
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from lorax_serve.errors import TrainingError
from lorax_train.config import DataConfig, LoopConfig, TrainConfig
from lorax_train.console import Console
from lorax_train.data import rows, token_store
from lorax_train.data.batches import collate, plan_epoch
from lorax_train.data.content import Message, Messages, PromptCompletion, Text
from lorax_train.data.dataset import Dataset, check_files, prepare
from lorax_train.data.encode import Example, encode_rows
from lorax_train.data.rows import read_rows, read_text
from lorax_train.data.tokenizer import Tokenizer
from lorax_train.data.windows import RandomWindows
from lorax_train.run import train

WriteRows = Callable[..., Path]
Configure = Callable[..., TrainConfig]

TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
TOOL = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}


@pytest.fixture
def dataset(llama: Path, configure: Configure) -> Callable[..., Dataset]:
    """``dataset(path, text_mode=..., seed=..., **fields)``: what the trainer is given."""

    def make(path: Path, *, seed: int = 0, said: io.StringIO | None = None, **data: Any) -> Dataset:
        config = configure(llama, DataConfig(path, **data), loop=LoopConfig(seed=seed))
        return prepare(config, llama, Console(said or io.StringIO()).warn)

    return make


def texts(examples: Any, tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.decode(example.tokens).removesuffix("<|im_end|>") for example in examples]


# Files


def test_a_directory_is_all_its_known_files_by_name(
    tmp_path: Path, dataset: Callable[..., Dataset], tokenizer: Tokenizer
) -> None:
    (tmp_path / "b.jsonl").write_text('{"prompt": "p", "completion": "c"}\n')
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    (tmp_path / "README.md").write_text("not data")
    (tmp_path / "._a.txt").write_text("what some systems leave beside a file")
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "c.jsonl").write_text("{")
    found = dataset(tmp_path)
    assert texts(found.examples, tokenizer) == ["one", "two", "pc"]
    assert [example.where for example in found.examples] == [
        f"{tmp_path / 'a.txt'} line 1",
        f"{tmp_path / 'a.txt'} line 3",
        f"{tmp_path / 'b.jsonl'} line 1",
    ]


def test_the_digest_is_the_files_and_changes_with_any_of_a_directory(
    tmp_path: Path, dataset: Callable[..., Dataset]
) -> None:
    (tmp_path / "a.txt").write_text("one")
    alone = dataset(tmp_path / "a.txt").sha256
    assert alone == hashlib.sha256(b"one").hexdigest()
    assert dataset(tmp_path).sha256 == alone
    (tmp_path / "b.txt").write_text("two")
    both = dataset(tmp_path).sha256
    (tmp_path / "b.txt").write_text("too")
    assert len({alone, both, dataset(tmp_path).sha256}) == 3


@pytest.mark.parametrize(
    ("files", "named", "message"),
    [
        ({}, "", "is a directory without a .jsonl, .parquet or .txt file"),
        ({"a.md": "x"}, "", "is a directory without a .jsonl, .parquet or .txt file"),
        ({"a.json": "[]"}, "a.json", "a.json: its format is told by its name, which must end in"),
        ({}, "none.txt", "none.txt cannot be read: No such file"),
    ],
)
def test_what_is_no_data_is_refused(
    files: dict[str, str], named: str, message: str, tmp_path: Path
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(TrainingError, match=message):
        check_files(DataConfig(tmp_path / named))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
@pytest.mark.parametrize("mode", ["lines", "file", "windows"])
def test_an_empty_file_beside_others_is_refused_by_name(
    name: str, mode: str, tmp_path: Path, dataset: Callable[..., Dataset]
) -> None:
    (tmp_path / name).write_text("")
    (tmp_path / f"b{Path(name).suffix}").write_text('{"text": "x"}')
    with pytest.raises(TrainingError, match=rf"{name} holds no (rows|text); fill it or leave it"):
        dataset(tmp_path, text_mode=mode, window=2)


def test_held_out_rows_within_the_training_directory_are_refused(
    tmp_path: Path, dataset: Callable[..., Dataset]
) -> None:
    for name in ("train.jsonl", "valid.jsonl"):
        (tmp_path / name).write_text('{"text": "x"}')
    with pytest.raises(TrainingError, match=r"--eval-data .*valid.jsonl is in --data .* too"):
        dataset(tmp_path, eval_file=tmp_path / "valid.jsonl")
    found = dataset(tmp_path / "train.jsonl", eval_file=tmp_path / "valid.jsonl")
    assert (len(found.examples), len(found.held_out)) == (1, 1)


# Rows


def test_tools_are_rendered_by_the_template_and_not_learned(
    llama: Path, configure: Configure, write_rows: WriteRows, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for file in llama.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    template = model / "chat_template.jinja"
    template.write_text(
        "{% if tools %}{% for t in tools %}<{{ t.function.name }}>{% endfor %}{% endif %}"
        + template.read_text()
    )
    for tools in ([TOOL], json.dumps([TOOL])):
        data = write_rows([{"messages": TURNS, "tools": tools}, {"messages": TURNS}])
        config = configure(model, data)
        found = prepare(config, model, Console(io.StringIO()).warn)
        first, second = found.examples
        assert found.tokenizer.decode(first.tokens).startswith("<clock><|im_start|>user")
        assert found.tokenizer.decode(second.tokens).startswith("<|im_start|>user")
        assert first.n_targets == second.n_targets == 2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": TURNS, "tools": {"name": "x"}}, "tools must be a list, found dict"),
        ({"messages": TURNS, "tools": "[{"}, "tools is a string but not JSON"),
        ({"messages": TURNS, "tools": ["clock"]}, r"tools\[0\] must be an object that describes"),
        ({"messages": TURNS, "tools": [TOOL, {"function": {}}]}, r"tools\[1\] must be an object"),
        ({"text": "x", "tools": [TOOL]}, r"found the keys \{'text', 'tools'\}"),
        ({"prompt": "x", "completion": ""}, "no token to learn: the completion is empty"),
        (
            {"messages": [TURNS[0], {"role": "assistant", "content": ""}]},
            "no token to learn: the assistant's messages are empty",
        ),
    ],
)
def test_a_row_that_teaches_nothing_or_has_bad_tools_is_refused_by_line(
    row: dict[str, Any], message: str, write_rows: WriteRows
) -> None:
    good: dict[str, Any] = {"messages": TURNS} if "messages" in row else {"text": "x"}
    path = write_rows([good, row])
    with pytest.raises(TrainingError, match=f"rows.jsonl line 2: {message}"):
        list(read_rows(path))


def test_lines_of_text_lose_their_ends_and_a_file_keeps_them(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone \r\n\n  two\nthree")
    assert [row.content for row in read_rows(path)] == [Text("one "), Text("  two"), Text("three")]
    assert [(row.content, row.where) for row in read_rows(path, "file")] == [
        (Text("one \r\n\n  two\nthree"), str(path))
    ]


@pytest.mark.parametrize("mode", ["lines", "file"])
def test_text_that_is_not_utf_8_is_refused_by_line(mode: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("one\nzwölf\n".encode("latin-1"))
    with pytest.raises(TrainingError, match=r"a\.txt line 2: not UTF-8.*; save the file as UTF-8"):
        list(read_rows(path, mode))


def test_pieces_of_a_text_are_the_text_and_end_between_lines_or_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "_BLOCK", 16)
    path = tmp_path / "a.txt"
    for text in (
        "one\ntwo\n\n  three\nfour ä\nfive\n" * 20,
        "wörter ohne ende " * 30,
        "ü" * 300,
        "\n" * 90,
    ):
        path.write_text(text, encoding="utf-8")
        pieces = list(read_text(path))
        assert "".join(pieces) == text
        for before, after in pairwise(pieces):
            assert before[-1] == "\n" or after[0] == " "
            assert not before[-2].isspace()
            assert before[-1] != "\n" or not after[0].isspace()
    path.write_text("one\ntwo\n" * 20)
    assert len(list(read_text(path))) > 5


# Parquet


def parquet(path: Path, columns: dict[str, list[Any]]) -> Path:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), path)
    return path


def test_each_format_is_read_from_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet(path, {"prompt": ["a", "b"], "completion": ["c", "d"]})
    assert [(row.content, row.where) for row in read_rows(path)] == [
        (PromptCompletion("a", "c"), f"{path} row 1"),
        (PromptCompletion("b", "d"), f"{path} row 2"),
    ]
    parquet(path, {"text": ["a"] * 2500})
    assert [row.content for row in read_rows(path)] == [Text("a")] * 2500
    # A struct's fields are in every row: those that a message lacks are null.
    parquet(path, {"messages": [TURNS, TURNS], "tools": [None, json.dumps([TOOL])]})
    chat = (Message("user", "q"), Message("assistant", "a"))
    assert [row.content for row in read_rows(path)] == [Messages(chat), Messages(chat, (TOOL,))]
    other = {"function": {"name": "x", "strict": True}}
    parquet(path, {"messages": [TURNS, TURNS], "tools": [[TOOL], [other]]})
    first, second = (row.content for row in read_rows(path))
    assert first == Messages(chat, (TOOL,))
    assert second == Messages(chat, (other,))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": ["a", None]}, "row 2: text must be a string, found NoneType"),
        ({"text": [1]}, "row 1: text must be a string, found int"),
        ({"text": ["a"], "id": [1]}, r"row 1: found the keys \{'id', 'text'\}"),
        ({"text": []}, "holds no rows"),
    ],
)
def test_a_bad_parquet_file_is_refused_by_row(
    columns: dict[str, list[Any]], message: str, tmp_path: Path
) -> None:
    path = parquet(tmp_path / "a.parquet", columns)
    with pytest.raises(TrainingError, match=rf"a\.parquet {message}"):
        list(read_rows(path))


def test_a_damaged_parquet_file_is_refused(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", {"text": [str(i) for i in range(5000)]})
    raw = path.read_bytes()
    for damaged in (b"", b"PAR1 no", raw[: len(raw) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(TrainingError, match=r"a\.parquet cannot be read as Parquet: .*convert"):
            list(read_rows(path))


def test_parquet_without_pyarrow_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lorax_train.data.parquet", None)
    (tmp_path / "a.parquet").write_bytes(b"")
    with pytest.raises(TrainingError, match=r"pip install 'lorax-serve\[parquet\]'"):
        list(read_rows(tmp_path / "a.parquet"))


# What is learned


def test_the_end_is_a_target_and_padding_is_not_though_they_are_one_token(
    dataset: Callable[..., Dataset], write_rows: WriteRows
) -> None:
    rows_ = [{"prompt": "a", "completion": "b"}, {"prompt": "long", "completion": "longer"}]
    found = dataset(write_rows(rows_))
    eos = found.tokenizer.eos_id
    assert found.tokenizer.pad_id == eos
    for padded in (False, True):
        batch = collate(found.examples, eos, padded=padded)
        assert batch.labels.tolist().count(eos) == 2
        assert len(batch.labels) == len("b") + len("longer") + 2


# Windows


def test_windows_are_random_places_of_one_stream_and_its_end_is_held_out(
    tmp_path: Path, dataset: Callable[..., Dataset], tokenizer: Tokenizer
) -> None:
    text = "".join(f"{i:04}" for i in range(250))  # 1000 tokens of a byte each, and the EOS
    path = tmp_path / "a.txt"
    path.write_text(text)
    found = dataset(path, text_mode="windows", window=10)
    assert len(found.examples) == 90
    windows = texts(found.examples, tokenizer)
    starts = [text.index(window) for window in windows]
    assert max(starts) <= 901 - 10
    assert len(set(starts)) > 60
    assert {s % 4 for s in starts} == {0, 1, 2, 3}
    assert texts(found.held_out, tokenizer) == [text[i : i + 10] for i in range(901, 1000, 10)]
    example = found.examples[0]
    assert example.trained == (False, *[True] * 9)
    assert example.where == f"{path} from token {starts[0]}"


def test_windows_depend_on_the_seed_and_every_epoch_has_its_own(
    tmp_path: Path, dataset: Callable[..., Dataset]
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("".join(f"{i:04}" for i in range(100)))

    def windows(seed: int) -> RandomWindows:
        found = dataset(path, text_mode="windows", window=8, seed=seed).examples
        assert isinstance(found, RandomWindows)
        return found

    assert list(windows(1337)) == list(windows(1337)) != list(windows(1338))
    again = windows(1337).of_epoch(1)
    assert list(again) == list(windows(1337).of_epoch(1)) != list(windows(1337))


def test_texts_in_windows_follow_one_another_with_their_ends(
    tmp_path: Path, dataset: Callable[..., Dataset], tokenizer: Tokenizer
) -> None:
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt").write_text("two")
    found = dataset(tmp_path, text_mode="windows", window=8, eval_split=0.0)
    assert [tokenizer.decode(e.tokens) for e in found.examples] == ["one<|im_end|>two<|im_end|>"]
    assert len(found.held_out) == 0
    (tmp_path / "a.txt").unlink()
    with pytest.raises(TrainingError, match="4 tokens to train on, fewer than --window 8"):
        dataset(tmp_path, text_mode="windows", window=8)


def test_windows_take_text_alone(
    tmp_path: Path, dataset: Callable[..., Dataset], write_rows: WriteRows
) -> None:
    rows = write_rows([{"text": "x"}])
    assert len(dataset(rows, text_mode="windows").examples) == 1  # there is no text to cut
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(TrainingError, match=r"windows reads \.txt files alone, .*rows\.jsonl"):
        dataset(tmp_path, text_mode="windows")


def test_windows_train(tmp_path: Path, llama: Path, configure: Configure) -> None:
    (tmp_path / "a.txt").write_text("to be or not to be, " * 40)
    data = DataConfig(tmp_path / "a.txt", text_mode="windows", window=16)
    record = train(configure(llama, data, steps=30), Console(io.StringIO())).record
    assert record.eval_losses[-1] < record.eval_losses[0] - 1


def test_the_tenth_that_windows_hold_out_is_enough_to_evaluate_on(
    tmp_path: Path, llama: Path, configure: Configure, write_rows: WriteRows
) -> None:
    # The end is unlike the rest, so that its loss rises as the rest is learned.
    (tmp_path / "a.txt").write_text("to be or not to be, " * 40 + "0123456789" * 8)
    data = DataConfig(tmp_path / "a.txt", text_mode="windows", window=16)
    loop = LoopConfig(max_steps=60, batch_size=2, eval_every=2, patience=2)
    said = io.StringIO()
    record = train(configure(llama, data, lr=0.05, loop=loop), Console(said)).record
    assert [each.step for each in record.evaluations[:3]] == [0, 2, 4]
    assert record.stopped_early
    assert f"stopped after step {record.steps}" in said.getvalue()
    for change in ({"eval_split": 0.0}, {"text_mode": "lines"}):
        with pytest.raises(TrainingError, match="--eval-every needs rows to evaluate on; give"):
            configure(llama, dataclasses.replace(data, **change), loop=loop)
    rows_ = dataclasses.replace(data, train=write_rows([{"text": "x"}]))  # which are no stream
    config = configure(llama, rows_, loop=LoopConfig(max_steps=2, patience=1))
    with pytest.raises(
        TrainingError, match=r"--patience .*, but none of .*rows\.jsonl is held out;"
    ):
        train(config, Console(io.StringIO()))


# The store


def test_stored_examples_are_what_was_encoded_in_any_order(
    llama: Path, configure: Configure, write_rows: WriteRows, pairs: list[dict[str, Any]]
) -> None:
    path = write_rows(pairs)
    found = prepare(configure(llama, path), llama, Console(io.StringIO()).warn)
    plain, _ = encode_rows(read_rows(path), found.tokenizer, 512)
    assert list(found.examples) == plain
    assert list(found.examples[::3]) == plain[::3]
    assert found.examples[-1] == plain[-1]
    of_store, of_list = (
        list(plan_epoch(examples, 2, 2, random.Random(3))) for examples in (found.examples, plain)
    )
    assert of_store == of_list


def test_a_split_of_a_store_is_all_of_it(
    dataset: Callable[..., Dataset], write_rows: WriteRows, pairs: list[dict[str, Any]]
) -> None:
    path = write_rows(pairs)
    found = dataset(path, eval_split=0.25)
    assert (len(found.examples), len(found.held_out)) == (12, 4)
    whole = [example.where for example in dataset(path).examples]
    assert sorted([e.where for e in found.examples] + [e.where for e in found.held_out]) == sorted(
        whole
    )


def test_the_store_leaves_nothing_behind(
    tmp_path: Path,
    dataset: Callable[..., Dataset],
    write_rows: WriteRows,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    found = dataset(write_rows([{"text": "x"}, {"text": "y"}]))
    assert list(temporary.iterdir()) == []
    assert len(list(found.examples)) == 2  # it can be read all the same
    with pytest.raises(TrainingError, match="line 2"):
        dataset(write_rows([{"text": "x"}, {"text": 1}]))
    assert list(temporary.iterdir()) == []


def test_a_kept_store_is_used_again_until_something_changes(
    tmp_path: Path,
    dataset: Callable[..., Dataset],
    write_rows: WriteRows,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache = tmp_path / "cache"
    built: list[object] = []
    true = token_store.StoreWriter

    def counted(directory: Path) -> token_store.StoreWriter:
        built.append(directory)
        return true(directory)

    monkeypatch.setattr(token_store, "StoreWriter", counted)
    rows_ = [{"text": "a" * 50}, {"text": "b"}]
    said = io.StringIO()
    first = dataset(write_rows(rows_), cache=cache, max_length=20, said=said)
    moved = dataset(write_rows(rows_, "moved.jsonl"), cache=cache, max_length=20, said=said)
    assert len(built) == 1
    assert list(map(tokens_of, first.examples)) == list(map(tokens_of, moved.examples))
    assert moved.examples[0].where == f"{tmp_path / 'moved.jsonl'} line 1"
    assert said.getvalue().count("1 of 2 rows were cut to --max-length 20") == 2
    dataset(write_rows(rows_), cache=cache, max_length=21)
    dataset(write_rows([*rows_, {"text": "c"}]), cache=cache, max_length=20)
    assert len(built) == 3
    assert len(list(cache.iterdir())) == 3  # and no temporary directories


def tokens_of(example: Example) -> tuple[int, ...]:
    return example.tokens


def test_a_damaged_kept_store_is_made_anew(
    tmp_path: Path, dataset: Callable[..., Dataset], write_rows: WriteRows
) -> None:
    path, cache = write_rows([{"text": "abc"}]), tmp_path / "cache"
    whole = list(dataset(path, cache=cache).examples)
    (kept,) = cache.iterdir()
    for name in ("tokens.u32", "summary.json"):
        (kept / name).write_bytes(b"")
        assert list(dataset(path, cache=cache).examples) == whole


def test_a_cache_that_cannot_be_written_is_refused(
    tmp_path: Path, dataset: Callable[..., Dataset], write_rows: WriteRows
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match=r"cannot be written to .*file/cache: .*; give --cache"):
        dataset(write_rows([{"text": "x"}]), cache=tmp_path / "file" / "cache")


def test_runs_on_the_same_rows_share_a_store(
    llama: Path, configure: Configure, write_rows: WriteRows
) -> None:
    path, said = write_rows([{"text": "a" * 600}, {"text": "b"}]), io.StringIO()
    configs = [configure(llama, path, lr=lr) for lr in (1e-3, 1e-2)]
    stores: dict[str, token_store.TokenStore] = {}
    first, second = (prepare(config, llama, Console(said).warn, stores) for config in configs)
    assert first.examples.store is second.examples.store  # type: ignore[attr-defined]
    assert said.getvalue().count("warning") == 1


def test_planning_an_epoch_loads_only_the_steps_that_are_taken(
    dataset: Callable[..., Dataset], write_rows: WriteRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = dataset(write_rows([{"text": "x" * (1 + i % 9)} for i in range(400)])).examples
    loaded: list[object] = []
    true = type(found).__getitem__

    def counted(self: Any, index: Any) -> Any:
        loaded.append(index)
        return true(self, index)

    monkeypatch.setattr(type(found), "__getitem__", counted)
    plan = plan_epoch(found, 4, 2, random.Random(0))
    next(plan)
    next(plan)
    assert len(loaded) == 16


def write_lines(path: Path, size: int) -> Path:
    with path.open("w") as file:
        for number in range(size // 300):
            file.write(f"{number:08}{'x' * 200} {'y' * 90}\n")
    return path


@pytest.mark.parametrize("mode", ["lines", "windows"])
def test_memory_does_not_grow_with_the_file(
    mode: str,
    tmp_path: Path,
    dataset: Callable[..., Dataset],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rows, "_BLOCK", 1 << 16)  # which the smaller file is larger than

    def peak(size: int) -> int:
        path = write_lines(tmp_path / f"{size}.txt", size)
        tracemalloc.start()
        try:
            found = dataset(path, text_mode=mode, window=64)
            plan = plan_epoch(found.examples, 8, 1, random.Random(0))
            assert len([next(plan) for _ in range(20)]) == 20
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    first = peak(300_000)
    # A byte is a token here. As lists of numbers, two lists of pointers take 16 bytes a token; the
    # table of a store takes less than one.
    assert peak(1_200_000) - first < 1_200_000


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_hundred_megabytes_take_little_memory(
    tmp_path: Path, dataset: Callable[..., Dataset]
) -> None:
    path = write_lines(tmp_path / "a.txt", 100_000_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = dataset(path)
    plan = plan_epoch(found.examples, 8, 1, random.Random(0))
    assert len([next(plan) for _ in range(100)]) == 100
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < 150e6  # as lists it would be more than 1.6 GB
