"""TLS of both clients and of ``lorax``, against gRPC's own server."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2_grpc
from grpc_health.v1.health import HealthServicer

from lorax_serve.cli.client import main
from lorax_serve.client import AsyncClient, Client, Tls, Unavailable
from lorax_serve.errors import InvalidRequest
from lorax_serve.pb.lorax.v1 import generation_pb2 as pb
from lorax_serve.pb.lorax.v1 import generation_pb2_grpc
from tests.certificates import Authority, Pair

OURS, OTHERS = Authority("ours"), Authority("others")
SERVER = OURS.issue()

StartServer = Callable[..., str]


class Servicer(generation_pb2_grpc.GenerationServiceServicer):  # type: ignore[misc]
    def ModelInfo(self, request: Any, context: Any) -> Any:
        return pb.ModelInfoResponse(model="m")


@pytest.fixture
def start_server() -> Iterator[StartServer]:
    """Start servers with a certificate, or with None and without TLS; returns ``host:port``."""
    with ThreadPoolExecutor(2) as threads:
        servers = []

        def start(own: Pair | None = SERVER, *, asks: bool = False) -> str:
            server = grpc.server(threads)
            servers.append(server)
            generation_pb2_grpc.add_GenerationServiceServicer_to_server(Servicer(), server)
            health_pb2_grpc.add_HealthServicer_to_server(HealthServicer(), server)
            if own is None:
                return f"127.0.0.1:{_started(server, server.add_insecure_port('127.0.0.1:0'))}"
            roots = OURS.root if asks else None
            credentials = grpc.ssl_server_credentials([(own.key, own.certificate)], roots, asks)
            port = server.add_secure_port("127.0.0.1:0", credentials)
            return f"127.0.0.1:{_started(server, port)}"

        yield start
        for server in servers:
            server.stop(None).wait()


def _started(server: Any, port: int) -> int:
    server.start()
    return port


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """Roots, and pairs of certificate and key."""
    found = {}
    for name, authority in (("ours", OURS), ("others", OTHERS)):
        found[f"{name}.pem"] = tmp_path / f"{name}.pem"
        found[f"{name}.pem"].write_bytes(authority.root)
        for path in authority.issue().write(tmp_path, name):
            found[path.name] = path
    return found


async def test_both_clients_speak_tls(start_server: StartServer, files: dict[str, Path]) -> None:
    for asks in (False, True):
        address = start_server(asks=asks)
        tls = Tls(files["ours.pem"], *(files[f"ours.{end}"] for end in ("crt", "key") if asks))
        with Client(address, tls=tls, retries=0, timeout=20) as client:
            assert client.model_info().model == "m"
        async with AsyncClient(address, tls=tls, retries=0, timeout=20) as asynchronous:
            assert (await asynchronous.model_info()).model == "m"


@pytest.mark.parametrize(
    ("server", "tls", "message"),
    [
        ({}, ["others.pem"], "certificate is not trusted"),
        ({}, [None], "certificate is not trusted"),
        ({"own": OURS.issue("127.0.0.2")}, ["ours.pem"], "certificate is for another name"),
        ({"own": OURS.issue(days=-1)}, ["ours.pem"], "not trusted.* has expired"),
        ({"own": None}, ["ours.pem"], "the server does not speak TLS"),
        ({"asks": True}, ["ours.pem"], "client certificate"),
        ({"asks": True}, ["ours.pem", "others.crt", "others.key"], "client certificate"),
        ({}, None, "may ask for TLS"),
    ],
)
async def test_a_failed_handshake_says_why(
    start_server: StartServer,
    files: dict[str, Path],
    server: dict[str, Any],
    tls: list[str] | None,
    message: str,
) -> None:
    address = start_server(**server)
    how = None if tls is None else Tls(*(name and files[name] for name in tls))
    with Client(address, tls=how, retries=0, timeout=20) as client:
        with pytest.raises(Unavailable, match=f"^{address}: .*{message}") as failed:
            client.model_info()
        with pytest.raises(Unavailable, match=message):
            next(client.stream("one"))
    async with AsyncClient(address, tls=how, retries=0, timeout=20) as asynchronous:
        with pytest.raises(Unavailable, match=message):
            await asynchronous.model_info()
    assert "\n" not in str(failed.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ca": "none"}, "tls.ca none cannot be read: No such file"),
        ({"ca": "empty"}, "tls.ca empty has no certificates in PEM format"),
        ({"ca": "ours.key"}, "tls.ca ours.key has no certificates"),
        ({"ca": "half"}, "tls.ca half has no certificates"),
        ({"certificate": "ours.crt"}, "tls.certificate ours.crt needs tls.key"),
        ({"key": "ours.key"}, "tls.key ours.key needs tls.certificate"),
        ({"certificate": "empty", "key": "ours.key"}, "tls.certificate empty has no certificates"),
        ({"certificate": "ours.crt", "key": "."}, "tls.key . cannot be read: Is a directory"),
        ({"certificate": "ours.crt", "key": "ours.crt"}, "tls.key ours.crt has no private key"),
        ({"certificate": "ours.crt", "key": "others.key"}, "is not the key of ours.crt"),
    ],
)
def test_files_that_cannot_be_used_are_named(
    files: dict[str, Path],
    fields: dict[str, str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "half").write_bytes(OURS.root[:200])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidRequest, match=message):
        Client(tls=Tls(**fields))


def test_roots_may_have_comments(files: dict[str, Path]) -> None:
    files["ours.pem"].write_bytes("# Größter Anbieter\n".encode() + OURS.root + OTHERS.root)
    with Client(tls=Tls(str(files["ours.pem"]))):
        pass


def test_the_command_has_flags_for_it(
    start_server: StartServer,
    files: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    address, plain = start_server(asks=True), start_server(None)

    def health(*flags: str, server: str = address) -> str:
        """What it said, with an exit code that fits."""
        code = main(["health", "--timeout", "20", *flags, "--server", server])
        out, err = capsys.readouterr()
        assert (code, err == "") in ((0, True), (1, False))
        return out or err

    own = ["--tls-cert", str(files["ours.crt"]), "--tls-key", str(files["ours.key"])]
    assert health("--tls-ca", str(files["ours.pem"]), *own) == "serving\n"
    # Well-known roots have not signed it.
    for flags in (["--tls"], own):
        assert "certificate is not trusted" in health(*flags)
    assert "needs tls.key" in health(*own[:2])
    for name, file in {"CA": "ours.pem", "CERT": "ours.crt", "KEY": "ours.key"}.items():
        monkeypatch.setenv(f"LORAX_TLS_{name}", str(files[file]))
    assert health() == "serving\n"
    assert "not trusted" in health("--tls-ca", str(files["others.pem"]))
    assert "does not speak TLS" in health(server=plain)
    assert health("--no-tls", server=plain) == "serving\n"
    monkeypatch.setenv("LORAX_TLS", "off")
    assert health(server=plain) == "serving\n"
    assert health("--tls") == "serving\n"
    # A flag beats the variable: never plain text for who names a file.
    assert health("--tls-ca", str(files["ours.pem"])) == "serving\n"
    for flag, file in {
        "--tls-ca": "ours.pem",
        "--tls-cert": "ours.crt",
        "--tls-key": "ours.key",
    }.items():
        assert "does not speak TLS" in health(flag, str(files[file]), server=plain)
        assert f"--no-tls and {flag} exclude each other" in health("--no-tls", flag, "file")
    assert "does not speak TLS" in health("--tls-ca", "", server=plain)
    monkeypatch.setenv("LORAX_TLS", "1")
    assert health() == "lorax: error: LORAX_TLS must be on or off, found '1'\n"


def test_a_failed_handshake_is_one_line(start_server: StartServer) -> None:
    command = [sys.executable, "-m", "lorax_serve.cli.client", "health", "--tls"]
    done = subprocess.run(
        [*command, "--server", start_server()], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert "certificate is not trusted" in done.stderr
