"""A source, a state directory, and servers' registries on them one after the other."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from lorax_serve.core import AdapterInfo, Freed
from lorax_serve.errors import AdapterRejected, RejectReason
from lorax_serve.registry.library import Library
from lorax_serve.registry.reconciler import Reconciler
from lorax_serve.registry.registry import AdapterRegistry
from lorax_serve.report import LoadReport
from lorax_serve.sources import FetchLimits, open_source
from lorax_serve.store.digest import CONFIG_FILE, WEIGHTS_FILE, digest_of
from tests.registry.bare_engine import BareEngine

__all__ = ["Engine", "Place", "overwrite"]


def overwrite(path: Path, content: bytes) -> None:
    """Write to a file that is read-only."""
    path.chmod(0o644)
    path.write_bytes(content)


class Engine(BareEngine):
    """Reads the digest of a directory; refuses weights that say ``bad``."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[int, str] = {}
        self.loads = 0

    async def load_adapter(self, version: int, path: str) -> AdapterInfo:
        await asyncio.sleep(0)
        self.loads += 1
        if (Path(path) / WEIGHTS_FILE).read_bytes() == b"bad":
            raise AdapterRejected(RejectReason.BAD_FILE, "it is bad")
        digest = self.held[version] = digest_of(Path(path))
        return AdapterInfo(digest, 4, 2, 100)

    async def inspect_adapter(self, path: str) -> LoadReport:
        return LoadReport(digest=digest_of(Path(path)))

    async def drop_adapter(self, version: int) -> Freed:
        del self.held[version]
        self.pinned.discard(version)
        return Freed(host=100)


class Place:
    """A source and a state directory, and servers on them one after the other."""

    def __init__(self, root: Path) -> None:
        self.source, self.state = root / "source", root / "state"
        self.source.mkdir()
        self.engine = Engine()
        self.libraries: list[Library] = []
        self.now = 0.0

    def write(self, name: str, weights: bytes) -> str:
        directory = self.source / name
        directory.mkdir(exist_ok=True)
        for file, content in ((CONFIG_FILE, b"{}"), (WEIGHTS_FILE, weights)):
            (directory / f"{file}.new").write_bytes(content)
            (directory / f"{file}.new").replace(directory / file)
        return digest_of(directory)

    def start(
        self,
        *,
        on_demand: bool = False,
        history: int = 2,
        source: bool = True,
        fetch_seconds: float = 10,
    ) -> AdapterRegistry:
        self.stop()
        self.engine = Engine()
        limits = FetchLimits(1000, fetch_seconds)
        place = open_source(str(self.source)) if source else None
        self.libraries = [Library(self.state, place, limits, history)]
        self.now = 0.0
        return AdapterRegistry(
            self.engine,
            self.libraries[0],
            history=history,
            on_demand=on_demand,
            clock=lambda: self.now,
        )

    def reconciler(self, registry: AdapterRegistry, *, from_source: bool = True) -> Reconciler:
        """Of a registry that this has started; ``now`` is the clock of both."""
        return Reconciler(
            registry, self.libraries[0], from_source=from_source, clock=lambda: self.now
        )

    def count_fetches(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """A list of the paths that are fetched from now on."""
        source, paths = self.libraries[0].source, list[str]()
        assert source is not None
        fetch = source.fetch

        def counted(path: str, into: Path, limits: FetchLimits) -> str:
            paths.append(path)
            return fetch(path, into, limits)

        monkeypatch.setattr(source, "fetch", counted)
        return paths

    def stop(self) -> None:
        for library in self.libraries:
            library.close()

    @property
    def staged(self) -> list[Path]:
        """What is being written."""
        return list((self.state / "staging").iterdir())

    @property
    def kept(self) -> set[str]:
        """The digests on disk."""
        return {each.name for each in (self.state / "adapters").iterdir()}
