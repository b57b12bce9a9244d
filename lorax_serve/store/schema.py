"""The catalogue's file: made whole or not at all, and checked before it is trusted."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import quote

from lorax_serve.errors import StoreFailed
from lorax_serve.store.disk import disk_errors, fsync, full_disk, make_directory

__all__ = ["create_database", "open_database", "sqlite_errors"]

_APPLICATION = 0x6C6F7261  # in the file's header: SQLite's field for whose file this is
# What each version has beside the one before it.
_ADDED = {
    2: """
CREATE TABLE unloaded (
    name TEXT NOT NULL PRIMARY KEY,
    source TEXT,
    signature TEXT
);
""",
    3: """
ALTER TABLE names ADD COLUMN fetched TEXT;
ALTER TABLE unloaded ADD COLUMN fetched TEXT;
""",
}
_VERSION = max(_ADDED)
_TABLES = f"""
BEGIN;
CREATE TABLE counter (last_sequence INTEGER NOT NULL CHECK (typeof(last_sequence) = 'integer'));
INSERT INTO counter VALUES (0);
CREATE TABLE names (
    name TEXT NOT NULL PRIMARY KEY,
    digest TEXT NOT NULL CHECK (length(digest) = 64),
    sequence INTEGER NOT NULL UNIQUE CHECK (typeof(sequence) = 'integer'),
    source TEXT,
    path TEXT NOT NULL,
    signature TEXT NOT NULL,
    weight INTEGER NOT NULL CHECK (typeof(weight) = 'integer' AND weight BETWEEN 1 AND 100),
    pinned INTEGER NOT NULL CHECK (pinned IN (0, 1)),
    loaded_at REAL NOT NULL
);
CREATE INDEX names_by_digest ON names (digest);
CREATE TABLE versions (
    name TEXT NOT NULL,
    digest TEXT NOT NULL CHECK (length(digest) = 64),
    sequence INTEGER NOT NULL UNIQUE CHECK (typeof(sequence) = 'integer'),
    loaded_at REAL NOT NULL,
    PRIMARY KEY (name, digest)
);
CREATE INDEX versions_by_digest ON versions (digest);
{"".join(_ADDED.values())}
PRAGMA application_id = {_APPLICATION};
PRAGMA user_version = {_VERSION};
COMMIT;
"""
# What must hold beyond SQLite's own checks: one row counts, above every number that was given.
_SOUND = """
SELECT count(*) = 1 AND min(last_sequence) >= (
    SELECT coalesce(max(sequence), 0)
    FROM (SELECT sequence FROM names UNION ALL SELECT sequence FROM versions)
) FROM counter
"""


def create_database(path: Path) -> bool:
    """Make an empty catalogue if there is none; returns whether it did.

    A rename puts it in place, so an empty or unfinished file is never one that was being made.

    Raises:
        StoreFailed: it was there once: its journal is. Or the disk fails.
        Overloaded: the disk is full.
    """
    with disk_errors(path), sqlite_errors(path):
        if path.exists():
            return False
        if _journal(path).exists():
            raise StoreFailed(
                f"the catalogue {path} is gone, but {_journal(path).name} is there; restore both "
                "from a backup, or remove the state directory to begin with an empty one"
            )
        make_directory(path.parent)
        staged = path.with_name(f"{path.name}.new")
        _journal(staged).unlink(missing_ok=True)
        staged.unlink(missing_ok=True)
        with closing(sqlite3.connect(staged)) as database:
            database.execute("PRAGMA synchronous = EXTRA")
            database.executescript(_TABLES)
        staged.rename(path)
        fsync(path.parent)
    return True


def open_database(path: Path) -> sqlite3.Connection:
    """A checked connection for any thread, without transactions of its own.

    The journal is a rollback journal that is deleted at commit, with ``synchronous = EXTRA``, which
    also syncs the directory then: a transaction that has returned survives a loss of power. A
    write-ahead log would be quicker, but loads are rare, and what was acknowledged would lie in the
    log for a while: a bit that flips there silently ends it, and a copy of the one file lacks it.

    Raises:
        StoreFailed: the file is damaged, a newer version's, or no catalogue.
    """
    with sqlite_errors(path):
        # Never "create": where the file has gone in the meantime, that must be an error.
        database = sqlite3.connect(
            f"file:{quote(str(path))}?mode=rw",
            uri=True,
            isolation_level=None,
            check_same_thread=False,
        )
        try:
            _check(path, database)
            database.execute("PRAGMA journal_mode = DELETE")
            database.execute("PRAGMA synchronous = EXTRA")
            _upgrade(database)
        except BaseException:
            database.close()
            raise
    return database


@contextmanager
def sqlite_errors(path: Path) -> Iterator[None]:
    """Turn SQLite's errors on the catalogue at ``path`` into ``StoreFailed`` and ``Overloaded``."""
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
        if code == sqlite3.SQLITE_FULL:
            raise full_disk(path, str(error)) from error
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            raise _damaged(path, str(error)) from error
        raise StoreFailed(
            f"the catalogue {path} cannot be used: {error}; check that the disk works, that the "
            "server's user may write there, and that no other program has it open"
        ) from error


def _check(path: Path, database: sqlite3.Connection) -> None:
    (application,) = database.execute("PRAGMA application_id").fetchone()
    (version,) = database.execute("PRAGMA user_version").fetchone()
    if application != _APPLICATION:
        raise _damaged(path, "it does not begin as a catalogue does")
    if version > _VERSION:
        raise StoreFailed(
            f"the catalogue {path} has schema {version}, this server knows up to {_VERSION}; use "
            "the newer server that wrote it, or another state directory"
        )
    (pages,), (page,) = (
        database.execute(f"PRAGMA {what}").fetchone() for what in ("page_count", "page_size")
    )
    # SQLite itself does not miss the end of a page without rows.
    if path.stat().st_size != pages * page:
        raise _damaged(path, "its file has been cut or has grown")
    problems = [text for (text,) in database.execute("PRAGMA integrity_check(3)")]
    if problems != ["ok"]:
        raise _damaged(path, "; ".join(problems))
    (sound,) = database.execute(_SOUND).fetchone()
    if version < 1 or not sound:
        raise _damaged(path, "its sequence numbers contradict each other")


def _upgrade(database: sqlite3.Connection) -> None:
    (version,) = database.execute("PRAGMA user_version").fetchone()
    if version < _VERSION:
        added = "".join(_ADDED[each] for each in range(version + 1, _VERSION + 1))
        database.executescript(f"BEGIN; {added} PRAGMA user_version = {_VERSION}; COMMIT;")


def _damaged(path: Path, why: str) -> StoreFailed:
    return StoreFailed(
        f"the catalogue {path} is damaged: {' '.join(why.split())}; restore it from a backup, or "
        "remove the state directory to begin with an empty one"
    )


def _journal(path: Path) -> Path:
    return path.with_name(f"{path.name}-journal")
