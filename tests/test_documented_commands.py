"""The commands in the README and in docs/ are ones that our parsers take: nothing is run."""

from __future__ import annotations

import argparse
import importlib
import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lorax_serve.cli import client, serve
from lorax_serve.errors import LoraxError
from lorax_train.cli import read_command
from lorax_train.commands import COMMANDS
from lorax_train.commands.parsing import CommandParser

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = ("lorax", "lorax-serve", "lorax-train")
# What stands for a number in a synopsis, and for flags that are left out.
NUMBERS = {"A": "8", "N": "5"}
REST = {"lorax-train": ["--data", "rows.jsonl", "--out", "out"]}


def code_lines(text: str) -> Iterator[str]:
    """The lines in fences and those indented as code, continued ones joined."""
    fenced, before = False, ""
    for line in text.split("\n"):
        if line.startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    ") or before:
            before += line.strip()
            if before.endswith("\\"):
                before = before[:-1]
                continue
            yield before
            before = ""


def spans(text: str) -> Iterator[str]:
    """Commands with arguments in the running text, where a bare name only speaks of one."""
    for span in re.findall(r"(?<!`)`([^`\n]+(?:\n[^`\n]+)?)`(?!`)", text):
        words = span.split()
        if words[0] in PROGRAMS and any(word[0] == "-" or word.isupper() for word in words):
            yield " ".join(words)


def commands(text: str) -> list[list[str]]:
    """The words of the command that each line begins with."""
    found = []
    for line in itertools.chain(code_lines(text), spans(text)):
        try:
            words = shlex.split(line, comments=True)
        except ValueError:  # another language's quotes
            continue
        words = list(itertools.takewhile(lambda word: word not in ("|", "&&", "&"), words))
        if words and words[0] in PROGRAMS:
            found.append(words)
    return found


class _Parsed(Exception):
    """A command's arguments are right; it is not to go on."""


def _parse_and_stop(parser: CommandParser, argv: list[str]) -> None:
    argparse.ArgumentParser.parse_args(parser, argv)
    raise _Parsed


def accept(words: list[str]) -> None:
    """Raise unless the program that is named first has a parser that takes the rest."""
    program, *argv = words
    if argv[-1:] == ["..."]:
        argv[-1:] = REST[program]
    argv = [NUMBERS.get(word, word.strip("[]")) for word in argv]
    if program == "lorax":
        client._parser().parse_args(argv)
    elif program == "lorax-serve":
        serve.parse(argv)
    elif argv and argv[0] in COMMANDS:
        module: Any = importlib.import_module(COMMANDS[argv[0]])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(CommandParser, "parse_args", _parse_and_stop)
            with pytest.raises(_Parsed):
                module.main(argv[1:])
    else:
        read_command(argv)


CASES = [
    pytest.param(words, id=f"{page.name}: {' '.join(words)[:60]}")
    for page in PAGES
    for words in commands(page.read_text(encoding="utf-8"))
]


@pytest.mark.parametrize("words", CASES)
def test_a_documented_command_is_taken(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    accept(words)


CONFIGS = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/training.md").read_text("utf-8"), re.S)


@pytest.mark.parametrize("text", CONFIGS)
def test_a_documented_config_file_is_taken(text: str, tmp_path: Path) -> None:
    (tmp_path / "train.yaml").write_text(text, encoding="utf-8")
    assert read_command(["--config", str(tmp_path / "train.yaml")]).configs


def test_the_guides_settings_spelled_out_are_the_presets() -> None:
    page = (ROOT / "docs/from-elixir.md").read_text(encoding="utf-8")
    spelled = next(words[1:] for words in commands(page) if "elixir-discussion.txt" in words)
    places = [
        item for flag in ("--model", "--data", "--out") for item in (flag, value(spelled, flag))
    ]
    preset = read_command(["--preset", "elixir", "--alpha", "4", "--eval-split", "0.1", *places])
    assert read_command(spelled).configs == preset.configs


def value(words: list[str], flag: str) -> str:
    return words[words.index(flag) + 1]


def test_commands_are_found_in_blocks_fences_and_text() -> None:
    text = (
        "A `lorax-train` and a `lorax-train merge DIR --out OUT`, `--r 4`:\n\n"
        "    lorax-train --data d \\\n        --out 'o p'  # a note\n\n"
        "```sh\nlorax generate \"it's\"\nlorax-serve --adapters d &\nit's no command\n```\n"
    )
    assert commands(text) == [
        ["lorax-train", "--data", "d", "--out", "o p"],
        ["lorax", "generate", "it's"],
        ["lorax-serve", "--adapters", "d"],
        ["lorax-train", "merge", "DIR", "--out", "OUT"],
    ]
    pages = {page.name for page in PAGES if commands(page.read_text(encoding="utf-8"))}
    assert {"README.md", "from-elixir.md", "training.md"} <= pages
    assert len(CONFIGS) > 1


@pytest.mark.parametrize(
    "line",
    [
        "lorax-train --data d --out o --rank 4",
        "lorax-train --data d --out o --r four",
        "lorax-train --data d",
        "lorax-train merge DIR --into OUT",
        "lorax-serve --adapter d",
        "lorax generate --adaptor NAME PROMPT",
        "lorax adapters lode NAME",
    ],
)
def test_what_is_wrong_is_not_taken(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((LoraxError, SystemExit)):
        accept(line.split())
