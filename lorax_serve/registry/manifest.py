"""What a manifest says: the adapters that should be served, as somebody has written them down.

::

    adapters:
      - name: poet
        source: s3://bucket/prefix/poet
        digest: sha256:...   # optional: this content and no other
        weight: 2            # optional, default 1
        pinned: true         # optional, default false

What is wrong with one entry is told of that entry, and the others count. What is wrong with the
whole file, so that nobody can say what it means, is told of the file.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import yaml

from lorax_serve.errors import InvalidRequest
from lorax_serve.registry.names import is_name
from lorax_serve.registry.version import MAX_WEIGHT

__all__ = ["Entry", "Manifest", "parse_manifest"]

_MAX_SHOWN = 140
_DIGEST = re.compile(r"(?:sha256:)?([0-9a-f]{64})")
_MAX_DEPTH = 32
_ENTRY_DEPTH = 2  # in the list, which is in the mapping
_MADE = object()  # tags a node whose value is what an entry means; nobody can write this one
_KEYS = ("name", "source", "digest", "weight", "pinned")


@dataclass(frozen=True, slots=True)
class Entry:
    """An adapter that should be served.

    Attributes:
        name: what requests call it.
        source: where it is, as it was written.
        digest: of its content, 64 hexadecimal digits; None: whatever the source has.
        weight: its share of a busy server, in [1, 100].
        pinned: whether its weights never leave host memory.
    """

    name: str
    source: str
    digest: str | None = None
    weight: int = 1
    pinned: bool = False


class Manifest(NamedTuple):
    """What a file says.

    Attributes:
        entries: by name.
        broken: what is wrong with the other entries, by their name, or place if that cannot be
            read.
        all_named: whether all names can be read, and what is not among them is not wanted.
    """

    entries: Mapping[str, Entry]
    broken: Mapping[str, InvalidRequest]
    all_named: bool

    @property
    def names(self) -> set[str]:
        """All names, those of broken entries included."""
        return self.entries.keys() | self.broken.keys()


def parse_manifest(text: bytes, where: str) -> Manifest:
    """Read what somebody has written.

    Args:
        text: YAML.
        where: it is written, as messages call it.

    Raises:
        InvalidRequest: nobody can say what it means as a whole; the message has ``where``, and the
            line.
    """
    listed = _read(text, where)
    names = [_name_of(raw) for raw in listed]
    times = Counter(names)
    entries: dict[str, Entry] = {}
    broken: dict[str, InvalidRequest] = {}
    for index, (name, raw) in enumerate(zip(names, listed, strict=True)):
        key = name or f"adapters[{index}]"
        try:
            if name is not None and times[name] > 1:
                raise InvalidRequest("is there twice; take one of them out")
            entries[key] = _entry(raw)
        except InvalidRequest as error:
            entry = f"adapters[{index}]{f' ({name})' if name else ''}"
            broken[key] = InvalidRequest(f"manifest {where}: {entry}: {error}")
    return Manifest(entries, broken, all_named=None not in times)


def _name_of(raw: object) -> str | None:
    """The name that an entry gives, if an adapter may be called so."""
    name = raw.get("name") if isinstance(raw, dict) else None
    return name if isinstance(name, str) and is_name(name) else None


def _read(text: bytes, where: str) -> list[Any]:
    """What ``adapters`` is a list of."""
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        raw = loader.construct_document(node) if node is not None else None
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f" line {mark.line + 1}"
        problem = getattr(error, "problem", None) or type(error).__name__
        kind = "" if isinstance(error, _Twice) else "not valid YAML: "
        raise InvalidRequest(f"manifest {where}{line}: {kind}{problem}") from error
    finally:
        if loader is not None:
            loader.dispose()
    if not isinstance(raw, dict) or "adapters" not in raw:
        raise InvalidRequest(
            f"manifest {where} must have the key adapters, with a list of adapters (of none: [])"
        )
    if len(raw) > 1:
        other = next(str(key) for key in raw if key != "adapters")
        raise InvalidRequest(
            f"manifest {where}: unknown key {other[:_MAX_SHOWN]!r}; only adapters is known"
        )
    if not isinstance(raw["adapters"], list):
        raise InvalidRequest(
            f"manifest {where}: adapters must be a list with an entry for each adapter (of none: "
            f"[]), not {_kind(raw['adapters'])}"
        )
    return raw["adapters"]


_SafeLoader: Any = yaml.SafeLoader
if yaml.__with_libyaml__:

    class _InC(yaml.composer.Composer, yaml.CSafeLoader):  # type: ignore[misc]  # no types
        """Parses in C, a few times as fast, and composes in Python, so that ``_Loader`` can step
        in. The fewer seconds, the less the process's other threads are held up."""

        def __init__(self, text: bytes) -> None:
            yaml.composer.Composer.__init__(self)
            yaml.CSafeLoader.__init__(self, text)

    _SafeLoader = _InC


class _Twice(yaml.MarkedYAMLError):  # type: ignore[misc]
    """A key is there twice."""


class _Loader(_SafeLoader):  # type: ignore[misc]
    """Takes no aliases: a few lines of them stand for more than any memory holds. Nor a key that is
    there twice, of which YAML would take the last.

    Each entry is made at once from its nodes, which are forgotten then: those of all entries would
    keep the garbage collector busy for longer than the rest takes, with the process stopped.
    """

    def __init__(self, text: bytes) -> None:
        super().__init__(text)
        self._depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            problem = f"*{event.anchor} is an alias; write out what it stands for"
            raise yaml.composer.ComposerError(None, None, problem, event.start_mark)
        if self._depth == _MAX_DEPTH:
            problem = f"lists and mappings are nested more than {_MAX_DEPTH} deep"
            raise yaml.composer.ComposerError(None, None, problem, event.start_mark)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        if isinstance(node, yaml.MappingNode):
            _check_keys(node)
        if self._depth == _ENTRY_DEPTH and isinstance(parent, yaml.SequenceNode):
            return yaml.ScalarNode(_MADE, self.construct_document(node))
        return node


_Loader.add_constructor(_MADE, lambda loader, node: node.value)


def _check_keys(node: Any) -> None:
    """Refuse a key that is there twice."""
    seen: set[str] = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode) and key.value in seen:
            raise _Twice(None, None, f"{key.value} is there twice", key.start_mark)
        seen.add(str(key.value))


def _entry(raw: object) -> Entry:
    if not isinstance(raw, dict):
        raise InvalidRequest(f"must have the keys name and source, not be {_kind(raw)}")
    unknown = [str(key) for key in raw if key not in _KEYS]
    if unknown:
        known = ", ".join(_KEYS)
        raise InvalidRequest(f"unknown key {unknown[0][:_MAX_SHOWN]!r}; there are {known}")
    name, source = _text(raw, "name"), _text(raw, "source")
    if not is_name(name):
        raise InvalidRequest(
            f"name {name[:_MAX_SHOWN]!r} is not valid: letters, digits, '.', '_' and '-', at most "
            "128, the first a letter or digit"
        )
    digest = None
    if raw.get("digest") is not None:
        found = _DIGEST.fullmatch(_text(raw, "digest"))
        if found is None:
            raise InvalidRequest("digest must be sha256: and 64 hexadecimal digits, in lower case")
        digest = found[1]
    weight, pinned = raw.get("weight", 1), raw.get("pinned", False)
    if type(weight) is not int or not 1 <= weight <= MAX_WEIGHT:
        shown = weight if isinstance(weight, int | float) else _kind(weight)
        raise InvalidRequest(f"weight must be a whole number in [1, {MAX_WEIGHT}], found {shown}")
    if not isinstance(pinned, bool):
        raise InvalidRequest(f"pinned must be true or false, found {_kind(pinned)}")
    return Entry(name, source, digest, weight, pinned)


def _text(raw: Mapping[str, object], key: str) -> str:
    value = raw.get(key)
    if value is None:
        raise InvalidRequest(f"{key} is missing")
    if not isinstance(value, str) or not value:
        raise InvalidRequest(f"{key} must be text, found {_kind(value)}; put it in quotes")
    return value


def _kind(value: object) -> str:
    """What a value is, in YAML's words; the value itself may be of any size."""
    words = {dict: "a mapping", list: "a list", str: "a text", type(None): "nothing"}
    return words.get(type(value), f"a value of type {type(value).__name__}")
