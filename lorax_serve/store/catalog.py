"""The catalogue: which content answers to which name, and what did before.

Each change is one transaction: on return it survives ``kill -9`` and a loss of power, and if it
raises, nothing has changed. Content that nothing refers to any longer is named to the caller, who
removes it from the content store; it may do so late or never, ``recover`` finds it. Source, path
and signature are the caller's words; they are kept, not understood.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from lorax_serve.errors import AdapterConflict, AdapterNotFound, InvalidRequest
from lorax_serve.store.schema import create_database, open_database, sqlite_errors

__all__ = ["Catalog", "NameRecord", "Recorded", "Unloaded", "Version"]

_COLUMNS = "name, digest, sequence, source, path, signature, weight, pinned, loaded_at, fetched"
_MAX_WEIGHT = 100


class NameRecord(NamedTuple):
    """What a name means now."""

    name: str
    digest: str
    sequence: int
    """The load's number on this server: each is larger than all before, also across restarts."""
    source: str | None
    """Where the name's content was last fetched from; None if it was uploaded."""
    path: str
    """Within the source."""
    signature: str
    """Of what was last fetched, which a roll back leaves as it is: what the source has now is known
    already, and is not fetched again until it changes."""
    weight: int
    pinned: bool
    loaded_at: float
    """Unix time."""
    fetched: str | None = None
    """The digest of what was last fetched, which the signature is of; None if it is not known."""


class Version(NamedTuple):
    """What a name meant before."""

    digest: str
    sequence: int
    loaded_at: float


class Unloaded(NamedTuple):
    """A name that was unloaded, and what its source had then."""

    name: str
    source: str | None
    signature: str | None
    """None if it is not known: what the name meant came from elsewhere."""
    fetched: str | None = None
    """The digest that the signature is of; None if it is not known."""


class Recorded(NamedTuple):
    """A load that has been recorded, and the content that no name and no history needs now."""

    sequence: int
    unreferenced: frozenset[str]


class Catalog:
    """The names of one server. All methods may be called from any thread; they run one by one.

    Whoever opens it holds the ``ContentStore`` of the same state directory first: its lock keeps
    other servers away.

    Args:
        path: the database file, created if absent.
        history: how many earlier versions of a name are kept beside the current one; what is
            more goes at opening.
        clock: gives Unix time.

    Attributes:
        created: whether there was no catalogue before.

    Raises:
        StoreFailed: the file is damaged, a newer version's, no catalogue, or cannot be used.
        Overloaded: the disk is full.
    """

    def __init__(
        self, path: Path, history: int = 4, clock: Callable[[], float] = time.time
    ) -> None:
        assert history >= 0
        self._path = path.absolute()
        self._history = history
        self._clock = clock
        self._mutex = threading.Lock()
        self.created = create_database(self._path)
        self._database = open_database(self._path)
        try:
            with self._transaction():
                for record in self._select(""):
                    self._trim(record.name)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Catalog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the database; nothing is written by this."""
        with self._mutex:
            self._database.close()

    def record_load(
        self,
        name: str,
        digest: str,
        *,
        source: str | None = None,
        path: str = "",
        signature: str = "",
        weight: int = 1,
        pinned: bool = False,
    ) -> Recorded:
        """``name`` means ``digest`` from now on; what it meant before goes into its history.

        A digest is in a name's history at most once, and never while it is the current one.

        Raises:
            InvalidRequest: ``weight`` is not 1 to 100, or a text cannot be stored.
            StoreFailed, Overloaded: the disk fails or is full.
        """
        _check_weight(weight)
        with self._transaction():
            before = self._digests_of(name)
            sequence = self._advance(name, digest)
            self._database.execute("DELETE FROM names WHERE name = ?", (name,))
            self._database.execute(
                f"INSERT INTO names ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                NameRecord(
                    name,
                    digest,
                    sequence,
                    source,
                    path,
                    signature,
                    weight,
                    pinned,
                    self._clock(),
                    None if source is None else digest,
                ),
            )
            self._database.execute("DELETE FROM unloaded WHERE name = ?", (name,))
            self._trim(name)
            return Recorded(sequence, self._unreferenced(before))

    def record_unload(self, name: str) -> frozenset[str]:
        """Forget a name and its history; returns the content that nothing needs now.

        That it was unloaded is remembered until it is loaded again.

        Raises:
            AdapterNotFound: the name is not in the catalogue.
            StoreFailed, Overloaded: the disk fails or is full.
        """
        with self._transaction():
            record = self._known(name)
            before = self._digests_of(name)
            self._database.execute("DELETE FROM names WHERE name = ?", (name,))
            self._database.execute("DELETE FROM versions WHERE name = ?", (name,))
            own = record.source is not None and record.path == name
            signature, fetched = (record.signature, record.fetched) if own else (None, None)
            self._set_unloaded(name, record.source, signature, fetched)
            return self._unreferenced(before)

    def roll_back(self, name: str, to: str | None = None) -> NameRecord:
        """Make ``name`` mean an earlier version again, as a load with a number of its own.

        The current version changes places with it, so that rolling back twice changes nothing but
        the numbers. All content stays in use.

        Args:
            name: an adapter.
            to: a digest in its history; None is the latest.

        Raises:
            AdapterNotFound: the name is not in the catalogue.
            AdapterConflict: its history is empty, or does not have that digest.
            StoreFailed, Overloaded: the disk fails or is full.
        """
        with self._transaction():
            current = self._known(name)
            earlier = [version.digest for version in self._versions(name)]
            if not earlier:
                raise AdapterConflict(f"adapter {name!r} has no earlier version to go back to")
            digest = earlier[0] if to is None else to
            if digest not in earlier:
                now = " now" if digest == current.digest else ""
                raise AdapterConflict(
                    f"adapter {name!r} cannot go back to {digest!r}, which is not an earlier "
                    f"version of it{now}; these are: {', '.join(earlier)}"
                )
            sequence = self._advance(name, digest)
            self._database.execute(
                "UPDATE names SET digest = ?, sequence = ?, loaded_at = ? WHERE name = ?",
                (digest, sequence, self._clock(), name),
            )
            return self._known(name)

    def set_weight(self, name: str, weight: int) -> None:
        """Set a name's share of a busy server.

        Raises:
            InvalidRequest: ``weight`` is not 1 to 100.
            AdapterNotFound: the name is not in the catalogue.
            StoreFailed, Overloaded: the disk fails or is full.
        """
        _check_weight(weight)
        self._set(name, "weight", weight)

    def set_pinned(self, name: str, pinned: bool) -> None:
        """Set whether a name is pinned.

        Raises:
            AdapterNotFound: the name is not in the catalogue.
            StoreFailed, Overloaded: the disk fails or is full.
        """
        self._set(name, "pinned", pinned)

    def set_origin(self, name: str, source: str | None, path: str, signature: str) -> None:
        """Record that the content which a name has was found there; it is no load.

        Raises:
            InvalidRequest: a text cannot be stored.
            AdapterNotFound: the name is not in the catalogue.
            StoreFailed, Overloaded: the disk fails or is full.
        """
        with self._transaction():
            digest = self._known(name).digest
            self._set_origin(name, source, path, signature, None if source is None else digest)

    def set_unloaded(self, name: str, source: str, signature: str) -> None:
        """Note what a source has of a name that was unloaded.

        Raises:
            StoreFailed, Overloaded: the disk fails or is full.
        """
        with self._transaction():
            self._set_unloaded(name, source, signature, None)

    def turns_down(self, name: str, digest: str, source: str, signature: str) -> bool:
        """Whether somebody has turned away from what a source has of ``name``: the name was rolled
        back from that content, or unloaded while the source had it. Then the source's signature is
        noted, so that the content is not fetched again until it changes.

        Raises:
            InvalidRequest: a text cannot be stored.
            StoreFailed, Overloaded: the disk fails or is full.
        """
        with self._transaction():
            for record in self._select("WHERE name = ?", name):
                if digest == record.digest or digest != record.fetched:
                    return False
                self._set_origin(name, source, record.path, signature, digest)
                return True
            query = "SELECT EXISTS (SELECT 1 FROM unloaded WHERE name = ? AND fetched = ?)"
            unloaded: bool = self._database.execute(query, (name, digest)).fetchone()[0]
            if unloaded:
                self._set_unloaded(name, source, signature, digest)
            return bool(unloaded)

    def unloaded(self) -> list[Unloaded]:
        """The names that were unloaded and not loaded again since."""
        with self._reading():
            rows = self._database.execute("SELECT name, source, signature, fetched FROM unloaded")
            return [Unloaded(*row) for row in rows]

    def names(self) -> list[NameRecord]:
        """Every name, in their alphabetical order."""
        with self._reading():
            return self._select("ORDER BY name")

    def get(self, name: str) -> NameRecord | None:
        """What a name means; None if it is not in the catalogue."""
        with self._reading():
            return next(iter(self._select("WHERE name = ?", name)), None)

    def history(self, name: str) -> list[Version]:
        """What a name meant before, the latest first; empty if it is not in the catalogue."""
        with self._reading():
            return self._versions(name)

    def referenced(self) -> set[str]:
        """All content that a name or a history needs."""
        query = "SELECT digest FROM names UNION SELECT digest FROM versions"
        with self._reading():
            return {digest for (digest,) in self._database.execute(query)}

    def is_referenced(self, digest: str) -> bool:
        """Whether a name or a history needs this content."""
        with self._reading():
            return self._is_referenced(digest)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        with self._mutex, sqlite_errors(self._path):
            yield

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._reading():
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._database.execute("COMMIT")
            except BaseException as error:
                # After some errors SQLite has rolled back by itself.
                if self._database.in_transaction:
                    self._database.execute("ROLLBACK")
                if isinstance(error, UnicodeEncodeError):
                    raise InvalidRequest(f"{error.object!r} cannot be stored as UTF-8") from error
                raise

    def _select(self, condition: str, *values: str) -> list[NameRecord]:
        rows = self._database.execute(f"SELECT {_COLUMNS} FROM names {condition}", values)
        return [NameRecord(*row)._replace(pinned=bool(row[7])) for row in rows]

    def _known(self, name: str) -> NameRecord:
        for record in self._select("WHERE name = ?", name):
            return record
        raise AdapterNotFound(f"adapter {name!r} is not in the catalogue {self._path}")

    def _versions(self, name: str) -> list[Version]:
        query = (
            "SELECT digest, sequence, loaded_at FROM versions WHERE name = ? ORDER BY sequence DESC"
        )
        return [Version(*row) for row in self._database.execute(query, (name,))]

    def _advance(self, name: str, digest: str) -> int:
        """Keep what ``name`` means as an earlier version, and draw the next load's number."""
        self._database.execute(
            "INSERT INTO versions (name, digest, sequence, loaded_at) "
            "SELECT name, digest, sequence, loaded_at FROM names WHERE name = ?",
            (name,),
        )
        self._database.execute("DELETE FROM versions WHERE name = ? AND digest = ?", (name, digest))
        self._database.execute("UPDATE counter SET last_sequence = last_sequence + 1")
        sequence: int = self._database.execute("SELECT last_sequence FROM counter").fetchone()[0]
        return sequence

    def _trim(self, name: str) -> None:
        self._database.execute(
            "DELETE FROM versions WHERE name = ? AND sequence NOT IN (SELECT sequence FROM "
            "versions WHERE name = ? ORDER BY sequence DESC LIMIT ?)",
            (name, name, self._history),
        )

    def _digests_of(self, name: str) -> set[str]:
        query = (
            "SELECT digest FROM names WHERE name = ? "
            "UNION SELECT digest FROM versions WHERE name = ?"
        )
        return {digest for (digest,) in self._database.execute(query, (name, name))}

    def _is_referenced(self, digest: str) -> bool:
        query = "SELECT EXISTS (SELECT 1 FROM {} WHERE digest = ?)"
        return any(
            self._database.execute(query.format(table), (digest,)).fetchone()[0]
            for table in ("names", "versions")
        )

    def _unreferenced(self, digests: set[str]) -> frozenset[str]:
        return frozenset(digest for digest in digests if not self._is_referenced(digest))

    def _set_origin(
        self, name: str, source: str | None, path: str, signature: str, fetched: str | None
    ) -> None:
        self._database.execute(
            "UPDATE names SET source = ?, path = ?, signature = ?, fetched = ? WHERE name = ?",
            (source, path, signature, fetched, name),
        )

    def _set_unloaded(
        self, name: str, source: str | None, signature: str | None, fetched: str | None
    ) -> None:
        self._database.execute(
            "INSERT OR REPLACE INTO unloaded (name, source, signature, fetched) "
            "VALUES (?, ?, ?, ?)",
            (name, source, signature, fetched),
        )

    def _set(self, name: str, column: str, value: int) -> None:
        with self._transaction():
            self._known(name)
            self._database.execute(f"UPDATE names SET {column} = ? WHERE name = ?", (value, name))


def _check_weight(weight: int) -> None:
    if not 1 <= weight <= _MAX_WEIGHT:
        raise InvalidRequest(f"weight must be 1 to {_MAX_WEIGHT}, found {weight}")
