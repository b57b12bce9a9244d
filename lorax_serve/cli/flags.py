"""Command-line flags made from a settings dataclass: its fields, defaults and docstrings."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import itertools
import os
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args, get_type_hints

from lorax_serve.errors import InvalidRequest

__all__ = ["add_flags", "from_environment", "read_value"]

OFF = "off"
"""What a flag says for None, and for False."""
ON = "on"
ENVIRONMENT_PREFIX = "LORAX_"


def add_flags(parser: argparse.ArgumentParser, settings: type[Any]) -> None:
    """Add ``--some-field`` for each plain field of the dataclass ``settings``.

    A flag that is not given leaves no attribute behind, so that it can be told from its default.
    """
    docs = _field_docs(settings)
    for spec in _plain_fields(settings):
        default = spec.default
        if default is None or isinstance(default, bool):
            default = ON if default else OFF
        variable = ENVIRONMENT_PREFIX + spec.name.upper()
        parser.add_argument(
            f"--{spec.name.replace('_', '-')}",
            dest=spec.name,
            default=argparse.SUPPRESS,
            metavar=spec.name.rpartition("_")[2].upper(),
            help=f"{docs[spec.name]} (default: {default}; ${variable})".replace("%", "%%"),
        )


def from_environment(settings: type[Any]) -> dict[str, str]:
    """The values of ``LORAX_SOME_FIELD`` variables for the fields of ``settings``."""
    names = {spec.name: ENVIRONMENT_PREFIX + spec.name.upper() for spec in _plain_fields(settings)}
    return {
        name: os.environ[variable] for name, variable in names.items() if variable in os.environ
    }


def read_value(settings: type[Any], values: Mapping[str, str]) -> dict[str, Any]:
    """Turn texts into the types of the fields that they are for.

    Raises:
        InvalidRequest: naming the flag.
    """
    hints = get_type_hints(settings)
    known = {spec.name for spec in _plain_fields(settings)}
    return {name: _parse(name, text, hints[name]) for name, text in values.items() if name in known}


def _parse(name: str, text: str, hint: Any) -> Any:
    kinds = get_args(hint) or (hint,)
    if type(None) in kinds and text == OFF:
        return None
    kind = next(each for each in kinds if each is not type(None))
    if kind is bool:
        if text not in (ON, OFF):
            raise InvalidRequest(f"{name} must be {ON} or {OFF}, found {text!r}")
        return text == ON
    try:
        return Path(text).expanduser() if kind is Path else kind(text)
    except ValueError as error:
        what = {int: "a whole number", float: "a number"}[kind]
        raise InvalidRequest(f"{name} must be {what}, found {text!r}") from error


def _plain_fields(settings: type[Any]) -> list[dataclasses.Field[Any]]:
    return [
        spec for spec in dataclasses.fields(settings) if spec.default is not dataclasses.MISSING
    ]


def _field_docs(settings: type[Any]) -> dict[str, str]:
    """The string below each field, as the source has it."""
    source = textwrap.dedent(inspect.getsource(settings))
    (tree,) = (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef))
    body = tree.body
    docs: dict[str, str] = {}
    for field, below in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            constant = below.value if isinstance(below, ast.Expr) else None
            text = constant.value if isinstance(constant, ast.Constant) else ""
            docs[field.target.id] = " ".join(str(text).split()).rstrip(".")
    return docs
