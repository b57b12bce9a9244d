"""Servers that follow a manifest in a bucket: what changes there, and what no outage changes."""

from __future__ import annotations

import urllib.request
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from moto.server import ThreadedMotoServer

from lorax_serve.errors import AdapterNotFound, SourceFailed, SourceReason
from lorax_serve.server.app import Server
from lorax_serve.sources.source import ADAPTER_FILES
from lorax_serve.store.digest import digest_of
from tests.e2e.conftest import StartServer
from tests.e2e.test_serving import client_of
from tests.server.harness import until
from tests.sources.accounts import forget_accounts

PROMPT = "w10 w11 w12 w13"
KEY = "config/adapters.yaml"
PLACE = f"s3://fleet/{KEY}"


class Bucket:
    """A bucket, ``fleet``, with adapters and their manifest; it may be down."""

    def __init__(self) -> None:
        self._server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        self._server.start()
        _, self._port = self._server.get_host_and_port()
        self.url = f"http://127.0.0.1:{self._port}"
        self._client: Any = boto3.client("s3", endpoint_url=self.url)
        self._client.create_bucket(Bucket="fleet")
        self._digests: dict[str, str] = {}
        self.delete()  # moto keeps what it has for the next one

    def put_adapter(self, name: str, directory: Path) -> None:
        self._digests[name] = digest_of(directory)
        for file in ADAPTER_FILES:
            self._client.upload_file(str(directory / file), "fleet", f"{name}/{file}")

    def write(self, names: Iterable[str]) -> None:
        entries = [
            {"name": name, "source": f"s3://fleet/{name}", "digest": self._digests[name]}
            for name in names
        ]
        self.put(yaml.safe_dump({"adapters": entries}))

    def put(self, text: str) -> None:
        self._client.put_object(Bucket="fleet", Key=KEY, Body=text.encode())

    def delete(self) -> None:
        self._client.delete_object(Bucket="fleet", Key=KEY)

    def go_down(self) -> None:
        self._server.stop()

    def come_back(self) -> None:
        self._server = ThreadedMotoServer("127.0.0.1", self._port, verbose=False)
        self._server.start()

    def close(self) -> None:
        self._client.close()
        self._server.stop()


@pytest.fixture
def bucket(
    make_adapter: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Bucket]:
    """With the adapters poet and pilot, and no manifest."""
    forget_accounts(monkeypatch, tmp_path)
    bucket = Bucket()
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", bucket.url)
    for seed, name in enumerate(("poet", "pilot")):
        directory = make_adapter(name, seed, r=4, target_modules="all-linear")
        bucket.put_adapter(name, directory)
    yield bucket
    bucket.close()


async def answer(server: Server, adapter: str) -> tuple[str, Any]:
    async with client_of(server) as client:
        found = await client.generate(PROMPT, adapter=adapter, max_new_tokens=20)
        return found.text, found.adapter_version


def served(server: Server) -> set[str]:
    return {each.name for each in server.adapters}


def reason(server: Server) -> SourceReason | None:
    """Why the manifest cannot be read; nothing else may have failed."""
    assert server.refused.keys() <= {PLACE}
    error = server.refused.get(PLACE)
    assert error is None or isinstance(error, SourceFailed)
    return error.reason if error is not None else None


def read_errors(server: Server) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.metrics_port}/metrics") as page:
        lines = page.read().decode().splitlines()
    (line,) = [line for line in lines if line.startswith("lorax_manifest_read_errors_total ")]
    return float(line.split()[1])


async def test_every_server_follows_what_is_in_the_bucket(
    start_server: StartServer, bucket: Bucket, tmp_path: Path
) -> None:
    bucket.write(["poet"])
    settings = {"manifest": PLACE, "watch_seconds": 0.05}
    servers = [
        await start_server(state=tmp_path / f"state-{number}", server=settings)
        for number in range(2)
    ]
    assert [served(server) for server in servers] == [{"poet"}, {"poet"}]
    bucket.write(["poet", "pilot"])
    await until(lambda: all(served(server) == {"poet", "pilot"} for server in servers), 20)
    pilots = [await answer(server, "pilot") for server in servers]
    assert pilots[0][0] == pilots[1][0]
    bucket.write(["pilot"])
    await until(lambda: all(served(server) == {"pilot"} for server in servers), 20)
    for server in servers:
        with pytest.raises(AdapterNotFound):
            await answer(server, "poet")
        assert server.refused == {}


async def test_an_outage_takes_nobody_s_adapter_away(
    start_server: StartServer, bucket: Bucket, tmp_path: Path
) -> None:
    async def start() -> Server:
        settings = {"manifest": PLACE, "watch_seconds": 0.05}
        return await start_server(state=tmp_path / "state", server=settings)

    with pytest.raises(SourceFailed, match=f"manifest {PLACE}: the server answered 404"):
        await start()  # there is nothing that it could serve
    bucket.write(["poet"])
    server = await start()
    before = await answer(server, "poet")
    assert read_errors(server) == 0

    bucket.delete()
    await until(lambda: reason(server) is SourceReason.NOT_FOUND, 20)
    assert await answer(server, "poet") == before
    assert read_errors(server) >= 1

    bucket.go_down()
    await until(lambda: reason(server) is SourceReason.UNAVAILABLE, 20)
    assert await answer(server, "poet") == before

    # A replica that restarts meanwhile serves what its state directory has.
    await server.stop()
    server = await start()
    assert await answer(server, "poet") == before
    assert reason(server) is SourceReason.UNAVAILABLE
    async with client_of(server) as client:
        (failed,) = await client.list_failed_adapters()
    assert (failed.name, failed.reason) == (PLACE, "unavailable")

    bucket.come_back()
    bucket.put("adapters: [")
    await until(lambda: "not valid YAML" in str(server.refused.get(PLACE)), 20)
    assert await answer(server, "poet") == before
    bucket.write(["pilot"])
    await until(lambda: served(server) == {"pilot"}, 20)
    assert server.refused == {}
