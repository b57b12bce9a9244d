"""Adapters in a directory: a local disk, a shared mount, a volume of Kubernetes."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lorax_serve.errors import InvalidRequest, SourceFailed, SourceReason
from lorax_serve.sources.files import chunks_of, failure_of, open_below, stamp_of
from lorax_serve.sources.source import (
    ADAPTER_FILES,
    CONFIG_FILE,
    WEIGHTS_FILE,
    FetchLimits,
)
from lorax_serve.sources.transfer import Transfer, place

__all__ = ["DirectorySource"]

# What one directory can have wrong with it, other than the whole file system: no adapter there.
_NO_ADAPTER = frozenset(
    {errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG}
)


class DirectorySource:
    """The directories below a root, which nothing that is read ever leaves.

    Args:
        root: need not exist yet. It may be a link, which is followed anew at every call: pointing
            it elsewhere replaces all adapters at once.
    """

    def __init__(self, root: Path) -> None:
        self._root = Path(os.path.abspath(root))
        self._uri = self._root.as_uri()

    @property
    def uri(self) -> str:
        """``file:///...``."""
        return self._uri

    def list(self) -> dict[str, str]:
        """See ``WatchableSource``."""
        try:
            with os.scandir(self._root) as entries:
                found = {
                    entry.name: _listed(self._root / entry.name)
                    for entry in entries
                    if not entry.name.startswith(".")
                }
        except OSError as error:
            raise failure_of(error, self._uri) from error
        return {name: signature for name, signature in found.items() if signature is not None}

    def signature(self, path: str) -> str:
        """See ``Source``."""
        with self._opened(path) as files:
            return _signature(files)

    def fetch(self, path: str, into: Path, limits: FetchLimits) -> str:
        """See ``Source``."""
        transfer = Transfer(place(self._uri, path), into, limits)
        with self._opened(path) as files:
            signature = _signature(files)
            for name, descriptor in files.items():
                size = os.fstat(descriptor).st_size
                where = place(self._uri, path, name)
                transfer.write(name, size, chunks_of(descriptor, size, where))
        if self.signature(path) != signature:
            raise SourceFailed(
                SourceReason.CHANGED,
                f"{place(self._uri, path)}: was written to while it was read; try again",
            )
        return signature

    @contextmanager
    def _opened(self, path: str) -> Iterator[dict[str, int]]:
        """The adapter's files by name, open for reading."""
        root, directory = self._locate(path)
        files: dict[str, int] = {}
        try:
            for name in ADAPTER_FILES:
                where = place(self._uri, path, name)
                files[name] = open_below(root, os.path.join(directory, name), where)
            yield files
        finally:
            for descriptor in files.values():
                os.close(descriptor)

    def _locate(self, path: str) -> tuple[str, str]:
        """The root and the adapter's directory, both without links."""
        where = place(self._uri, path)
        try:
            root = os.path.realpath(self._root, strict=True)
            directory = Path(os.path.realpath(os.path.join(root, path)))
            if not directory.is_relative_to(root):
                raise InvalidRequest(f"path {path[:200]!r} leads outside {self._uri}")
            real = os.path.realpath(directory, strict=True)
            if not os.path.isdir(real):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        except OSError as error:
            raise failure_of(error, where) from error
        except ValueError as error:  # NUL, or a lone surrogate
            raise InvalidRequest(
                f"path {path[:200]!r} holds characters that no file's name can have"
            ) from error
        return root, real


def _listed(directory: Path) -> str | None:
    """The signature of an adapter, None if the directory is none."""
    try:
        stamps = [stamp_of(os.stat(directory / CONFIG_FILE))]
    except OSError as error:
        if error.errno in _NO_ADAPTER:
            return None
        raise
    try:
        stamps.append(stamp_of(os.stat(directory / WEIGHTS_FILE)))
    except OSError as error:
        if error.errno not in _NO_ADAPTER:
            raise
        stamps.append("absent")
    return "-".join(stamps)


def _signature(files: dict[str, int]) -> str:
    return "-".join(stamp_of(os.fstat(descriptor)) for descriptor in files.values())
