"""TLS as the chart sets Envoy up for it, with a Secret that changes as the kubelet changes one."""

from __future__ import annotations

import asyncio
import contextlib
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import pytest
import yaml

from deploy.check import helm
from deploy.local.gateway import Gateway, Ports, find_envoy
from deploy.local.processes import Process, free_port, wait_until
from lorax_serve.client import AsyncClient, Tls, Unavailable
from tests.certificates import Authority
from tests.frontend.toy_tokenizers import save_word_tokenizer
from tests.server.harness import Harness, serving

HELM = helm.find()
SERVICE = "lorax-lorax-serve-headless"
MOUNT = "/etc/lorax/tls"
LISTENER = "envoy_listener_server_ssl_socket_factory"
NOTHING: Mapping[str, bytes | None] = {}

pytestmark = [
    pytest.mark.skipif(HELM is None, reason="there is no helm: make deploy-tools"),
    pytest.mark.skipif(find_envoy() is None, reason="there is no envoy: run make gateway-setup"),
]


class Mount:
    """A Secret in a pod: links to files beside it, and one link for all that is replaced."""

    def __init__(self, directory: Path) -> None:
        self.path = directory
        self._contents = 0
        directory.mkdir()

    def put(self, authority: Authority, broken: Mapping[str, bytes | None] = NOTHING) -> None:
        """Change all of it: the gateway's certificate, and who signs those of its clients.

        Args:
            authority: that issues them.
            broken: what files have instead; None is one that is not there.
        """
        files = {"ca.crt": authority.root}
        files["tls.crt"], files["tls.key"] = authority.issue()
        self._contents += 1
        content = self.path / f"..{self._contents}"
        content.mkdir()
        for name, data in files.items():
            given = broken.get(name, data)
            if given is not None:
                (content / name).write_bytes(given)
        (self.path / "..data_tmp").symlink_to(content.name)
        (self.path / "..data_tmp").rename(self.path / "..data")
        for name in files:
            if not (self.path / name).is_symlink():
                (self.path / name).symlink_to(f"..data/{name}")
        shutil.rmtree(self.path / f"..{self._contents - 1}", ignore_errors=True)


class Running:
    """A gateway with TLS, before a server."""

    def __init__(
        self, harness: Harness, gateway: Gateway, admin: int, secret: Mount, files: Path
    ) -> None:
        self.harness = harness
        self._admin = admin
        self.process = gateway.process
        self.secret = secret
        self.gateway = gateway
        self._files = files

    def client(self, trusted: Authority, own: Authority | None = None) -> AsyncClient:
        """One that trusts an authority, with a certificate of ``own``."""
        roots = self._files / "roots.pem"
        roots.write_bytes(trusted.root)
        pair = own.issue().write(self._files, "client") if own else (None, None)
        return AsyncClient(self.gateway.address, tls=Tls(roots, *pair), retries=0, timeout=20)

    def plain(self) -> AsyncClient:
        """One without TLS."""
        return AsyncClient(self.gateway.address, retries=0, timeout=20)

    def ready(self) -> bool:
        """What the chart's readiness probe says."""
        command = ["bash", str(self._files / "ready.sh"), str(self._admin)]
        return subprocess.run(command, check=False).returncode == 0

    def metrics(self) -> dict[str, float]:
        """What Prometheus reads, without labels; the most of each."""
        url = f"http://{self.gateway.status}/stats/prometheus"
        with urllib.request.urlopen(url, timeout=5) as answer:
            lines = str(answer.read(), "utf-8").splitlines()
        found: dict[str, float] = {}
        for name, value in re.findall(r"^(\w+)\{.*\} (\d+)$", "\n".join(lines), re.M):
            found[name] = max(float(value), found.get(name, 0))
        return found


@contextlib.asynccontextmanager
async def running(
    directory: Path, first: Authority, *values: str, broken: Mapping[str, bytes | None] = NOTHING
) -> AsyncIterator[Running]:
    """The chart's gateway with these values, whose Secret is signed by ``first``."""
    assert HELM is not None
    settings = ",".join(("gateway.enabled=true", "gateway.tls.secret=any", *values))
    objects = helm.render(HELM, helm.CHART / "ci" / "minimal.yaml", "--set", settings)
    maps = [each for each in yaml.safe_load_all(objects) if each["kind"] == "ConfigMap"]
    (files,) = (each["data"] for each in maps if "envoy.yaml" in each["data"])
    secret = Mount(directory / "tls")
    secret.put(first, broken)
    for name, text in files.items():
        here = text.replace(MOUNT, str(secret.path)).replace("/etc/lorax/gateway", str(directory))
        files[name] = here
        (directory / name).write_text(here)
    assert SERVICE in files["envoy.yaml"]

    words = directory / "words"
    words.mkdir()
    async with serving(save_word_tokenizer(words), None) as harness:
        listener, admin, status, names = (free_port("127.0.0.1") for _ in range(4))
        addresses = directory / "addresses"
        addresses.write_text("127.0.0.1")
        command = [sys.executable, "-m", "deploy.local.name_server", str(names), SERVICE]
        name_server = Process("name-server", [*command, str(addresses), "0"], directory)
        ports = Ports(listener, admin, status, harness.server.port, names)
        gateway = Gateway("gateway", ports, directory, text=files["envoy.yaml"])
        try:
            name_server.start()
            gateway.process.start()
            await asyncio.to_thread(wait_until, lambda: gateway.healthy() == 1, gateway.process)
            yield Running(harness, gateway, admin, secret, directory)
        finally:
            gateway.process.kill()
            name_server.kill()


async def test_the_gateway_ends_tls(tmp_path: Path) -> None:
    ours, others = Authority("ours"), Authority("others")
    async with running(tmp_path, ours) as gateway:
        async with gateway.client(ours) as client:
            assert await client.serving()
            assert (await client.generate("one two", max_new_tokens=3)).text.split()[0] == "one"
        async with gateway.client(others) as client:
            with pytest.raises(Unavailable, match="the server's certificate is not trusted"):
                await client.model_info()
        async with gateway.plain() as client:
            with pytest.raises(Unavailable, match="the server may ask for TLS"):
                await client.model_info()


async def test_the_gateway_asks_for_certificates(tmp_path: Path) -> None:
    ours, others = Authority("ours"), Authority("others")
    async with running(tmp_path, ours, "gateway.tls.requireClientCertificates=true") as gateway:
        async with gateway.client(ours, ours) as client:
            assert (await client.model_info()).model == "fake"
        for own in (None, others):
            async with gateway.client(ours, own) as client:
                with pytest.raises(Unavailable, match="client certificate"):
                    await client.model_info()


async def test_a_changed_secret_is_read_again_and_breaks_no_stream(tmp_path: Path) -> None:
    old, new = Authority("old"), Authority("new")
    async with running(tmp_path, old, "gateway.tls.requireClientCertificates=true") as gateway:
        async with gateway.client(old, old) as client:
            stream = client.stream("one two", max_new_tokens=40)
            pieces = [(await anext(stream)).text]
            gateway.harness.engine.paused = True
            gateway.secret.put(new)
            await until_answered(gateway, new)
            # Neither the old certificate nor those of the old clients count any more.
            async with gateway.client(old, new) as late:
                with pytest.raises(Unavailable, match="the server's certificate is not trusted"):
                    await late.model_info()
            async with gateway.client(new, old) as late:
                with pytest.raises(Unavailable, match="client certificate"):
                    await late.model_info()
            gateway.harness.engine.paused = False
            pieces += [piece.text async for piece in stream]
            assert len("".join(pieces).split()) == 40
            assert (await client.model_info()).model == "fake"
        assert gateway.process.running


@pytest.mark.parametrize(
    "broken",
    [
        {"tls.crt": b"garbage"},
        {"tls.key": Authority("others").issue()[1]},
        {"tls.crt": None},
        {"ca.crt": b"garbage"},
    ],
    ids=["certificate", "key", "missing", "roots"],
)
async def test_a_gateway_is_ready_with_good_files_only(
    tmp_path: Path, broken: Mapping[str, bytes | None]
) -> None:
    ours, new = Authority("ours"), Authority("new")
    mutual = "gateway.tls.requireClientCertificates=true"
    async with running(tmp_path, ours, mutual, broken=broken) as gateway:
        assert not gateway.ready()
        async with gateway.client(ours, ours) as client:
            with pytest.raises(Unavailable):
                await client.model_info()
        metrics = gateway.metrics()
        assert metrics["envoy_server_live"] == 1
        assert metrics[f"{LISTENER}_ssl_context_update_by_sds"] >= 1
        assert metrics["envoy_server_days_until_first_cert_expiring"] > 1e9

        gateway.secret.put(new)
        await until_answered(gateway, new)
        assert gateway.ready()
        assert gateway.process.running


async def test_a_gateway_stays_ready_with_the_last_good_files(tmp_path: Path) -> None:
    ours = Authority("ours")
    async with running(tmp_path, ours) as gateway:
        assert gateway.ready()
        assert gateway.metrics()["envoy_sds_key_rotation_failed"] == 0
        gateway.secret.put(ours, {"tls.crt": b"garbage"})
        end = time.monotonic() + 10
        while not gateway.metrics()["envoy_sds_key_rotation_failed"]:
            assert time.monotonic() < end
            await asyncio.sleep(0.05)
        assert gateway.ready()
        async with gateway.client(ours) as client:
            assert (await client.model_info()).model == "fake"
        while gateway.metrics()["envoy_server_days_until_first_cert_expiring"] > 7:
            assert time.monotonic() < end  # it counts every 5 s
            await asyncio.sleep(0.2)


async def until_answered(gateway: Running, authority: Authority) -> None:
    """Wait until the gateway has the certificate of ``authority``, and takes its clients."""
    end = time.monotonic() + 10
    while True:
        async with gateway.client(authority, authority) as client:
            try:
                await client.model_info()
                return
            except Unavailable:
                assert time.monotonic() < end
                await asyncio.sleep(0.05)
