"""Names and versions of adapters, with a loader that loads nothing."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from lorax_serve.core import AdapterInfo, Freed
from lorax_serve.errors import (
    AdapterConflict,
    AdapterNotFound,
    AdapterRejected,
    InvalidRequest,
    LoraxError,
    RejectReason,
)
from lorax_serve.registry.events import RegistryListener
from lorax_serve.registry.in_place import InPlace
from lorax_serve.registry.registry import AdapterRegistry
from lorax_serve.registry.version import Adapter, AdapterState
from lorax_serve.report import LoadReport
from tests.registry.bare_engine import BareEngine


class Loader(BareEngine):
    """The digest of a directory is the content of its config; ``bad`` is refused."""

    def __init__(self) -> None:
        super().__init__()
        self.open = asyncio.Event()
        self.open.set()
        self.loaded: dict[int, str] = {}
        self.dropped: list[int] = []

    async def load_adapter(self, version: int, path: str) -> AdapterInfo:
        digest = (Path(path) / "adapter_config.json").read_text()
        await self.open.wait()
        if digest == "bad":
            raise AdapterRejected(RejectReason.BAD_FILE, "it is bad")
        self.loaded[version] = path
        return AdapterInfo(digest, 4, 2, 100)

    async def inspect_adapter(self, path: str) -> LoadReport:
        return LoadReport(digest=Path(path).name)

    async def drop_adapter(self, version: int) -> Freed:
        await asyncio.sleep(0)
        del self.loaded[version]
        self.dropped.append(version)
        return Freed(host=100)


class Listener(RegistryListener):
    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []

    def loaded(self, adapter: Adapter) -> None:
        self.events.append(("loaded", f"{adapter.name}:{adapter.version}"))

    def refused(self, name: str, error: LoraxError) -> None:
        self.events.append(("refused", f"{name}:{error}"))

    def unloaded(self, adapter: Adapter) -> None:
        self.events.append(("unloaded", f"{adapter.name}:{adapter.version}"))


class Setting:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.loader = Loader()
        self.listener = Listener()
        self.registry = AdapterRegistry(self.loader, InPlace(root), [self.listener])

    def write(self, directory: str, content: str) -> None:
        (self.root / directory).mkdir(parents=True, exist_ok=True)
        (self.root / directory / "adapter_config.json").write_text(content)


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    root = tmp_path / "adapters"
    root.mkdir()
    return Setting(root)


async def turns(count: int = 5) -> None:
    """Let everything that can run do so."""
    for _ in range(count):
        await asyncio.sleep(0)


async def test_load_acquire_release_unload(setting: Setting) -> None:
    setting.write("poet", "v1")
    adapter = await setting.registry.load("poet")
    assert (adapter.name, adapter.version, adapter.info.digest) == ("poet", 1, "v1")
    assert setting.registry.admission.acquire("poet") is adapter
    assert (adapter.references, adapter.requests) == (1, 1)
    setting.registry.admission.release(adapter)
    assert await setting.registry.unload("poet") == Freed(host=100)
    assert setting.registry.adapters() == []
    assert setting.loader.loaded == {}
    assert setting.listener.events == [("loaded", "poet:1"), ("unloaded", "poet:1")]


async def test_inspecting_loads_nothing(setting: Setting) -> None:
    setting.write("poet", "v1")
    assert (await setting.registry.inspect("poet")).digest == "poet"
    assert (await setting.registry.inspect("pilot", "poet")).digest == "poet"
    with pytest.raises(InvalidRequest, match="leads outside"):
        await setting.registry.inspect("poet", "../elsewhere")
    assert (setting.loader.loaded, setting.listener.events) == ({}, [])


async def test_unknown_names_are_told_what_there_is(setting: Setting) -> None:
    with pytest.raises(AdapterNotFound, match="no adapter is loaded"):
        setting.registry.admission.acquire("poet")
    for i in range(10):
        setting.write(f"a{i}", f"v{i}")
        await setting.registry.load(f"a{i}")
    with pytest.raises(AdapterNotFound, match=r"loaded: a0, a1, .*, a7 and 2 more"):
        setting.registry.admission.acquire("poet")
    with pytest.raises(AdapterNotFound):
        await setting.registry.unload("poet")


async def test_a_replacement_flips_at_once_and_drains_the_old(setting: Setting) -> None:
    setting.write("poet", "v1")
    old = await setting.registry.load("poet")
    assert setting.registry.admission.acquire("poet") is old
    setting.write("poet", "v2")
    setting.loader.open.clear()
    loading = asyncio.create_task(setting.registry.load("poet"))
    await turns()
    assert setting.registry.admission.acquire("poet") is old
    setting.registry.admission.release(old)
    setting.loader.open.set()
    new = await loading
    assert setting.registry.admission.acquire("poet") is new
    assert (old.state, new.state) == (AdapterState.DRAINING, AdapterState.READY)
    assert setting.registry.adapters() == [old, new]
    await turns()
    assert setting.loader.dropped == []
    setting.registry.admission.release(old)
    await turns()
    assert setting.loader.dropped == [old.version]
    assert setting.registry.adapters() == [new]


async def test_the_same_content_changes_nothing(setting: Setting) -> None:
    setting.write("poet", "v1")
    first = await setting.registry.load("poet")
    assert await setting.registry.load("poet") is first
    assert setting.loader.loaded.keys() == {first.version}
    assert setting.listener.events == [("loaded", "poet:1")]


async def test_a_refused_replacement_leaves_what_was_there(setting: Setting) -> None:
    setting.write("poet", "v1")
    first = await setting.registry.load("poet")
    setting.write("poet", "bad")
    with pytest.raises(AdapterRejected):
        await setting.registry.load("poet")
    assert setting.registry.admission.acquire("poet") is first
    assert setting.listener.events[-1] == ("refused", "poet:it is bad")
    setting.write("poet", "v2")
    assert (await setting.registry.load("poet")).info.digest == "v2"


async def test_unload_drains_and_goes_on_when_cancelled(setting: Setting) -> None:
    setting.write("poet", "v1")
    adapter = await setting.registry.load("poet")
    setting.registry.admission.acquire("poet")
    unloading = asyncio.create_task(setting.registry.unload("poet"))
    await turns()
    with pytest.raises(AdapterNotFound):
        setting.registry.admission.acquire("poet")
    assert setting.registry.adapters() == [adapter]
    unloading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await unloading
    assert setting.loader.dropped == []
    setting.registry.admission.release(adapter)
    await turns()
    assert setting.loader.dropped == [1]
    assert setting.registry.adapters() == []


async def test_a_name_can_be_loaded_again_while_it_drains(setting: Setting) -> None:
    setting.write("poet", "v1")
    old = await setting.registry.load("poet")
    setting.registry.admission.acquire("poet")
    unloading = asyncio.create_task(setting.registry.unload("poet"))
    await turns()
    new = await setting.registry.load("poet")
    assert setting.registry.admission.acquire("poet") is new
    assert new.version != old.version
    setting.registry.admission.release(old)
    assert await unloading == Freed(host=100)
    assert setting.registry.adapters() == [new]


async def test_a_load_goes_on_when_cancelled(setting: Setting) -> None:
    setting.write("poet", "v1")
    setting.loader.open.clear()
    loading = asyncio.create_task(setting.registry.load("poet"))
    await turns()
    loading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await loading
    setting.loader.open.set()
    await turns()
    assert setting.registry.admission.acquire("poet").version == 1


async def test_one_load_of_a_name_at_a_time(setting: Setting) -> None:
    setting.write("poet", "v1")
    setting.write("pilot", "v2")
    setting.loader.open.clear()
    loading = asyncio.create_task(setting.registry.load("poet"))
    await turns()
    with pytest.raises(AdapterConflict, match="'poet' is being loaded by another call"):
        await setting.registry.load("poet")
    other = asyncio.create_task(setting.registry.load("pilot"))
    setting.loader.open.set()
    assert {(await loading).name, (await other).name} == {"poet", "pilot"}


@pytest.mark.parametrize("path", ["..", "../secret", "a/../../secret", "/etc", "link", "link/deep"])
async def test_paths_stay_inside_the_root(setting: Setting, path: str) -> None:
    secret = setting.root.parent / "secret"
    (secret / "deep").mkdir(parents=True)
    for directory in (secret, secret / "deep"):
        (directory / "adapter_config.json").write_text("v1")
    (setting.root / "link").symlink_to(secret)
    (setting.root / "a").mkdir()
    with pytest.raises(InvalidRequest, match="leads outside the server's adapter directory"):
        await setting.registry.load("poet", path)
    assert setting.loader.loaded == {}


async def test_links_inside_the_root_are_followed(setting: Setting) -> None:
    setting.write("store/abc", "v1")
    (setting.root / "poet").symlink_to(setting.root / "store" / "abc")
    assert (await setting.registry.load("poet")).info.digest == "v1"


async def test_the_same_content_from_elsewhere_is_a_new_version(setting: Setting) -> None:
    """Weights are read again from their directory, so it must be the one that was named last."""
    setting.write("one", "v1")
    setting.write("two", "v1")
    first = await setting.registry.load("poet", "one")
    assert await setting.registry.load("poet", "one") is first
    second = await setting.registry.load("poet", "two")
    assert (second.path.name, second.info.digest) == ("two", first.info.digest)
    assert second.version > first.version


async def test_malformed_names_and_paths(setting: Setting) -> None:
    for name in ("", ".hidden", "-x", "_x", "a b", "a/b", "..", "a\n", "ü", "x" * 129):
        with pytest.raises(InvalidRequest, match="is not a valid name"):
            await setting.registry.load(name)
    with pytest.raises(InvalidRequest, match="NUL"):
        await setting.registry.load("poet", "a\0b")
    with pytest.raises(AdapterRejected, match="no directory 'missing'"):
        await setting.registry.load("poet", "missing")
    with pytest.raises(AdapterConflict, match="start it with --adapters"):
        await AdapterRegistry(Loader(), InPlace(None)).load("poet")


async def test_listing(setting: Setting) -> None:
    setting.write("b", "v1")
    setting.write("a", "bad")
    setting.write("c", "v3")
    (setting.root / "notes").mkdir()
    assert await InPlace(setting.root).listing() == ["a", "b", "c"]
    assert await InPlace(None).listing() == []


async def test_releasing_too_often_is_a_bug(setting: Setting) -> None:
    setting.write("poet", "v1")
    adapter = await setting.registry.load("poet")
    with pytest.raises(AssertionError, match="released too often"):
        setting.registry.admission.release(adapter)
