"""Regular files below a root: opened without ever leaving it, read in chunks."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from lorax_serve.errors import SourceFailed, SourceReason

__all__ = ["chunks_of", "failure_of", "open_below", "stamp_of"]

_CHUNK = 1 << 20
# O_PATH needs no permission to list the directories on the way; not every system has it.
_WALK = os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC | getattr(os, "O_PATH", os.O_RDONLY)
# A fifo without a writer must not block; its kind is looked at once it is open.
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC

_REASONS = {
    errno.ENOENT: SourceReason.NOT_FOUND,
    errno.ENOTDIR: SourceReason.NOT_FOUND,
    errno.EISDIR: SourceReason.NOT_FOUND,
    errno.ELOOP: SourceReason.NOT_FOUND,
    errno.ENAMETOOLONG: SourceReason.NOT_FOUND,
    errno.EACCES: SourceReason.DENIED,
    errno.EPERM: SourceReason.DENIED,
    errno.ETIMEDOUT: SourceReason.TIMEOUT,
    errno.ESTALE: SourceReason.CHANGED,
}
_ADVICE = {
    SourceReason.NOT_FOUND: "check the path",
    SourceReason.DENIED: "check its permissions",
}


def failure_of(error: OSError, where: str) -> SourceFailed:
    """The failure that an error of the file system stands for.

    Args:
        error: as it was raised.
        where: what the message calls the file.
    """
    reason = _REASONS.get(error.errno or 0, SourceReason.UNAVAILABLE)
    advice = _ADVICE.get(reason, "try again, and check the disk or mount if it stays")
    return SourceFailed(reason, f"{where}: {error.strerror or type(error).__name__}; {advice}")


def open_below(root: str, file: str, where: str) -> int:
    """Open the regular file ``file`` for reading; links are followed as long as they stay inside.

    Args:
        root: an absolute path without links.
        file: an absolute path.
        where: what messages call the file.

    Returns:
        A file descriptor, which the caller closes.

    Raises:
        SourceFailed: DENIED if it leads outside ``root``; the others as the file system has it.
    """
    try:
        # Resolved first and then opened without following links: a link that is put there in
        # between leads nowhere.
        real = Path(os.path.realpath(file, strict=True))
        if not real.is_relative_to(root):
            raise SourceFailed(
                SourceReason.DENIED,
                f"{where}: is a link that leads outside the source; put the file itself there",
            )
        descriptor = _walk(root, real.relative_to(root).parts)
    except OSError as error:
        raise failure_of(error, where) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise SourceFailed(
            SourceReason.NOT_FOUND, f"{where}: is no regular file; put a regular file there"
        )
    return descriptor


def _walk(root: str, parts: tuple[str, ...]) -> int:
    directory = os.open(root, _WALK)
    try:
        for part in parts[:-1]:
            below = os.open(part, _WALK, dir_fd=directory)
            os.close(directory)
            directory = below
        return os.open(parts[-1] if parts else ".", _READ, dir_fd=directory)
    finally:
        os.close(directory)


def chunks_of(descriptor: int, size: int, where: str) -> Iterator[bytes]:
    """The first ``size`` bytes of an open file, fewer if it has no more."""
    while size > 0:
        try:
            chunk = os.read(descriptor, min(size, _CHUNK))
        except OSError as error:
            raise failure_of(error, where) from error
        if not chunk:
            return
        size -= len(chunk)
        yield chunk


def stamp_of(info: os.stat_result) -> str:
    """A string that changes whenever a file is written to or replaced."""
    # The time of modification can be set back (rsync and tar do); that of the change cannot.
    return f"{info.st_mtime_ns:x}.{info.st_ctime_ns:x}.{info.st_size:x}.{info.st_ino:x}"
