"""Envoy with ``deploy/gateway/envoy.yaml``; only ports and the name server are this machine's."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

from deploy.local.processes import Process

__all__ = ["find_envoy", "gateway"]

CONFIG = Path(__file__).resolve().parents[1] / "gateway" / "envoy.yaml"
_VENV = CONFIG.parents[2] / ".venv-gateway"


def find_envoy() -> str | None:
    """Envoy's program: ``$ENVOY``, that of ``make gateway-setup``, or one on the path."""
    own = _VENV / "bin" / "envoy"
    return os.environ.get("ENVOY") or (str(own) if own.exists() else shutil.which("envoy"))


def gateway(
    logs: Path, listener: int, admin: int, replica: int, name_server: int, *, round_robin: bool
) -> Process:
    """Envoy, to be started.

    Args:
        logs: directory of its log and of the file that it reads.
        listener: its port, on 127.0.0.1.
        admin: the port of its statistics.
        replica: the port that all replicas have.
        name_server: the port of the name server.
        round_robin: whether it ignores adapters, to compare.
    """
    envoy = find_envoy()
    assert envoy is not None, "there is no envoy: run make gateway-setup"
    text = CONFIG.read_text().replace("0.0.0.0", "127.0.0.1")
    for name, port in (("listener", listener), ("admin", admin), ("replica", replica)):
        text, found = re.subn(rf"port_value: \d+ }}  # {name} port", f"port_value: {port} }}", text)
        assert found == 1, f"{CONFIG} has no line for the {name} port"
    if round_robin:
        text, found = re.subn(r"RING_HASH\n +ring_hash_lb_config: .*", "ROUND_ROBIN", text)
        assert found == 1, f"{CONFIG} has no RING_HASH"
    name = "envoy-round-robin" if round_robin else "envoy"
    rendered = logs / f"{name}.yaml"
    rendered.write_text(text)
    cares = "type.googleapis.com/envoy.extensions.network.dns_resolver.cares.v3"
    resolver = {
        "typed_dns_resolver_config": {
            "name": "envoy.network.dns_resolver.cares",
            "typed_config": {
                "@type": f"{cares}.CaresDnsResolverConfig",
                "resolvers": [
                    {"socket_address": {"address": "127.0.0.1", "port_value": name_server}}
                ],
                "dns_resolver_options": {"no_default_search_domain": True},
            },
        }
    }
    command = [envoy, "-c", str(rendered), "--config-yaml", json.dumps(resolver)]
    command += ["--disable-hot-restart", "--concurrency", "1", "--log-level", "warning"]
    return Process(name, command, logs)
