"""Three replicas, Envoy, Prometheus, a bucket with a manifest and a name server on the loopback."""

from __future__ import annotations

import socket
import sys
import urllib.request
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.adapters import write_random_adapter
from deploy.local.gateway import gateway
from deploy.local.manifest import BUCKET, Manifest, credentials, push
from deploy.local.processes import Process, free_port, wait_until
from deploy.local.prometheus import RULES, Prometheus, find_prometheus, prometheus
from deploy.monitoring.durations import shortened
from lorax_serve.store.digest import digest_of
from tests.helpers import TINY_LLAMA, save_tiny_model

__all__ = ["NAMES", "TIMES", "WATCH_SECONDS", "Cluster", "Replica"]

SERVICE = "lorax-serve-headless"
ADDRESSES = ("127.0.0.11", "127.0.0.12", "127.0.0.13")
NAMES = tuple(f"adapter-{number:02d}" for number in range(60))
SPARE = "late"
"""An adapter that is in the bucket, and not in the manifest at first."""
WATCH_SECONDS = 2.0
TIMES = 20
"""How many times faster the rules are than the shipped ones."""
_ADAPTER_SLOTS = 8
# A third of the adapters is 20. Each takes so many bytes of a replica's host memory.
_RESIDENT = 26
_ADAPTER_BYTES = 28_160


class Replica:
    """One server.

    Args:
        process: of the server; its engine is in the same group.
        address: of gRPC.
        metrics: its URL.
    """

    def __init__(self, process: Process, address: str, metrics: str) -> None:
        self.process = process
        self.address = address
        self.metrics = metrics

    @property
    def name(self) -> str:
        """What its answers call it."""
        return self.process.name

    def serving(self) -> bool:
        """Whether it says so."""
        with grpc.insecure_channel(self.address) as channel:
            try:
                stub = health_pb2_grpc.HealthStub(channel)
                answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=1)
            except grpc.RpcError:
                return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    def start(self) -> None:
        """Start it, and wait until it serves."""
        self.process.start()
        wait_until(self.serving, self.process)

    def scrape(self, name: str) -> float:
        """A sample of its metrics that has no labels."""
        with urllib.request.urlopen(self.metrics, timeout=5) as answer:
            text = str(answer.read(), "utf-8")
        samples = (s for family in text_string_to_metric_families(text) for s in family.samples)
        return next(float(sample.value) for sample in samples if sample.name == name)


class Cluster:
    """All of it. ``start`` it, and ``stop`` it whatever happened.

    Args:
        directory: an empty one, for logs, state and files.

    Attributes:
        processes: all that run, in the order of their start: ``run`` adds to them.
        replicas: the servers.
        manifest: what they serve.
        gateway: the address of Envoy, which routes by adapter.
        round_robin: that of one that does not.
        prometheus: watches the replicas; None if it is not installed.
    """

    def __init__(self, directory: Path) -> None:
        self.processes: list[Process] = []
        self.replicas: list[Replica] = []
        self.manifest: Manifest
        self.gateway = self.round_robin = ""
        self.prometheus: Prometheus | None = None
        self._directory = directory
        self._digests: dict[str, str] = {}

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
        self._servers(model, endpoint)
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
        """Stop a replica as Kubernetes does, and start it again."""
        code = replica.process.stop()
        assert code == 0, replica.process.tail()
        replica.start()

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

    def _servers(self, model: Path, endpoint: str) -> None:
        self._port, metrics = free_port(*ADDRESSES), free_port(*ADDRESSES)
        for number, host in enumerate(ADDRESSES):
            name = f"replica-{number}"
            flags = {
                "model": model,
                "dtype": "float32",
                "threads": 1,
                "host": host,
                "port": self._port,
                "metrics-port": metrics,
                "replica-name": name,
                "state": self._directory / name,
                "manifest": self.manifest.uri,
                "watch-seconds": WATCH_SECONDS,
                "adapter-slots": _ADAPTER_SLOTS,
                "max-adapter-bytes": _RESIDENT * _ADAPTER_BYTES,
                "max-batch-size": 32,
                "max-sequence-length": 8192,
                "drain-seconds": 30,
                # Envoy notices after two health checks.
                "linger-seconds": 2,
            }
            command = [sys.executable, "-m", "lorax_serve.cli.serve"]
            for flag, value in flags.items():
                command += [f"--{flag}", str(value)]
            env = {**credentials(endpoint), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
            process = self.run(Process(name, command, self._directory, env))
            url = f"http://{host}:{metrics}/metrics"
            self.replicas.append(Replica(process, f"{host}:{self._port}", url))
        for replica in self.replicas:
            wait_until(replica.serving, replica.process)

    def _gateways(self) -> None:
        names = free_port("127.0.0.1")
        command = [sys.executable, "-m", "deploy.local.name_server", str(names), SERVICE]
        self.run(Process("name-server", [*command, *ADDRESSES], self._directory))
        addresses = []
        for round_robin in (False, True):
            port, admin = free_port("127.0.0.1"), free_port("127.0.0.1")
            envoy = gateway(
                self._directory, port, admin, self._port, names, round_robin=round_robin
            )
            healthy = f"http://127.0.0.1:{admin}/clusters"
            self.run(envoy, lambda url=healthy: _healthy(url) == len(ADDRESSES))  # type: ignore[misc]
            addresses.append(f"127.0.0.1:{port}")
        self.gateway, self.round_robin = addresses

    def _monitoring(self) -> None:
        if find_prometheus() is None:
            return
        port = free_port("127.0.0.1")
        targets = [urlsplit(each.metrics).netloc for each in self.replicas]
        rules = shortened(RULES.read_text(encoding="utf-8"), TIMES)
        self.prometheus = Prometheus(port)
        self.run(prometheus(self._directory, port, targets, rules), self.prometheus.ready)


def _listens(port: int) -> bool:
    with closing(socket.socket()) as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _healthy(url: str) -> int:
    """How many replicas Envoy sends requests to."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return str(answer.read(), "utf-8").count("::health_flags::healthy")
    except OSError:
        return 0
