"""What those who route requests, and those who write manifests, want to know of a replica."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from lorax_serve.core import EngineStats
from lorax_serve.registry.manifest_reconciler import ManifestReconciler
from lorax_serve.registry.residency import Residency

__all__ = ["ManifestCollector", "ResidencyCollector", "VLLMCollector", "kv_usage"]


def kv_usage(stats: EngineStats) -> float:
    """The share of the KV cache that running requests take, in [0, 1]."""
    return stats.kv_tokens / stats.kv_capacity if stats.kv_capacity else 0.0


class ResidencyCollector(Collector):
    """Adapters by name, as they are when Prometheus asks: who has left memory has no series.

    Args:
        named: where adapters are, of as many as may have a label.
    """

    def __init__(self, named: Callable[[], Residency]) -> None:
        self._named = named

    def collect(self) -> Iterator[Metric]:
        """All series."""
        now = self._named()
        resident = GaugeMetricFamily(
            "lorax_adapter_resident",
            "Always 1, for each adapter in memory, by the fastest tier that has it",
            labels=["adapter", "tier"],
        )
        at_work = GaugeMetricFamily(
            "lorax_adapter_at_work",
            "Always 1, for each adapter with requests: running, or waiting if none of them runs",
            labels=["adapter", "state"],
        )
        for family, label, names in (
            (resident, "device", now.device),
            (resident, "host", now.host),
            (at_work, "running", now.running),
            (at_work, "waiting", now.waiting),
        ):
            for name in names:
                family.add_metric([name, label], 1)
        yield from (resident, at_work)


class VLLMCollector(Collector):
    """The gauges that the Gateway API Inference Extension reads, under vLLM's names.

    The names have colons, which Prometheus keeps for rules, and the lists of adapters make a new
    series for each state of the server: so they are there for those only who ask for them.

    Args:
        stats: the engine's gauges.
        named: where adapters are.
        slots: distinct adapters in one batch.
    """

    def __init__(
        self, stats: Callable[[], EngineStats], named: Callable[[], Residency], slots: int
    ) -> None:
        self._stats = stats
        self._named = named
        self._slots = slots

    def collect(self) -> Iterator[Metric]:
        """All series."""
        now, named = self._stats(), self._named()
        for name, text, value in (
            ("num_requests_waiting", "Requests waiting for a place in the batch", now.waiting),
            ("num_requests_running", "Requests in the batch", now.running),
            ("kv_cache_usage_perc", "Share of the KV cache in use, in [0, 1]", kv_usage(now)),
            ("gpu_cache_usage_perc", "The same under its older name", kv_usage(now)),
        ):
            yield GaugeMetricFamily(f"vllm:{name}", text, value)
        # Routers take the series with the largest value. There is one only, and it is of now.
        info = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Unix time of this answer; the labels list the adapters with requests",
            labels=["running_lora_adapters", "waiting_lora_adapters", "max_lora"],
        )
        running, waiting = ",".join(named.running), ",".join(named.waiting)
        info.add_metric([running, waiting, str(self._slots)], time.time())
        yield info


class ManifestCollector(Collector):
    """What becomes of a manifest.

    Args:
        reconciler: follows it.
    """

    def __init__(self, reconciler: ManifestReconciler) -> None:
        self._reconciler = reconciler

    def collect(self) -> Iterator[Metric]:
        """All series."""
        wanted = "Adapters in the last manifest that could be read"
        yield GaugeMetricFamily("lorax_manifest_adapters", wanted, self._reconciler.wanted)
        errors = "Times that the manifest could not be read"
        yield CounterMetricFamily(
            "lorax_manifest_read_errors", errors, self._reconciler.read_errors
        )
