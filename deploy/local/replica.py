"""One lorax-serve of the local cluster: a pod, as far as others can see."""

from __future__ import annotations

import sys
import urllib.request
from collections.abc import Mapping
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from deploy.local.processes import Process, wait_until

__all__ = ["ADAPTER_BYTES", "ADAPTER_SLOTS", "MAX_BATCH_SIZE", "RESIDENT", "Replica"]

MAX_BATCH_SIZE = 32
ADAPTER_SLOTS = 8
RESIDENT = 26
"""Adapters for which a replica has memory. A third of them is 20."""
ADAPTER_BYTES = 28_160
"""Of host memory that each takes."""


class Replica:
    """One server.

    Args:
        name: what its answers call it.
        host: its address, on the loopback.
        port: of gRPC.
        metrics: the port of its metrics.
        directory: of its log and its state.
        env: variables beside this process's own.
        flags: beside those that all have.

    Attributes:
        process: of the server; its engine is in the same group.
        address: of gRPC.
        metrics: their URL.
    """

    def __init__(
        self,
        name: str,
        host: str,
        port: int,
        metrics: int,
        directory: Path,
        env: Mapping[str, str],
        flags: Mapping[str, object],
    ) -> None:
        settings = {
            "dtype": "float32",
            "threads": 1,
            "host": host,
            "port": port,
            "metrics-port": metrics,
            "replica-name": name,
            "state": directory / name,
            "adapter-slots": ADAPTER_SLOTS,
            "max-adapter-bytes": RESIDENT * ADAPTER_BYTES,
            "max-batch-size": MAX_BATCH_SIZE,
            "max-sequence-length": 8192,
            "drain-seconds": 30,
            # Envoy notices after two health checks.
            "linger-seconds": 2,
            **flags,
        }
        command = [sys.executable, "-m", "lorax_serve.cli.serve"]
        for flag, value in settings.items():
            command += [f"--{flag}", str(value)]
        env = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **env}
        self.process = Process(name, command, directory, env)
        self.host = host
        self.address = f"{host}:{port}"
        self.metrics = f"http://{host}:{metrics}/metrics"

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
