"""What the registry does when paths are odd, the loader fails, or callers go away."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from lorax_serve.core import AdapterInfo, Freed, Part
from lorax_serve.errors import (
    AdapterConflict,
    AdapterRejected,
    EngineFailed,
    LoraxError,
    Overloaded,
    RejectReason,
)
from lorax_serve.registry.events import RegistryListener
from lorax_serve.registry.in_place import InPlace
from lorax_serve.registry.registry import AdapterRegistry
from lorax_serve.registry.version import Adapter, AdapterState
from lorax_serve.report import LoadReport
from tests.registry.bare_engine import BareEngine


class ScriptedLoader(BareEngine):
    """Answers with what it is told to: a digest, or an error; waits for ``go``."""

    def __init__(self) -> None:
        super().__init__()
        self.answer: str | Exception = "v1"
        self.go = asyncio.Event()
        self.go.set()
        self.held: set[int] = set()
        self.paths: list[str] = []

    async def load_adapter(self, version: int, path: str) -> AdapterInfo:
        self.paths.append(path)
        answer = self.answer
        await self.go.wait()
        if isinstance(answer, Exception):
            raise answer
        self.held.add(version)
        return AdapterInfo(answer, 4, 2, 10)

    async def compose_adapter(self, version: int, parts: tuple[Part, ...]) -> AdapterInfo:
        return await self.load_adapter(version, "+".join(part.path for part in parts))

    async def inspect_adapter(self, path: str) -> LoadReport:
        return LoadReport(digest=Path(path).name)

    async def drop_adapter(self, version: int) -> Freed:
        await self.go.wait()
        self.held.remove(version)
        return Freed(host=10)


class Refusals(RegistryListener):
    def __init__(self) -> None:
        self.reasons: list[tuple[str, str]] = []

    def refused(self, name: str, error: LoraxError) -> None:
        typed = error.reason if isinstance(error, AdapterRejected) else None
        self.reasons.append((name, typed or type(error).__name__))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root" / "one").mkdir(parents=True)
    return tmp_path / "root"


def held_versions(registry: AdapterRegistry) -> set[int]:
    return {adapter.version for adapter in registry.adapters()}


async def turns() -> None:
    for _ in range(8):
        await asyncio.sleep(0)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (AdapterRejected(RejectReason.NOT_FINITE, "NaN"), "not_finite"),
        (Overloaded("full"), "Overloaded"),
        (EngineFailed("died"), "EngineFailed"),
    ],
    ids=str,
)
async def test_failures_reach_the_caller_and_the_listener(
    root: Path, error: LoraxError, reason: str
) -> None:
    loader, listener = ScriptedLoader(), Refusals()
    registry = AdapterRegistry(loader, InPlace(root), [listener])
    loader.answer = error
    with pytest.raises(type(error)):
        await registry.load("one")
    assert listener.reasons == [("one", reason)]
    assert registry.adapters() == []
    loader.answer = "v1"
    assert (await registry.load("one")).state is AdapterState.READY


async def test_a_loader_that_breaks_does_not_block_the_name(root: Path) -> None:
    loader = ScriptedLoader()
    registry = AdapterRegistry(loader, InPlace(root))
    loader.answer = ZeroDivisionError("a bug")
    with pytest.raises(ZeroDivisionError):
        await registry.load("one")
    loader.answer = "v1"
    assert (await registry.load("one")).name == "one"


async def test_a_listener_that_breaks_leaves_no_change_half_done(root: Path) -> None:
    class Broken(RegistryListener):
        def loaded(self, adapter: Adapter) -> None:
            raise ZeroDivisionError("a bug")

        changed = unloaded = loaded

        def refused(self, name: str, error: LoraxError) -> None:
            raise ZeroDivisionError("a bug")

    loader, listener = ScriptedLoader(), Refusals()
    registry = AdapterRegistry(loader, InPlace(root), [Broken(), listener])
    await registry.load("one")
    loader.answer = "v2"
    assert (await registry.load("one")).info.digest == "v2"
    await turns()
    assert len(loader.held) == 1
    loader.answer = Overloaded("full")
    with pytest.raises(Overloaded):
        await registry.load("two", "one")
    assert listener.reasons == [("two", "Overloaded")]
    assert await registry.unload("one") == Freed(host=10)
    assert (loader.held, registry.adapters()) == (set(), [])


@pytest.mark.parametrize("path", ["x" * 300, "one/" + "y/" * 3000, "loop", "loop/deeper", "file"])
async def test_paths_that_no_directory_can_have(root: Path, path: str) -> None:
    (root / "loop").symlink_to(root / "loop")
    (root / "file").touch()
    loader, listener = ScriptedLoader(), Refusals()
    registry = AdapterRegistry(loader, InPlace(root), [listener])
    with pytest.raises(AdapterRejected) as caught:
        await registry.load("one", path)
    assert caught.value.reason is RejectReason.MISSING_FILE
    assert listener.reasons == [("one", "missing_file")]
    assert loader.paths == []


async def test_the_root_may_be_a_link(root: Path) -> None:
    link = root.parent / "link"
    link.symlink_to(root)
    loader = ScriptedLoader()
    await AdapterRegistry(loader, InPlace(link)).load("one")
    assert loader.paths == [str(root / "one")]


async def test_a_sibling_with_the_roots_name_as_prefix_is_outside(root: Path) -> None:
    (root.parent / "root-2").mkdir()
    registry = AdapterRegistry(ScriptedLoader(), InPlace(root))
    with pytest.raises(LoraxError, match="leads outside"):
        await registry.load("one", "../root-2")


async def test_a_cancelled_load_that_fails_frees_the_name(root: Path) -> None:
    loader, listener = ScriptedLoader(), Refusals()
    registry = AdapterRegistry(loader, InPlace(root), [listener])
    loader.answer = Overloaded("full")
    loader.go.clear()
    loading = asyncio.create_task(registry.load("one"))
    await turns()
    loading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await loading
    with pytest.raises(AdapterConflict):
        await registry.load("one")
    loader.go.set()
    await turns()
    assert listener.reasons == [("one", "Overloaded")]
    loader.answer = "v1"
    await registry.load("one")


async def test_unload_while_a_replacement_loads(root: Path) -> None:
    loader = ScriptedLoader()
    registry = AdapterRegistry(loader, InPlace(root))
    old = await registry.load("one")
    loader.answer = "v2"
    loader.go.clear()
    loading = asyncio.create_task(registry.load("one"))
    await turns()
    with pytest.raises(AdapterConflict, match="being loaded by another call"):
        await registry.unload("one")
    assert registry.admission.acquire("one") is old
    registry.admission.release(old)
    loader.go.set()
    new = await loading
    await turns()
    assert loader.held == {new.key}
    assert await registry.unload("one") == Freed(host=10)
    assert loader.held == set()


async def test_same_content_under_two_names_is_two_adapters(root: Path) -> None:
    loader = ScriptedLoader()
    registry = AdapterRegistry(loader, InPlace(root))
    first, second = await registry.load("one"), await registry.load("two", "one")
    assert first.version != second.version
    assert loader.held == {first.version, second.version}


async def test_several_generations_drain_each_with_its_last_request(root: Path) -> None:
    loader = ScriptedLoader()
    registry = AdapterRegistry(loader, InPlace(root))
    pinned: list[Adapter] = []
    for generation in range(4):
        loader.answer = f"v{generation}"
        await registry.load("one")
        pinned += [registry.admission.acquire("one"), registry.admission.acquire("one")]
    assert len(loader.held) == 4
    for adapter in pinned[::2]:
        registry.admission.release(adapter)
    await turns()
    assert len(loader.held) == 4
    for adapter in reversed(pinned[1::2]):
        registry.admission.release(adapter)
        await turns()
        assert held_versions(registry) == loader.held
    assert loader.held == {pinned[-1].version}
