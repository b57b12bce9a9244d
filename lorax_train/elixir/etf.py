"""Erlang's external term format, as much of it as holds tensors.

Source: the Erlang/OTP documentation, ERTS, "External Term Format". Functions, processes, references
and ports are refused, and so are terms that are deeper, larger or more than tensors need. An atom
is a string here: reading a term creates nothing that stays.
"""

from __future__ import annotations

import struct
import zlib
from enum import IntEnum
from typing import Any

from lorax_serve.errors import TrainingError

__all__ = ["VERSION", "Atom", "read_term"]

VERSION = 131
"""The first byte."""
_COMPRESSED = 80
_MAX_DEPTH = 32
_MAX_TERMS = 200_000
_MAX_ATOMS = 10_000
_MAX_BYTES = 1 << 30  # of a compressed term


class _Tag(IntEnum):
    """What the next part of a term is."""

    NEW_FLOAT = 70
    SMALL_INTEGER = 97
    INTEGER = 98
    ATOM = 100
    SMALL_TUPLE = 104
    LARGE_TUPLE = 105
    NIL = 106
    STRING = 107
    LIST = 108
    BINARY = 109
    SMALL_BIG = 110
    SMALL_ATOM = 115
    MAP = 116
    ATOM_UTF8 = 118
    SMALL_ATOM_UTF8 = 119


class Atom(str):
    """A name; as a string without its colon, and Elixir's modules with their ``Elixir.``."""

    __slots__ = ()


def read_term(data: bytes) -> Any:
    """Read one term, and all of ``data``.

    Returns:
        int, float, ``Atom``, bytes for a binary, tuple, list, or dict with keys that are atoms,
        binaries or integers.

    Raises:
        TrainingError: it is damaged, cut short, or holds what is not read.
    """
    if data[:1] != bytes([VERSION]):
        raise TrainingError("it does not begin as an Erlang term does (with byte 131)")
    body = data[1:]
    if body[:1] == bytes([_COMPRESSED]):
        body = _decompressed(body[1:])
    reader = _Reader(body)
    term = reader.term(0)
    if reader.at != len(body):
        raise TrainingError(f"{len(body) - reader.at} bytes follow its term")
    return term


def _decompressed(data: bytes) -> bytes:
    size = int.from_bytes(data[:4], "big")
    if len(data) < 4 or size > _MAX_BYTES:
        raise TrainingError(f"its compressed term says to be larger than {_MAX_BYTES} bytes")
    inflate = zlib.decompressobj()
    try:
        body = inflate.decompress(data[4:], size + 1)  # no more is made, whatever is in it
    except zlib.error as error:
        raise TrainingError(f"its compressed term is damaged: {error}") from error
    if len(body) != size or not inflate.eof or inflate.unused_data:
        raise TrainingError(f"its compressed term does not hold the {size} bytes that it says")
    return body


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0
        self.terms = 0
        self.atoms: set[str] = set()

    def term(self, depth: int) -> Any:
        self.terms += 1
        if depth > _MAX_DEPTH or self.terms > _MAX_TERMS:
            raise TrainingError("its term is deeper or has more parts than tensors need")
        tag = self._number(1)
        match tag:
            case _Tag.SMALL_INTEGER:
                return self._number(1)
            case _Tag.INTEGER:
                return int.from_bytes(self._take(4), "big", signed=True)
            case _Tag.SMALL_BIG:
                return self._big()
            case _Tag.NEW_FLOAT:
                return struct.unpack(">d", self._take(8))[0]
            case _Tag.ATOM_UTF8:
                return self._atom(self._number(2), "utf-8")
            case _Tag.SMALL_ATOM_UTF8:
                return self._atom(self._number(1), "utf-8")
            case _Tag.ATOM:
                return self._atom(self._number(2), "latin-1")
            case _Tag.SMALL_ATOM:
                return self._atom(self._number(1), "latin-1")
            case _Tag.SMALL_TUPLE:
                return tuple(self._items(self._number(1), depth))
            case _Tag.LARGE_TUPLE:
                return tuple(self._items(self._number(4), depth))
            case _Tag.NIL:
                return []
            case _Tag.STRING:
                return list(self._take(self._number(2)))
            case _Tag.LIST:
                items = self._items(self._number(4), depth)
                if self.term(depth + 1) != []:
                    raise TrainingError("its term has a list without an end")
                return items
            case _Tag.BINARY:
                return self._take(self._number(4))
            case _Tag.MAP:
                return self._map(depth)
        raise TrainingError(f"its term has a part of kind {tag}, which tensors do not need")

    def _take(self, count: int) -> bytes:
        part = self.data[self.at : self.at + count]
        if len(part) != count:
            raise TrainingError("it is cut short")
        self.at += count
        return part

    def _number(self, width: int) -> int:
        return int.from_bytes(self._take(width), "big")

    def _items(self, count: int, depth: int) -> list[Any]:
        if count > len(self.data) - self.at:  # each takes a byte at least
            raise TrainingError("it is cut short")
        return [self.term(depth + 1) for _ in range(count)]

    def _big(self) -> int:
        count, sign = self._number(1), self._number(1)
        value = int.from_bytes(self._take(count), "little")
        return -value if sign else value

    def _atom(self, length: int, encoding: str) -> Atom:
        try:
            name = self._take(length).decode(encoding)
        except UnicodeDecodeError as error:
            raise TrainingError("its term has an atom that is no text") from error
        self.atoms.add(name)
        if len(name) > 255 or len(self.atoms) > _MAX_ATOMS:
            raise TrainingError("its term has longer or more atoms than tensors need")
        return Atom(name)

    def _map(self, depth: int) -> dict[Any, Any]:
        found: dict[Any, Any] = {}
        count = self._number(4)
        if count > len(self.data) - self.at:
            raise TrainingError("it is cut short")
        for _ in range(count):
            key = self.term(depth + 1)
            if not isinstance(key, str | bytes | int) or key in found:
                raise TrainingError("its term has a map with a key that is no name, or there twice")
            found[key] = self.term(depth + 1)
        return found
