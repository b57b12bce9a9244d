"""Values of ``adapter_config.json``, each checked for its type. Every error names the key."""

from __future__ import annotations

import re
import sys
from typing import Any

from lorax_serve.adapter.patterns import MAX_CHARACTERS, MAX_WAYS, ways
from lorax_serve.errors import AdapterRejected, RejectReason

__all__ = [
    "ALL_LINEAR",
    "LAYERS_PATTERN",
    "PATTERN_KEY",
    "bad",
    "boolean",
    "invocation_tokens",
    "layer_indices",
    "layer_patterns",
    "module_names",
    "names_or_regex",
    "number",
    "pattern",
    "positive_int",
    "token_indices",
]

ALL_LINEAR = "all-linear"

# PEFT's expressions around its users' patterns.
PATTERN_KEY = r"(.*\.)?({})$"
LAYERS_PATTERN = r"(?:^|.*?\.){}\.(?P<index>\d+)\."

_MAX = sys.float_info.max


def bad(message: str) -> AdapterRejected:
    """The refusal of a malformed config."""
    return AdapterRejected(RejectReason.BAD_CONFIG, f"adapter_config.json: {message}")


def positive_int(value: object, key: str) -> int:
    """A whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise bad(f"{key} must be a whole number of at least 1, found {value!r}")
    return value


def number(value: object, key: str) -> float:
    """A finite number."""
    # The bounds refuse NaN and infinity too, and whole numbers that no float can hold.
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _MAX:
        raise bad(f"{key} must be a finite number, found {value!r}")
    return value


def boolean(value: object, key: str) -> bool:
    """True or false; null is false."""
    if value is not None and not isinstance(value, bool):
        raise bad(f"{key} must be true or false, found {value!r}")
    return bool(value)


def names_or_regex(value: object, key: str) -> tuple[str, ...] | str:
    """``all-linear``, a regular expression, or names."""
    if isinstance(value, str):
        if value.lower() == ALL_LINEAR:
            return ALL_LINEAR
        _check_regex(value, key)
        return value
    # PEFT collects the names in a set, so their order means nothing: sort for stable files.
    return tuple(sorted(_strings(value, key)))


def module_names(value: object, key: str) -> tuple[str, ...]:
    """Names of modules, each of at least one character."""
    names = _strings(value, key)
    if not all(names):
        raise bad(f"{key} holds an empty name")
    # PEFT matches them as expressions, to keep LoRA off these modules.
    total = sum(_check_regex(name, key, within=r"(^|.*\.){}($|\..*)") for name in names)
    _check_ways(total, key, f"{len(names)} names together")
    return names


def pattern(value: object, key: str) -> dict[str, Any]:
    """An object whose keys are expressions for the end of a path."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise bad(f"{key} must be an object of module patterns, found {value!r}")
    total = sum(_check_regex(each, key, within=PATTERN_KEY) for each in value)
    _check_ways(total, key, f"{len(value)} expressions together")
    return value


def layer_patterns(value: object) -> tuple[str, ...]:
    """Expressions for the name of the list of layers."""
    patterns = _strings(value, "layers_pattern")
    total = sum(_check_regex(each, "layers_pattern", within=LAYERS_PATTERN) for each in patterns)
    _check_ways(total, "layers_pattern", f"{len(patterns)} expressions together")
    return patterns


def layer_indices(value: object) -> tuple[int, ...]:
    """Layer numbers; one, or a list."""
    if value is None:
        return ()
    return _indices(value if isinstance(value, list) else [value], "layers_to_transform")


def invocation_tokens(value: object) -> tuple[int, ...]:
    """The token ids that activate an aLoRA adapter."""
    key = "alora_invocation_tokens"
    if value is None:
        return ()
    if not isinstance(value, list) or not value:
        raise bad(f"{key} must be a list of token ids, at least one, found {value!r}")
    return _indices(value, key)


def token_indices(value: object) -> dict[str, tuple[int, ...]]:
    """Token ids by the name of the embedding that has them; "" stands for the input embedding."""
    key = "trainable_token_indices"
    if value is None:
        return {}
    by_name = value if isinstance(value, dict) else {"": value}
    found = {}
    for name, ids in by_name.items():
        if not isinstance(ids, list) or (isinstance(value, dict) and not name):
            raise bad(f"{key} must be a list of token ids or an object of such, found {value!r}")
        found[name] = _indices(ids, key)
        if len(set(ids)) != len(ids):
            raise bad(f"{key} names a token twice, so which row counts is not defined")
    return found


def _indices(items: list[Any], key: str) -> tuple[int, ...]:
    for item in items:
        if isinstance(item, bool) or not isinstance(item, int) or item < 0:
            what = "layer indices" if key == "layers_to_transform" else "token ids"
            raise bad(f"{key} must hold {what}, found {item!r}")
    return tuple(items)


def _strings(value: object, key: str) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
        return tuple(value)
    raise bad(f"{key} must be a list of strings, found {value!r}")


def _check_regex(expression: str, key: str, within: str = "{}") -> float:
    """Refuse what does not compile where it is used, inside the expression ``within``, and what
    could take for ever to match; returns the ways to match it."""
    if len(expression) > MAX_CHARACTERS:
        raise bad(f"{key}: an expression of more than {MAX_CHARACTERS} characters is not read")
    try:
        found = ways(within.format(expression))
    except (re.error, OverflowError, RecursionError) as error:
        raise bad(f"{key}: {expression!r} is not a regular expression: {error}") from error
    _check_ways(found, key, repr(expression))
    return found


def _check_ways(found: float, key: str, what: str) -> None:
    if found > MAX_WAYS:
        raise AdapterRejected(
            RejectReason.UNSUPPORTED,
            f"adapter_config.json: {key}: {what} could take for ever to match: repeat no group "
            "that repeats or varies itself, and use fewer repetitions, or list the modules' names",
        )
