"""Envoy with ``deploy/gateway/envoy.yaml``; only ports and the name server are this machine's."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import urllib.request
from pathlib import Path
from typing import Any, NamedTuple

from deploy.local.processes import Process

__all__ = ["CONFIG", "DRAIN", "Gateway", "Ports", "find_envoy"]

CONFIG = Path(__file__).resolve().parents[1] / "gateway" / "envoy.yaml"
DRAIN = CONFIG.parent / "drain.sh"
_VENV = CONFIG.parents[2] / ".venv-gateway"


def find_envoy() -> str | None:
    """Envoy's program: ``$ENVOY``, that of ``make gateway-setup``, or one on the path."""
    own = _VENV / "bin" / "envoy"
    return os.environ.get("ENVOY") or (str(own) if own.exists() else shutil.which("envoy"))


class Ports(NamedTuple):
    """Where an Envoy is, and what it asks, on the loopback.

    Attributes:
        listener: for calls.
        admin: for whoever runs it.
        status: for probes and Prometheus.
        replica: that all replicas have.
        name_server: of the name server.
    """

    listener: int
    admin: int
    status: int
    replica: int
    name_server: int


class Gateway:
    """One Envoy, to be started.

    Args:
        name: of its log.
        ports: its own, and those of others.
        logs: directory of its log and of the file that it reads.
        round_robin: whether it ignores adapters, to compare.
        text: of its file, where that is another than ``CONFIG``: one that the chart rendered.

    Attributes:
        process: of it.
        address: for calls.
    """

    def __init__(
        self,
        name: str,
        ports: Ports,
        logs: Path,
        *,
        round_robin: bool = False,
        text: str | None = None,
    ) -> None:
        envoy = find_envoy()
        assert envoy is not None, "there is no envoy: run make gateway-setup"
        rendered = logs / f"{name}.yaml"
        known = CONFIG.read_text() if text is None else text
        rendered.write_text(_configuration(known, ports, round_robin))
        command = [envoy, "-c", str(rendered), "--config-yaml", json.dumps(_resolver(ports))]
        # As the chart has it, but for threads.
        command += ["--disable-hot-restart", "--concurrency", "1", "--log-level", "warning"]
        self.process = Process(name, [*command, "--drain-time-s", "10"], logs)
        self.address = f"127.0.0.1:{ports.listener}"
        self._ports = ports

    def healthy(self) -> int:
        """How many replicas it sends requests to; 0 too if it does not answer."""
        try:
            url = f"http://127.0.0.1:{self._ports.admin}/clusters"
            with urllib.request.urlopen(url, timeout=5) as answer:
                lines = str(answer.read(), "utf-8").splitlines()
        except OSError:
            return 0
        return sum(each.startswith("lorax::") and "flags::healthy" in each for each in lines)

    def drain(self, seconds: int) -> None:
        """What Kubernetes does before SIGTERM; waits until that has ended."""
        command = ["bash", str(DRAIN), str(seconds), str(self._ports.admin)]
        subprocess.run(command, check=True)

    @property
    def status(self) -> str:
        """Where probes and Prometheus ask, as ``host:port``."""
        return f"127.0.0.1:{self._ports.status}"


def _configuration(text: str, ports: Ports, round_robin: bool) -> str:
    text = text.replace("0.0.0.0", "127.0.0.1")
    for name in ("listener", "admin", "status", "replica"):
        here = f"port_value: {getattr(ports, name)} }}"
        text, found = re.subn(rf"port_value: \d+ }}  # {name} port", here, text)
        assert found, f"the configuration has no line for the {name} port"
    if round_robin:
        text, found = re.subn(r"RING_HASH\n +ring_hash_lb_config: .*", "ROUND_ROBIN", text)
        assert found == 1, "the configuration has no RING_HASH"
    return text


def _resolver(ports: Ports) -> dict[str, Any]:
    """What tells Envoy of the name server."""
    cares = "type.googleapis.com/envoy.extensions.network.dns_resolver.cares.v3"
    address = {"address": "127.0.0.1", "port_value": ports.name_server}
    return {
        "typed_dns_resolver_config": {
            "name": "envoy.network.dns_resolver.cares",
            "typed_config": {
                "@type": f"{cares}.CaresDnsResolverConfig",
                "resolvers": [{"socket_address": address}],
                "dns_resolver_options": {"no_default_search_domain": True},
            },
        }
    }
