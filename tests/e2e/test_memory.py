"""Where adapters are, and that their memory comes back, with a real engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from lorax_serve.client import AsyncClient
from lorax_serve.errors import Overloaded
from tests.e2e.conftest import StartServer
from tests.e2e.test_serving import client_of, integrity

ALL = "all-linear"
MB = 1 << 20


async def tiers(client: AsyncClient) -> dict[str, str | None]:
    return {each.name: each.tier for each in await client.list_adapters()}


async def test_a_pinned_adapter_stays_in_memory(
    start_server: StartServer, make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    for n in range(6):
        make_adapter(f"a{n}", n, r=4, target_modules=ALL)
    probe = await start_server(tmp_path, adapter_slots=1)
    async with client_of(probe) as client:
        size = (await client.list_adapters())[0].host_bytes
    server = await start_server(tmp_path, adapter_slots=1, max_adapter_bytes=3 * size)
    async with client_of(server) as client:
        assert sorted(str(tier) for tier in (await tiers(client)).values()) == [
            *["disk"] * 3,
            *["host"] * 3,
        ]
        await client.generate("w1", adapter="a0", max_new_tokens=1)
        assert (await tiers(client))["a0"] == "device"
        await client.update_adapter("a1", pinned=True)
        await client.update_adapter("a2", pinned=True)
        with pytest.raises(Overloaded, match="unpin others"):
            await client.update_adapter("a3", pinned=True)
        for name in ("a3", "a4", "a5", "a0", "a3"):
            await client.generate("w1", adapter=name, max_new_tokens=1)
            found = await tiers(client)
            assert (found["a1"], found["a2"], found[name]) == ("host", "host", "device")
        pinned = [each.name for each in await client.list_adapters() if each.pinned]
        assert pinned == ["a1", "a2"]
        await client.update_adapter("a1", pinned=False)
        for name in ("a4", "a5"):
            await client.generate("w1", adapter=name, max_new_tokens=1)
        assert (await tiers(client))["a1"] == "disk"
        assert await integrity(server) == ()


async def test_an_upload_is_applied_and_unloading_frees_every_tier(
    start_server: StartServer, make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    directory = make_adapter("mine", 3, r=4, target_modules=ALL)
    served = await start_server(tmp_path)
    state = tmp_path / "state"
    keeping = await start_server(state=state)
    async with client_of(served) as there, client_of(keeping) as here:
        loaded = await here.upload_adapter("mine", directory)
        want = await there.generate("w10 w11", adapter="mine", max_new_tokens=8)
        found = await here.generate("w10 w11", adapter="mine", max_new_tokens=8)
        assert (found.text, found.adapter_digest) == (want.text, want.adapter_digest)
        files = sum(each.stat().st_size for each in (state / "adapters" / loaded.digest).iterdir())
        freed = await here.unload_adapter("mine")
        assert (freed.host, freed.device, freed.disk) == (loaded.host_bytes, 0, files)
        assert list((state / "adapters").iterdir()) == []
        assert await integrity(keeping) == ()


async def test_memory_returns_to_what_it_was(
    start_server: StartServer, make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    """That of the engine's process, with adapters of about a hundred megabytes together."""
    paths = [make_adapter(f"a{n}", n, r=1024, target_modules=ALL).name for n in range(4)]
    server = await start_server(tmp_path)
    process = psutil.Process(server._engine._process.pid)
    async with client_of(server) as client:

        async def load_all() -> int:
            for name, path in ((f"{path}-{copy}", path) for path in paths for copy in range(4)):
                await client.load_adapter(name, path)
                await client.generate("w1", adapter=name, max_new_tokens=2)
            return sum(each.host_bytes for each in await client.list_adapters())

        async def unload_all() -> None:
            for each in await client.list_adapters():
                await client.unload_adapter(each.name)

        await unload_all()
        for _ in range(2):  # what is allocated once and kept
            await load_all()
            await unload_all()
        before = process.memory_info().rss
        loaded = await load_all()
        assert process.memory_info().rss > before + 0.8 * loaded > before + 50 * MB
        await unload_all()
        assert process.memory_info().rss < before + 0.1 * loaded
        assert await integrity(server) == ()
