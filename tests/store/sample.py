"""Small contents, the way of a load through the store, and a plain model of the catalogue."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lorax_serve.store.catalog import Catalog, Recorded
from lorax_serve.store.content import ContentStore
from lorax_serve.store.digest import CONFIG_FILE, WEIGHTS_FILE, digest_of_bytes
from lorax_serve.store.recovery import remove_unreferenced

CATALOG = "catalog.sqlite"


def files(number: int) -> dict[str, bytes]:
    """The files of the content of that number, a few kilobytes that are like no other's."""
    block = hashlib.sha256(str(number).encode()).digest()
    return {CONFIG_FILE: b'{"r": %d}' % number, WEIGHTS_FILE: block * 100}


def digest(number: int) -> str:
    return digest_of_bytes(*files(number).values())


def size(number: int) -> int:
    return sum(len(data) for data in files(number).values())


def fill(directory: Path, number: int) -> None:
    for name, data in files(number).items():
        (directory / name).write_bytes(data)


def put(content: ContentStore, number: int) -> str:
    with content.stage() as stage:
        fill(stage.path, number)
        return content.commit(stage)


def load(
    content: ContentStore, catalog: Catalog, name: str, number: int, weight: int = 1
) -> Recorded:
    """What a server does before it acknowledges a load, and after."""
    with content.stage() as stage:
        fill(stage.path, number)
        kept = content.commit(stage, digest(number))
        recorded = catalog.record_load(name, kept, source=f"file:{number}", weight=weight)
    remove_unreferenced(content, catalog, recorded.unreferenced)
    return recorded


def unload(content: ContentStore, catalog: Catalog, name: str) -> None:
    remove_unreferenced(content, catalog, catalog.record_unload(name))


def damage(path: Path, at: int = 50) -> None:
    """Flip one bit of a file that is read-only."""
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[at % len(data)] ^= 4
    path.write_bytes(data)


@contextmanager
def quick_directory() -> Iterator[Path]:
    """In memory where there is such a place: thousands of syncs would take minutes on a disk."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as directory:
        yield Path(directory)


class Model:
    """What a catalogue must say: of each name its versions, the current one first."""

    def __init__(self, history: int) -> None:
        self.history = history
        self.names: dict[str, list[tuple[str, int]]] = {}

    def copy(self) -> Model:
        other = Model(self.history)
        other.names = {name: list(versions) for name, versions in self.names.items()}
        return other

    def load(self, name: str, content: str, sequence: int) -> None:
        old = [version for version in self.names.get(name, []) if version[0] != content]
        self.names[name] = [(content, sequence), *old][: self.history + 1]

    def unload(self, name: str) -> None:
        del self.names[name]

    def roll_back(self, name: str, sequence: int, to: int = 1) -> None:
        content, _ = self.names[name].pop(to)
        self.names[name].insert(0, (content, sequence))

    def referenced(self) -> set[str]:
        return {content for versions in self.names.values() for content, _ in versions}


def contents_of(catalog: Catalog) -> dict[str, list[tuple[str, int]]]:
    """What the catalogue says, in the model's form."""
    return {
        record.name: [
            (record.digest, record.sequence),
            *((version.digest, version.sequence) for version in catalog.history(record.name)),
        ]
        for record in catalog.names()
    }
