"""Three replicas, Envoy, Prometheus, a bucket with a manifest and a name server on the loopback."""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks.adapters import write_random_adapter
from benchmarks.tiny_model import TINY_LLAMA, save_tiny_model
from deploy.local.gateway import Gateway, Ports
from deploy.local.manifest import BUCKET, Manifest, credentials, push
from deploy.local.processes import Process, free_port, wait_until
from deploy.local.prometheus import RULES, Prometheus, find_prometheus, prometheus
from deploy.local.replica import Replica
from deploy.monitoring.durations import shortened
from lorax_serve.store.digest import digest_of

__all__ = [
    "ADDRESSES",
    "NAMES",
    "SERVICE",
    "SPARE",
    "TIMES",
    "WATCH_SECONDS",
    "Cluster",
]

SERVICE = "lorax-serve-headless"
ADDRESSES = ("127.0.0.11", "127.0.0.12", "127.0.0.13")
_SPARE_ADDRESSES = ("127.0.0.14", "127.0.0.15", "127.0.0.16")
NAMES = tuple(f"adapter-{number:02d}" for number in range(60))
SPARE = "late"
"""An adapter that is in the bucket, and not in the manifest at first."""
WATCH_SECONDS = 2.0
# As the chart has them, five times faster: a new pod is ready for as long as a name server may keep
# its answers before an old one goes, and an ending one leaves the Service before SIGTERM.
_DNS_SECONDS = _MIN_READY_SECONDS = 6.0
_PRE_STOP_SECONDS = 2.0
TIMES = 20
"""How many times faster the rules are than the shipped ones."""


class Cluster:
    """All of it. ``start`` it, and ``stop`` it whatever happened.

    Args:
        directory: an empty one, for logs, state and files.

    Attributes:
        processes: all that run, in the order of their start: ``run`` adds to them.
        replicas: the servers.
        manifest: what they serve.
        gateways: two that route by adapter, and one that does not.
        prometheus: watches the replicas; None if it is not installed.
    """

    def __init__(self, directory: Path) -> None:
        self.processes: list[Process] = []
        self.replicas: list[Replica] = []
        self.manifest: Manifest
        self.gateways: list[Gateway] = []
        self.prometheus: Prometheus | None = None
        self._directory = directory
        self._digests: dict[str, str] = {}
        self._names = directory / "names"
        self._spare = enumerate(_SPARE_ADDRESSES, len(ADDRESSES))

    @property
    def gateway(self) -> str:
        """The address of Envoy, which routes by adapter."""
        return self.gateways[0].address

    @property
    def round_robin(self) -> str:
        """That of one that does not."""
        return self.gateways[-1].address

    def start(self) -> None:
        """Bring everything up; at the end every replica serves all adapters.

        Raises:
            RuntimeError: something does not start; with the end of its log.
        """
        model = self._directory / "model"
        config: Any = type(TINY_LLAMA)
        long = {**TINY_LLAMA.to_diff_dict(), "max_position_embeddings": 8192}
        save_tiny_model(model, config(**long))
        endpoint = self._bucket(model)
        self.manifest = Manifest(endpoint)
        self.manifest.write(self.entry(name) for name in NAMES)
        self._env = credentials(endpoint)
        self._flags = {
            "model": model,
            "manifest": self.manifest.uri,
            "watch-seconds": WATCH_SECONDS,
        }
        hosts = (*ADDRESSES, *_SPARE_ADDRESSES)
        self._ports = free_port(*hosts), free_port(*hosts)
        self._servers()
        self._gateways()
        self._monitoring()

    def stop(self) -> None:
        """End everything, the last that was started first."""
        for process in reversed(self.processes):
            process.kill()

    def run(self, process: Process, ready: Callable[[], bool] | None = None) -> Process:
        """Start one more process, which ends with the others.

        Args:
            process: not started yet.
            ready: waited for.
        """
        self.processes.append(process)
        process.start()
        if ready is not None:
            wait_until(ready, process)
        return process

    def entry(self, name: str) -> dict[str, Any]:
        """An adapter of the bucket as the manifest names it."""
        source = f"s3://{BUCKET}/all/{name}"
        return {"name": name, "source": source, "digest": f"sha256:{self._digests[name]}"}

    def restart(self, replica: Replica) -> None:
        """Stop a replica, and start it again at the same address."""
        code = replica.process.stop()
        assert code == 0, replica.process.tail()
        replica.start()

    def replace(self, replica: Replica) -> Replica:
        """Put a new one in a replica's place, as the chart's Deployment does: with an address and a
        disk of its own, and before the old one goes. Returns it."""
        new = self._replica(*next(self._spare))
        self.processes.append(new.process)
        new.start()
        self.replicas[self.replicas.index(replica)] = new
        self._publish(replica)  # both are there
        time.sleep(_MIN_READY_SECONDS)
        self._publish()
        time.sleep(_PRE_STOP_SECONDS)
        code = replica.process.stop()
        assert code == 0, replica.process.tail()
        return new

    def _bucket(self, model: Path) -> str:
        adapters = {}
        for seed, name in enumerate((*NAMES, SPARE)):
            adapters[name] = self._directory / "adapters" / name
            write_random_adapter(adapters[name], model, rank=4, seed=seed)
            self._digests[name] = digest_of(adapters[name])
        port = free_port("127.0.0.1")
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        self.run(Process("bucket", command, self._directory), lambda: _listens(port))
        endpoint = f"http://127.0.0.1:{port}"
        push(endpoint, adapters)
        return endpoint

    def _replica(self, number: int, host: str) -> Replica:
        port, metrics = self._ports
        return Replica(
            f"replica-{number}", host, port, metrics, self._directory, self._env, self._flags
        )

    def _servers(self) -> None:
        for number, host in enumerate(ADDRESSES):
            replica = self._replica(number, host)
            self.run(replica.process)
            self.replicas.append(replica)
        for replica in self.replicas:
            wait_until(replica.serving, replica.process)

    def _publish(self, *others: Replica) -> None:
        """Let the name server answer with all replicas, and these."""
        hosts = [replica.host for replica in (*others, *self.replicas)]
        new = self._names.with_suffix(".new")
        new.write_text("\n".join(hosts))
        new.replace(self._names)

    def _gateways(self) -> None:
        names = free_port("127.0.0.1")
        self._publish()
        command = [sys.executable, "-m", "deploy.local.name_server", str(names), SERVICE]
        command += [str(self._names), str(_DNS_SECONDS)]
        self.run(Process("name-server", command, self._directory))
        for name in ("envoy", "envoy-second", "envoy-round-robin"):
            listener, admin, status = (free_port("127.0.0.1") for _ in range(3))
            ports = Ports(listener, admin, status, self._ports[0], names)
            each = Gateway(name, ports, self._directory, round_robin=name == "envoy-round-robin")
            self.run(each.process, lambda each=each: each.healthy() == len(ADDRESSES))  # type: ignore[misc]
            self.gateways.append(each)

    def _monitoring(self) -> None:
        if find_prometheus() is None:
            return
        port = free_port("127.0.0.1")
        targets = [urlsplit(each.metrics).netloc for each in self.replicas]
        rules = shortened(RULES.read_text(encoding="utf-8"), TIMES)
        self.prometheus = Prometheus(port)
        gateways = [each.status for each in self.gateways]
        process = prometheus(self._directory, port, targets, rules, gateways=gateways)
        self.run(process, self.prometheus.ready)


def _listens(port: int) -> bool:
    with closing(socket.socket()) as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
