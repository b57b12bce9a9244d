"""A real Prometheus, and promtool: Debian's package ``prometheus``. Else the tests are skipped."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

__all__ = ["Prometheus", "free_port", "needs_prometheus", "promtool", "running"]

_MISSING = [each for each in ("promtool", "prometheus") if shutil.which(each) is None]
needs_prometheus = pytest.mark.skipif(
    bool(_MISSING),
    reason=f"no {' and no '.join(_MISSING)} here: apt install --no-install-recommends prometheus",
)


def promtool(*arguments: str | Path, stdin: str | None = None) -> str:
    """What it prints; it must find nothing wrong."""
    command = ["promtool", *map(str, arguments)]
    done = subprocess.run(
        command, input=stdin, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def free_port() -> int:
    """A port that nobody listens on now, for servers that come back at the same address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Prometheus:
    """A running one.

    Args:
        url: where it answers.
    """

    def __init__(self, url: str) -> None:
        self._url = url

    async def query(self, expression: str) -> list[Any]:
        """The samples that an expression gives now.

        Raises:
            AssertionError: Prometheus does not take it.
        """
        answer = await self._get("/api/v1/query", query=expression)
        assert answer["status"] == "success", f"{expression}: {answer}"
        result = answer["data"]["result"]
        return result if isinstance(result, list) else [result]

    async def firing(self) -> dict[str, list[dict[str, str]]]:
        """Labels of the alerts that fire now, by name."""
        found: dict[str, list[dict[str, str]]] = {}
        for alert in (await self._get("/api/v1/alerts"))["data"]["alerts"]:
            if alert["state"] == "firing":
                found.setdefault(alert["labels"]["alertname"], []).append(alert["labels"])
        return found

    async def fires(self, name: str, seconds: float = 60, **labels: str) -> None:
        """Wait for an alert."""

        def among(found: dict[str, list[dict[str, str]]]) -> bool:
            return any(labels.items() <= each.items() for each in found.get(name, []))

        await self._wait(among, seconds, f"{name} {labels} does not fire")

    async def silent(self, name: str, seconds: float = 60) -> None:
        """Wait until an alert is over."""
        await self._wait(lambda found: name not in found, seconds, f"{name} goes on")

    async def _wait(
        self, done: Callable[[dict[str, list[dict[str, str]]]], bool], seconds: float, what: str
    ) -> None:
        found: dict[str, list[dict[str, str]]] = {}
        try:
            async with asyncio.timeout(seconds):
                while not done(found := await self.firing()):  # noqa: ASYNC110 - it has no event
                    await asyncio.sleep(0.2)
        except TimeoutError:
            pytest.fail(f"{what} after {seconds:g} s; firing: {found}")

    async def _get(self, path: str, **parameters: str) -> Any:
        def get() -> Any:
            try:
                with urllib.request.urlopen(url, timeout=10) as answer:
                    return json.load(answer)
            except urllib.error.HTTPError as error:
                with error:
                    return json.load(error)

        url = f"{self._url}{path}?{urllib.parse.urlencode(parameters)}"
        return await asyncio.to_thread(get)


@asynccontextmanager
async def running(directory: Path, targets: list[str], rules: str) -> AsyncIterator[Prometheus]:
    """A Prometheus that scrapes ``targets`` twice a second and evaluates ``rules``."""
    (directory / "rules.yaml").write_text(rules, encoding="utf-8")
    job = {"job_name": "lorax", "static_configs": [{"targets": targets}]}
    settings = {
        "global": {"scrape_interval": "500ms", "evaluation_interval": "1s"},
        "rule_files": ["rules.yaml"],
        "scrape_configs": [job],
    }
    (directory / "prometheus.yml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    address = f"127.0.0.1:{free_port()}"
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(  # noqa: ASYNC220 - it runs beside the test
            [
                "prometheus",
                f"--config.file={directory / 'prometheus.yml'}",
                f"--storage.tsdb.path={directory / 'data'}",
                f"--web.listen-address={address}",
                "--log.level=warn",
            ],
            stdout=log,
            stderr=log,
        )
    try:
        await _ready(f"http://{address}/-/ready", process, directory / "log")
        yield Prometheus(f"http://{address}")
    finally:
        process.terminate()
        await asyncio.to_thread(process.wait, 20)


async def _ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    def ready() -> bool:
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                return bool(answer.status == 200)
        except urllib.error.HTTPError as error:
            error.close()
            return False
        except OSError:
            return False

    async with asyncio.timeout(30):
        while not await asyncio.to_thread(ready):
            assert process.poll() is None, log.read_text("utf-8")  # noqa: ASYNC240 - it is over
            await asyncio.sleep(0.1)
