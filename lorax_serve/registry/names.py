"""Names of adapters: how they are spelled, and which versions each of them has."""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterator

from lorax_serve.errors import InvalidRequest
from lorax_serve.registry.version import Adapter, AdapterState

__all__ = ["Names", "check_digest", "check_name", "is_name", "split_name"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
# Names in a message; there may be thousands.
_MOST_SHOWN = 8
_DIGEST = re.compile(r"[0-9a-f]{12,64}")


def is_name(text: str) -> bool:
    """Whether an adapter may be called so."""
    return _NAME.fullmatch(text) is not None


def check_name(name: str) -> None:
    """Raise ``InvalidRequest`` if no adapter may be called so."""
    if not is_name(name):
        raise InvalidRequest(
            f"adapter_id {name[:140]!r} is not a valid name: letters, digits, '.', '_' and "
            "'-', at most 128, the first a letter or digit"
        )


def check_digest(digest: str) -> None:
    """Raise ``InvalidRequest`` if no digest begins so."""
    if not _DIGEST.fullmatch(digest):
        raise InvalidRequest(f"digest {digest[:80]!r} must be 12 to 64 hexadecimal digits")


def split_name(adapter_id: str) -> tuple[str, str | None]:
    """``name`` or ``name@digest`` in its parts.

    Raises:
        InvalidRequest: what follows the ``@`` is no digest.
    """
    name, at, digest = adapter_id.partition("@")
    if at and not _DIGEST.fullmatch(digest):
        raise InvalidRequest(
            f"adapter_id {adapter_id[:200]!r}: after '@' come 12 to 64 hexadecimal digits of a "
            "version's digest"
        )
    return name, digest if at else None


class Names:
    """Which version each name means, and which ones it meant before and can mean again.

    Args:
        history: how many earlier versions of a name stay.
    """

    def __init__(self, history: int) -> None:
        self._history = history
        self._current: dict[str, Adapter] = {}
        self._earlier: dict[str, dict[str, Adapter]] = {}
        """By name and digest, the oldest first."""

    def __contains__(self, name: str) -> bool:
        return name in self._current

    def __iter__(self) -> Iterator[Adapter]:
        """All versions, the current ones first."""
        yield from self._current.values()
        for versions in self._earlier.values():
            yield from versions.values()

    def __str__(self) -> str:
        if not self._current:
            return "no adapter is loaded"
        shown = heapq.nsmallest(_MOST_SHOWN, self._current)
        more = len(self._current) - len(shown)
        return f"loaded: {', '.join(shown)}{f' and {more} more' if more else ''}"

    def get(self, name: str) -> Adapter | None:
        """What the name means now."""
        return self._current.get(name)

    def find(self, name: str, digest: str | None) -> Adapter | None:
        """What the name means now, or its version whose digest begins so."""
        current = self._current.get(name)
        if digest is None or current is None:
            return current
        versions = [current, *self._earlier.get(name, {}).values()]
        return next((each for each in versions if each.info.digest.startswith(digest)), None)

    def earlier(self, name: str, digest: str) -> Adapter | None:
        """A name's earlier version."""
        return self._earlier.get(name, {}).get(digest)

    def add_earlier(self, adapter: Adapter) -> None:
        """Take a version that its name meant before."""
        self._earlier.setdefault(adapter.name, {})[adapter.info.digest] = adapter

    def put(self, adapter: Adapter) -> list[Adapter]:
        """Let the adapter's name mean it from now on; returns the versions that are left over."""
        before = self._current.get(adapter.name)
        adapter.state = AdapterState.READY
        self._current[adapter.name] = adapter
        earlier = self._earlier.setdefault(adapter.name, {})
        twin = earlier.pop(adapter.info.digest, None)
        left_over = [] if twin in (None, adapter) else [twin]
        if before is not None:
            before.state = AdapterState.SUPERSEDED
            earlier[before.info.digest] = before
        while len(earlier) > self._history:
            left_over.append(earlier.pop(next(iter(earlier))))
        if not earlier:
            del self._earlier[adapter.name]
        return [each for each in left_over if each is not None]

    def remove(self, name: str) -> list[Adapter]:
        """Let the name mean nothing; returns its versions."""
        return [self._current.pop(name), *self._earlier.pop(name, {}).values()]
