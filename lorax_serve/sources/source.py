"""What every source of adapters can do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from lorax_serve.errors import InvalidRequest, SourceReason
from lorax_serve.store.digest import CONFIG_FILE, WEIGHTS_FILE

__all__ = [
    "ADAPTER_FILES",
    "CONFIG_FILE",
    "WEIGHTS_FILE",
    "FetchLimits",
    "Source",
    "WatchableSource",
    "reason_of_status",
    "segments_of",
    "shown",
]

ADAPTER_FILES = (CONFIG_FILE, WEIGHTS_FILE)

_MAX_PATH = 512
_MAX_SHOWN = 400


@dataclass(frozen=True, slots=True)
class FetchLimits:
    """What one fetch may cost.

    Attributes:
        max_bytes: of both files together.
        seconds: of the whole fetch, looked at as the bytes come. It lasts longer where nothing
            comes: by a time-out of the network (the lesser of this and 10 s), or by a call to a
            file system that hangs.
    """

    max_bytes: int
    seconds: float


class Source(Protocol):
    """A place that has adapters: each is a path with ``adapter_config.json`` and
    ``adapter_model.safetensors`` right below it. Methods may be called from several threads.

    Every method raises:
        SourceFailed: whatever a file system or a network does wrong; the message names the URI and
            the file, and holds no credentials.
        InvalidRequest: the path is malformed or leads outside the source.
    """

    @property
    def uri(self) -> str:
        """What the user called it, normalised: absolute, no slash at the end."""

    def signature(self, path: str) -> str:
        """An opaque string that changes when the adapter's content may have changed; reads none of
        that content.

        Args:
            path: of the adapter, relative to the source; "" is the source itself.
        """

    def fetch(self, path: str, into: Path, limits: FetchLimits) -> str:
        """Write the adapter's two files into ``into``; returns the signature of what was written.

        The files belong together: an adapter that changes meanwhile is ``CHANGED``. After an error
        ``into`` may hold parts of files; the caller removes them.

        Args:
            path: of the adapter, relative to the source; "" is the source itself.
            into: an empty directory.
            limits: refused beyond them with ``TOO_LARGE`` or ``TIMEOUT``.
        """


@runtime_checkable
class WatchableSource(Source, Protocol):
    """A source that can say cheaply which adapters it has: a directory, a bucket, not the Hub."""

    def list(self) -> dict[str, str]:
        """Every adapter right below the source, as path -> signature.

        Names that begin with a dot are left out. An adapter with a config and without weights is
        in the list: it may be half written, and its signature changes when the weights come.
        """


def segments_of(path: str, uri: str) -> tuple[str, ...]:
    """The names between a path's slashes, for sources without a file system to resolve it.

    Raises:
        InvalidRequest: a name is empty, "." or "..", or the path is too long or no text.
    """
    if path == "":
        return ()
    segments = tuple(path.split("/"))
    if any(segment in ("", ".", "..") for segment in segments):
        raise InvalidRequest(
            f"path {path[:200]!r} leads outside {uri}: give names with single slashes between "
            "them, none of them '.' or '..'"
        )
    if not path.isprintable():  # lone surrogates and NUL among them
        raise InvalidRequest(f"path {path[:200]!r} holds characters that are no text")
    if len(path.encode()) > _MAX_PATH:
        raise InvalidRequest(f"path {path[:200]!r} is longer than {_MAX_PATH} bytes")
    return segments


def shown(text: str) -> str:
    """``text`` as a message may show it: printable, and not so long that it hides the rest."""
    if not text.isprintable():
        text = text.encode("unicode_escape").decode()
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


def reason_of_status(status: int) -> SourceReason:
    """What an HTTP status that is no success means of a file."""
    if status in (404, 410):
        return SourceReason.NOT_FOUND
    if status == 408:
        return SourceReason.TIMEOUT
    if status == 412:
        return SourceReason.CHANGED
    if status == 429 or status >= 500:
        return SourceReason.UNAVAILABLE
    return SourceReason.DENIED
