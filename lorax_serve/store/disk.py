"""How files become durable, how a directory is held by one process, and how disks fail."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from lorax_serve.errors import LoraxError, Overloaded, StoreFailed

__all__ = ["disk_errors", "fsync", "full_disk", "lock_file", "make_directory"]

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Around what reads or writes below ``path``, the writing of staged files included.

    Raises:
        Overloaded: instead of an ``OSError``: the disk, a quota or the largest file size is full.
        StoreFailed: instead of any other ``OSError``.
    """
    try:
        yield
    except OSError as error:
        raise _error_of(error, path) from error


def full_disk(path: Path, why: str) -> Overloaded:
    """The error for a disk that takes no more."""
    return Overloaded(
        f"there is no room to write in {path}: {why}; what was acknowledged is kept; free space on "
        "that disk, then try again"
    )


def fsync(path: Path) -> None:
    """Have a file's content, or a directory's entries, survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(path: Path) -> None:
    """Make ``path`` and what is missing above it, durably; it may exist."""
    if path.is_dir():
        return
    make_directory(path.parent)
    path.mkdir(exist_ok=True)
    fsync(path.parent)


def lock_file(path: Path) -> BinaryIO | None:
    """An open file that holds its own lock until it is closed or the process ends, however it ends;
    None if another one holds it."""
    file = path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    except BaseException:
        file.close()
        raise
    return file


def _error_of(error: OSError, path: Path) -> LoraxError:
    why = error.strerror or str(error)
    if error.errno in _FULL:
        return full_disk(path, why)
    if error.errno in _FORBIDDEN:
        return StoreFailed(
            f"{path} cannot be used: {why}; make it writable for the server's user, or choose "
            "another state directory"
        )
    where = error.filename or path
    return StoreFailed(f"{path} cannot be used: {where}: {why}; check the disk and the directory")
