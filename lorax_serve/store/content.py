"""Adapters on disk by digest: whole or not there, whenever the process or the machine stops.

::

    <root>/lorax.lock            held by the one process that uses the directory
    <root>/staging/<random>/     being written, or being deleted; emptied at opening
    <root>/adapters/<digest>/    both files, read-only, never changed

An entry appears and disappears below ``adapters`` by one rename of a directory whose bytes are on
the disk already. Knows nothing of names: which content is still needed is the catalogue's to say.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from lorax_serve.errors import AdapterRejected, RejectReason, StoreFailed
from lorax_serve.store.digest import CONFIG_FILE, WEIGHTS_FILE, digest_of, is_digest
from lorax_serve.store.disk import disk_errors, fsync, lock_file, make_directory

__all__ = ["ContentStore", "Stage"]

_FILES = (CONFIG_FILE, WEIGHTS_FILE)
# What reading an entry raises when it is damaged; other errors are those of the process.
_DAMAGE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO}


@dataclass(slots=True, eq=False)
class Stage:
    """A private directory to write one adapter's files in.

    Attributes:
        path: the directory, gone once committed. Write below ``disk_errors(stage.path)``.
        digest: of what was committed; None until then.
    """

    path: Path
    digest: str | None = None


class ContentStore:
    """The adapters of one state directory. All methods may be called from any thread.

    Content is committed before it is recorded in a catalogue. Until its stage is left it is held:
    ``remove`` leaves it alone. So a load records within the stage's block, and nobody else's
    removal of the same content comes between.

    Args:
        root: the state directory, created if absent. What earlier processes left in its staging
            directory is deleted.

    Raises:
        StoreFailed: another process uses the directory, it belongs to something else, or it cannot
            be written.
        Overloaded: the disk is full.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self._adapters = self.root / "adapters"
        self._staging = self.root / "staging"
        self._mutex = threading.Lock()
        self._held: Counter[str] = Counter()
        with disk_errors(self.root):
            make_directory(self.root)
            self._lock = self._take_lock()
            try:
                if self._staging.exists():
                    shutil.rmtree(self._staging)
                make_directory(self._staging)
                make_directory(self._adapters)
            except BaseException:
                self.close()
                raise

    def __enter__(self) -> ContentStore:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let another process use the directory."""
        self._lock.close()

    @contextmanager
    def stage(self) -> Iterator[Stage]:
        """A directory to write in; what is not committed by the end of the block is deleted.

        Raises:
            StoreFailed, Overloaded: the directory cannot be made.
        """
        with disk_errors(self._staging):
            stage = Stage(self._private())
        try:
            yield stage
        finally:
            if stage.digest is not None:
                with self._mutex:
                    self._held -= Counter({stage.digest: 1})
            # What cannot be deleted now is deleted at the next opening.
            shutil.rmtree(stage.path, ignore_errors=True)

    def commit(self, stage: Stage, expected: str | None = None) -> str:
        """Keep what was staged, once; on return it survives a loss of power.

        Its two files are kept. Whatever else a download left beside them is dropped: the digest
        does not cover it. Nobody may write to the files any more. The same content is kept once;
        if the copy that is there has been damaged, this one takes its place.

        Args:
            stage: has both files, as files of its own: no links of either kind.
            expected: the digest that the files must have.

        Returns:
            The digest of the bytes on disk.

        Raises:
            AdapterRejected: a file is missing or a link, or the digest is not the expected one.
            StoreFailed, Overloaded: the disk fails or is full. What was kept all the same is
                content that nothing refers to.
        """
        assert stage.digest is None, "a stage is committed once"
        with disk_errors(self.root):
            for name in _FILES:
                _seal(stage.path / name)
            for other in stage.path.iterdir():
                if other.name not in _FILES:
                    _delete(other)
            digest = digest_of(stage.path)
            if expected not in (None, digest):
                raise AdapterRejected(
                    RejectReason.BAD_FILE,
                    f"the adapter's files have the digest {digest}, not {expected} as expected; "
                    "they were damaged or changed on their way, send or load them again",
                )
            fsync(stage.path)
            with self._mutex:
                entry = self._adapters / digest
                if not self.verify(digest):
                    if os.path.lexists(entry):
                        _delete(self._take_away(entry))
                    stage.path.rename(entry)
                # Also if it was there: the rename of whoever put it there may not be on disk yet.
                fsync(self._adapters)
                self._held[digest] += 1
                stage.digest = digest
        return digest

    def path(self, digest: str) -> Path:
        """The directory of this content, to be read only.

        Raises:
            StoreFailed: it is not there.
        """
        if digest not in self:
            raise StoreFailed(
                f"{self._adapters} has no whole content {digest}; load the adapter again"
            )
        return self._adapters / digest

    def __contains__(self, digest: str) -> bool:
        entry = self._adapters / digest
        return is_digest(digest) and all((entry / name).is_file() for name in _FILES)

    def digests(self) -> set[str]:
        """What is kept, damaged content included; read from the disk."""
        with disk_errors(self._adapters):
            return {name for name in os.listdir(self._adapters) if is_digest(name)}

    @property
    def nbytes(self) -> int:
        """Bytes of all files that are kept; read from the disk."""
        return sum(_size(self._adapters / digest) for digest in self.digests())

    def verify(self, digest: str) -> bool:
        """Whether the content is there and its bytes still have this digest; reads all of them.

        Raises:
            StoreFailed: it may not be read.
        """
        if digest not in self:
            return False
        with disk_errors(self._adapters / digest):
            try:
                return digest_of(self._adapters / digest) == digest
            except OSError as error:
                if error.errno in _DAMAGE:
                    return False
                raise

    def remove(self, digest: str, unless: Callable[[str], bool] | None = None) -> int:
        """Delete content; returns the bytes that this frees, 0 if there is nothing to delete.

        Args:
            digest: the content. It stays while a stage that committed it is open.
            unless: asked last, while no commit can come between; the content stays if it is true.

        Raises:
            StoreFailed, Overloaded: the disk fails. The content is there still, or what is left of
                it is deleted at the next opening.
        """
        entry = self._adapters / digest
        with disk_errors(self.root):
            with self._mutex:
                if not is_digest(digest) or self._held[digest] > 0 or not os.path.lexists(entry):
                    return 0
                # Asked after what is held: a load records first and lets go then.
                if unless is not None and unless(digest):
                    return 0
                doomed = self._take_away(entry)
            freed = _size(doomed / digest)
            _delete(doomed)
        return freed

    def _take_lock(self) -> BinaryIO:
        path = self.root / "lorax.lock"
        if not path.exists() and (self._staging.exists() or self._adapters.exists()):
            raise StoreFailed(
                f"{self.root} is no state directory of this server: it has adapters/ or staging/, "
                "but no lorax.lock; choose an empty directory"
            )
        lock = lock_file(path)
        if lock is None:
            raise StoreFailed(
                f"the state directory {self.root} is in use by another server; stop that one, or "
                "give this one a directory of its own"
            )
        return lock

    def _take_away(self, entry: Path) -> Path:
        """Move an entry into a staging directory, from which it may be deleted file by file."""
        directory = self._private()
        entry.rename(directory / entry.name)
        # Or a loss of power could bring the entry back with some of its files deleted.
        fsync(self._adapters)
        return directory

    def _private(self) -> Path:
        return Path(tempfile.mkdtemp(dir=self._staging))


def _seal(path: Path) -> None:
    """Make a staged file read-only and durable."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise AdapterRejected(
            RejectReason.MISSING_FILE, f"there is no {path.name} among the adapter's files"
        ) from error
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise _link(path) from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
            raise _link(path)
        os.fchmod(descriptor, 0o444)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _link(path: Path) -> AdapterRejected:
    return AdapterRejected(
        RejectReason.BAD_FILE, f"{path.name} must be a file of its own, not a link or a directory"
    )


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _size(entry: Path) -> int:
    size = 0
    for name in _FILES:
        with suppress(FileNotFoundError, NotADirectoryError):
            size += (entry / name).stat().st_size
    return size
