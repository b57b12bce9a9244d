"""What the registry needs of an engine, for fakes to begin with: it holds numbers."""

from __future__ import annotations

from lorax_serve.core import AdapterInfo, AdapterTier, AdapterWork, Freed, Part
from lorax_serve.report import LoadReport

__all__ = ["BareEngine"]


class BareEngine:
    """Remembers pins; loads nothing.

    Attributes:
        pinned: the versions that are pinned.
    """

    def __init__(self) -> None:
        self.pinned: set[int] = set()

    async def load_adapter(self, version: int, path: str) -> AdapterInfo:
        raise NotImplementedError

    async def compose_adapter(self, version: int, parts: tuple[Part, ...]) -> AdapterInfo:
        raise NotImplementedError

    async def inspect_adapter(self, path: str) -> LoadReport:
        raise NotImplementedError

    async def drop_adapter(self, version: int) -> Freed:
        raise NotImplementedError

    async def pin_adapter(self, version: int, instead_of: int | None = None) -> None:
        self.pinned.add(version)

    async def unpin_adapter(self, version: int) -> None:
        self.pinned.discard(version)

    async def find_adapters(self) -> dict[int, AdapterTier]:
        return {}

    async def find_work(self) -> AdapterWork:
        return AdapterWork()
