"""``--config FILE.yaml``: the flags of ``lorax-train`` in a file, for one adapter or many.

A key is a flag's name, with ``_`` or ``-`` between its words. ``adapters`` is a list of entries
with such keys, one for each adapter of a sweep; what stands beside it holds for all of them.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lorax_serve.errors import TrainingError

__all__ = ["ADAPTERS", "ConfigFile", "dump", "read_config"]

ADAPTERS = "adapters"


@dataclass(frozen=True)
class ConfigFile:
    """What a file says.

    Attributes:
        values: by the flags' destinations (``optimizer.lr``).
        entries: of ``adapters``, each by destinations too; None if there is no such key.
    """

    values: dict[str, Any]
    entries: list[dict[str, Any]] | None = None


def read_config(path: Path, flags: Sequence[argparse.Action]) -> ConfigFile:
    """Read a file of flags.

    Args:
        path: of the YAML file.
        flags: that may be in it, with the types of their values.

    Raises:
        TrainingError: naming the file, the key, and what would be right.
    """
    try:
        text = path.read_bytes()
        _check_keys(path, yaml.compose(text, yaml.SafeLoader))
        raw = yaml.safe_load(text)
    except OSError as error:
        raise TrainingError(f"--config {path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f" line {mark.line + 1}"
        problem = getattr(error, "problem", None) or error
        raise TrainingError(f"--config {path}{line}: not valid YAML: {problem}") from error
    if raw is None:
        raise TrainingError(f"--config {path} is empty; write flags into it, as lr: 2e-4")
    if not isinstance(raw, dict):
        raise TrainingError(
            f"--config {path} must be flags and their values, as lr: 2e-4, not a "
            f"{type(raw).__name__}"
        )
    known = {option.removeprefix("--"): flag for flag in flags for option in flag.option_strings}
    given = raw.pop(ADAPTERS, None)
    values = _values(f"--config {path}", raw, known, extra=(ADAPTERS,))
    if given is None:
        return ConfigFile(values)
    if not isinstance(given, list) or not given:
        raise TrainingError(
            f"--config {path}: {ADAPTERS} must be a list with an entry for each adapter"
        )
    return ConfigFile(values, [_entry(path, i, entry, known) for i, entry in enumerate(given)])


def _check_keys(path: Path, node: Any) -> None:
    """Refuse keys that are no text, and one that is there twice, of which YAML takes the last."""
    if isinstance(node, yaml.SequenceNode):
        for child in node.value:
            _check_keys(path, child)
    if not isinstance(node, yaml.MappingNode):
        return
    seen: set[str] = set()
    for key, value in node.value:
        where = f"--config {path} line {key.start_mark.line + 1}"
        if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:int":
            raise TrainingError(f"{where}: a key must be the name of a flag")
        if key.value in seen:
            raise TrainingError(f"{where}: {key.value} is there twice; take one out")
        seen.add(key.value)
        _check_keys(path, value)


def _entry(
    path: Path, index: int, entry: object, known: Mapping[str, argparse.Action]
) -> dict[str, Any]:
    where = f"--config {path}: {ADAPTERS}[{index}]"
    if not isinstance(entry, dict):
        raise TrainingError(f"{where} must be flags and their values, as lr: 2e-4")
    if isinstance(name := entry.get("name"), str):
        where += f" ({name})"
    for key in entry:
        flag = known.get(str(key).replace("_", "-"))
        if flag is not None and "." not in flag.dest and flag.dest != "name":
            raise TrainingError(
                f"{where}: {key} is common to all adapters; put it beside {ADAPTERS}"
            )
    return _values(where, entry, known)


def _values(
    where: str,
    raw: Mapping[str, object],
    known: Mapping[str, argparse.Action],
    extra: tuple[str, ...] = (),
) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in raw.items():
        name = str(key).replace("_", "-")  # YAML reads some words, as on, as other than text
        flag = known.get(name)
        if flag is None:
            near = difflib.get_close_matches(name, [*known, *extra], n=2)
            hint = f"did you mean {' or '.join(near)}?" if near else "see lorax-train --help"
            raise TrainingError(f"{where}: there is no flag {key}; {hint}")
        if flag.dest in out:
            raise TrainingError(f"{where}: {key} is there twice")
        if value is not None:  # null: as if the key were not there
            found = _value(f"{where}: {key}", value, flag)
            turned = isinstance(flag, argparse.BooleanOptionalAction) and name.startswith("no-")
            out[flag.dest] = not found if turned else found
    return out


def _value(where: str, value: object, flag: argparse.Action) -> Any:
    """What the flag's text would have become."""
    if isinstance(flag, argparse._StoreTrueAction | argparse.BooleanOptionalAction):
        if not isinstance(value, bool):
            raise TrainingError(f"{where} must be true or false, not {value!r}")
        return value
    if flag.type is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        raise TrainingError(f"{where} must be a whole number, not {value!r}")
    if flag.type is float:
        try:  # YAML 1.1 takes 2e-4 for text: it has no point
            if isinstance(value, int | float | str) and not isinstance(value, bool):
                return float(value)
        except ValueError:
            pass
        raise TrainingError(f"{where} must be a number, not {value!r}")
    numbers = callable(flag.type) and not isinstance(flag.type, type)  # --layers
    texts = [str(each) if numbers and type(each) is int else each for each in _list(value)]
    if texts and all(isinstance(each, str) for each in texts):
        value = ",".join(map(str, texts))
    if not isinstance(value, str):
        raise TrainingError(f"{where} must be text, not {value!r}; put it in quotes")
    if flag.choices is not None and value not in flag.choices:
        raise TrainingError(f"{where} must be one of {', '.join(flag.choices)}, not {value!r}")
    return flag.type(value) if callable(flag.type) else value


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else [value]


def dump(adapters: Sequence[Mapping[str, Any]]) -> str:
    """The text of a file that says the same.

    Args:
        adapters: each one's values by the names of its flags, with ``_``. What all of them share
            is written once.
    """
    plain = [{key: _plain(value) for key, value in values.items()} for values in adapters]
    if len(plain) == 1 and "name" not in plain[0]:
        return _text(plain[0])
    first, *others = plain
    shared = {
        key: value
        for key, value in first.items()
        if key not in ("name", "out") and all(key in o and o[key] == value for o in others)
    }
    entries = [{key: v for key, v in values.items() if key not in shared} for values in plain]
    return _text(shared | {ADAPTERS: entries})


def _text(values: object) -> str:
    return str(yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value) if isinstance(value, Path) else value
