"""A real Prometheus with the shipped rules: Debian's package ``prometheus``, where it is there."""

from __future__ import annotations

import asyncio
import json
import shutil
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from deploy.local.processes import Process

__all__ = ["NO_PROMETHEUS", "RULES", "Prometheus", "find_prometheus", "prometheus"]

RULES = Path(__file__).resolve().parents[1] / "monitoring" / "rules" / "lorax.yaml"
NO_PROMETHEUS = "no prometheus here: apt install --no-install-recommends prometheus"


def find_prometheus() -> str | None:
    """Its program."""
    return shutil.which("prometheus")


def prometheus(
    directory: Path,
    port: int,
    targets: Sequence[str],
    rules: str,
    scrape_seconds: float = 1.5,
    gateways: Sequence[str] = (),
) -> Process:
    """One that scrapes ``targets`` and evaluates ``rules``, to be started.

    Args:
        directory: of its log, its data and the files that it reads.
        port: where it answers, on 127.0.0.1.
        targets: addresses of metrics, which make the job "lorax".
        rules: a rules file's text.
        scrape_seconds: from scrape to scrape, and what one may take: more than the second for which
            a server waits for an engine that hangs.
        gateways: addresses of the status of Envoys, which make the job "gateway".
    """
    scrape = f"{round(scrape_seconds * 1000)}ms"
    (directory / "rules.yaml").write_text(rules, encoding="utf-8")
    settings = {
        "global": {"scrape_interval": scrape, "evaluation_interval": "1s"},
        "rule_files": ["rules.yaml"],
        "scrape_configs": [
            {"job_name": "lorax", "static_configs": [{"targets": [*targets]}]},
            {
                "job_name": "gateway",
                "metrics_path": "/stats/prometheus",
                "static_configs": [{"targets": [*gateways]}],
            },
        ],
    }
    config = directory / "prometheus.yml"
    config.write_text(yaml.safe_dump(settings), encoding="utf-8")
    command = [find_prometheus() or "prometheus", f"--config.file={config}", "--log.level=warn"]
    command += [f"--storage.tsdb.path={directory / 'prometheus-data'}"]
    return Process("prometheus", [*command, f"--web.listen-address=127.0.0.1:{port}"], directory)


Alerts = dict[str, list[dict[str, str]]]


class Prometheus:
    """A running one.

    Args:
        port: where it answers, on 127.0.0.1.
    """

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"

    def ready(self) -> bool:
        """Whether it answers."""
        try:
            with urllib.request.urlopen(f"{self.url}/-/ready", timeout=5) as answer:
                return bool(answer.status == 200)
        except urllib.error.HTTPError as error:
            error.close()
            return False
        except OSError:
            return False

    async def query(self, expression: str) -> list[Any]:
        """The samples that an expression gives now.

        Raises:
            AssertionError: Prometheus does not take it.
        """
        answer = await self._get("/api/v1/query", query=expression)
        assert answer["status"] == "success", f"{expression}: {answer}"
        result = answer["data"]["result"]
        return result if isinstance(result, list) else [result]

    async def firing(self) -> Alerts:
        """Labels of the alerts that fire now, by name."""
        found: Alerts = {}
        for alert in (await self._get("/api/v1/alerts"))["data"]["alerts"]:
            if alert["state"] == "firing":
                found.setdefault(alert["labels"]["alertname"], []).append(alert["labels"])
        return found

    async def fired(self, seconds: float) -> list[str]:
        """Names of the alerts that fired at some time in so many seconds until now."""
        range_ = f"[{round(seconds * 1000)}ms]"
        found = await self.query(f'count_over_time(ALERTS{{alertstate="firing"}}{range_})')
        return sorted({each["metric"]["alertname"] for each in found})

    async def fires(self, name: str, seconds: float = 60, **labels: str) -> None:
        """Wait for an alert.

        Raises:
            AssertionError: it does not fire in time.
        """

        def among(found: Alerts) -> bool:
            return any(labels.items() <= each.items() for each in found.get(name, []))

        await self._wait(among, seconds, f"{name} {labels} does not fire")

    async def silent(self, name: str, seconds: float = 60) -> None:
        """Wait until an alert is over.

        Raises:
            AssertionError: it fires still when time is over.
        """
        await self._wait(lambda found: name not in found, seconds, f"{name} goes on")

    async def _wait(self, done: Callable[[Alerts], bool], seconds: float, what: str) -> None:
        found: Alerts = {}
        try:
            async with asyncio.timeout(seconds):
                while not done(found := await self.firing()):  # noqa: ASYNC110 - it has no event
                    await asyncio.sleep(0.2)
        except TimeoutError:
            raise AssertionError(f"{what} after {seconds:g} s; firing: {found}") from None

    async def _get(self, path: str, **parameters: str) -> Any:
        def get() -> Any:
            try:
                with urllib.request.urlopen(url, timeout=10) as answer:
                    return json.load(answer)
            except urllib.error.HTTPError as error:
                with error:
                    return json.load(error)

        url = f"{self.url}{path}?{urllib.parse.urlencode(parameters)}"
        return await asyncio.to_thread(get)
