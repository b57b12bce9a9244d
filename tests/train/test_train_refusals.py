"""What cannot be trained on is refused by the command: one line, exit code 2, nothing written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorax_train.cli import main

PAIR = '{"prompt": "w5 w6", "completion": "w7"}\n'


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOMP_SPINCOUNT", "1000")  # which main() would set for good


def refuse(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run the command, which must fail, and return its one line."""
    capsys.readouterr()
    assert main([*argv, "--device", "cpu", "--dtype", "float32"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("lorax-train: error: ")
    assert captured.err.endswith("\n")
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (PAIR + PAIR + "{'prompt': 1}\n", "rows.jsonl line 3: not valid JSON: "),
        (PAIR + "\n" + '{"text": "w5"}\n', "rows.jsonl line 3: another format than "),
        (PAIR + '{"prompt": "w5"}\n', "rows.jsonl line 2: found the keys {'prompt'}"),
        (PAIR + '{"prompt": "w5", "completion": 7}\n', "line 2: completion must be a string"),
        ('{"text": ""}\n', "rows.jsonl line 1: no token to learn: the row is empty; fill it or"),
        ("", "rows.jsonl holds no rows"),
        ("\n\n", "rows.jsonl holds no rows"),
    ],
)
def test_bad_data_is_refused_by_line(
    text: str, message: str, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = tmp_path / "rows.jsonl", tmp_path / "out"
    data.write_text(text)
    argv = ["--model", str(tiny_model), "--data", str(data), "--out", str(out)]
    assert message in refuse(argv, capsys)
    assert not out.exists()


def test_bad_held_out_data_is_named_by_its_own_file(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.jsonl").write_text(PAIR)
    (tmp_path / "eval.jsonl").write_text(PAIR + "[]\n")
    argv = ["--model", str(tiny_model), "--data", str(tmp_path / "rows.jsonl")]
    argv += ["--eval-data", str(tmp_path / "eval.jsonl"), "--out", str(tmp_path / "out")]
    assert "eval.jsonl line 2: expected a JSON object, found list" in refuse(argv, capsys)


@pytest.mark.parametrize("targets", ["nope", "q_proj,nope", "regex:.*nope"])
def test_targets_that_match_nothing_are_refused(
    targets: str, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.jsonl").write_text(PAIR)
    argv = ["--model", str(tiny_model), "--data", str(tmp_path / "rows.jsonl")]
    argv += ["--out", str(tmp_path / "out"), "--targets", targets]
    line = refuse(argv, capsys)
    assert "--targets: " in line
    assert "matches no linear module" in line
    assert not (tmp_path / "out").exists()


def test_a_directory_of_other_files_is_left_alone(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.jsonl").write_text(PAIR)
    out = tmp_path / "out"
    out.mkdir()
    (out / "README.md").write_text("mine")
    argv = ["--model", str(tiny_model), "--data", str(tmp_path / "rows.jsonl"), "--out", str(out)]
    line = refuse(argv, capsys)
    assert "holds something else than an adapter (README.md)" in line
    assert "--overwrite" in line
    assert [path.name for path in out.iterdir()] == ["README.md"]
    assert (out / "README.md").read_text() == "mine"


def test_rows_of_messages_need_a_chat_template(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for file in tiny_model.iterdir():
        if file.name != "chat_template.jinja":
            (model / file.name).write_bytes(file.read_bytes())
    turns = [{"role": "user", "content": "w5"}, {"role": "assistant", "content": "w6"}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": turns}))
    argv = ["--model", str(model), "--data", str(tmp_path / "rows.jsonl")]
    assert "has no chat template" in refuse([*argv, "--out", str(tmp_path / "out")], capsys)
