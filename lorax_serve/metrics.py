"""What the server tells Prometheus. Every name starts with ``lorax_``, times are in seconds.

Label values are bounded: an adapter has its own only while it is loaded, and at most
``MAX_ADAPTER_LABELS`` have one at a time.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator, Mapping

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    start_http_server,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from lorax_serve import __version__
from lorax_serve.core import AdapterStats, EngineStats, StopReason, TokenOutput
from lorax_serve.engine.messages import StepReport
from lorax_serve.errors import (
    AdapterConflict,
    AdapterRejected,
    EngineFailed,
    InvalidRequest,
    LoraxError,
    Overloaded,
    RejectReason,
    SourceFailed,
    SourceReason,
    StoreFailed,
)
from lorax_serve.frontend.generator import RequestListener, TextStream
from lorax_serve.registry.compositions import Composed
from lorax_serve.registry.events import RegistryListener
from lorax_serve.registry.manifest_reconciler import ManifestReconciler
from lorax_serve.registry.residency import Residency
from lorax_serve.registry.version import Adapter
from lorax_serve.router_metrics import (
    ManifestCollector,
    ResidencyCollector,
    VLLMCollector,
    kv_usage,
)

__all__ = [
    "BASE_LABEL",
    "COMPOSED_LABEL",
    "MAX_ADAPTER_LABELS",
    "OTHER_LABEL",
    "Metrics",
    "MetricsServer",
]

# No adapter's name starts with an underscore.
BASE_LABEL = "_base"
OTHER_LABEL = "_other"
COMPOSED_LABEL = "_composed"
MAX_ADAPTER_LABELS = 256

_LATENCY = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    60.0,
)
_SEQUENCES = (1, 2, 4, 8, 16, 32, 64, 128, 256)

# Prometheus sees no increase where a series begins with 1: those with known labels begin with 0.
_ERROR_CODES = (
    "FAILED_PRECONDITION",
    "INTERNAL",
    "INVALID_ARGUMENT",
    "NOT_FOUND",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "UNAVAILABLE",
)
_UNTYPED_REJECTS = (AdapterConflict, EngineFailed, InvalidRequest, Overloaded, StoreFailed)


def _reject_reason(error: type[LoraxError]) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", error.__name__).lower()


class Metrics(RequestListener, RegistryListener):
    """All series of one server.

    Attributes:
        registry: its own, so that several servers can live in one process.
        stats: the engine's gauges, read when Prometheus asks.
        residency: where adapters are; asked then too, from a thread of its own.
        failures: what should be served and could not be loaded, by name.
    """

    def __init__(self, *, vllm_names: bool = False, adapter_slots: int = 0) -> None:
        self.registry = registry = CollectorRegistry()
        self.residency: Callable[[], Residency] = Residency
        self.failures: Mapping[str, LoraxError] = {}
        self.stats = EngineStats()
        self._versions: dict[str, set[int]] = {}
        self._labels: set[str] = set()
        ProcessCollector(registry=registry)
        build = Gauge(
            "lorax_build_info", "Always 1; the label is the version", ["version"], registry=registry
        )
        build.labels(__version__).set(1)
        self._serving = Gauge(
            "lorax_serving",
            "1 while calls are let in: once model and adapters are loaded, until it drains",
            registry=registry,
        )
        self._time_to_first_token = Histogram(
            "lorax_time_to_first_token_seconds",
            "From a request's admission to its first token",
            buckets=_LATENCY,
            registry=registry,
        )
        self._inter_token = Histogram(
            "lorax_inter_token_latency_seconds",
            "From one token of a request to its next",
            buckets=_LATENCY,
            registry=registry,
        )
        self._queue_time = Histogram(
            "lorax_queue_time_seconds",
            "From a request's admission to the first step that computes it",
            buckets=_LATENCY,
            registry=registry,
        )
        self._prompt_tokens = Counter(
            "lorax_prompt_tokens", "Prompt tokens admitted", ["adapter"], registry=registry
        )
        self._generated_tokens = Counter(
            "lorax_generated_tokens", "Tokens generated", ["adapter"], registry=registry
        )
        self._requests = Counter(
            "lorax_requests",
            "Admitted requests that have ended",
            ["adapter", "stop_reason"],
            registry=registry,
        )
        self._failed = Counter(
            "lorax_requests_failed",
            "Admitted requests that the engine failed on, NaN in their output included",
            registry=registry,
        )
        self._in_flight = Gauge(
            "lorax_requests_in_flight",
            "Admitted requests that have not ended, whatever the engine says",
            registry=registry,
        )
        self._errors = Counter(
            "lorax_errors", "Calls answered with an error status", ["code"], registry=registry
        )
        for code in _ERROR_CODES:
            self._errors.labels(code)
        self._loads = Counter("lorax_adapter_loads", "Adapters loaded", registry=registry)
        self._unloads = Counter("lorax_adapter_unloads", "Adapters freed", registry=registry)
        self._rejects = Counter(
            "lorax_adapter_rejects", "Adapter loads refused", ["reason"], registry=registry
        )
        for reason in (*RejectReason, *SourceReason, *map(_reject_reason, _UNTYPED_REJECTS)):
            self._rejects.labels(reason)
        self._batch_size = Histogram(
            "lorax_batch_size",
            "Sequences computed in one step",
            buckets=_SEQUENCES,
            registry=registry,
        )
        self._step_time = Histogram(
            "lorax_step_seconds", "Duration of one step", buckets=_LATENCY, registry=registry
        )
        self._add_gauges(registry)
        if vllm_names:
            registry.register(VLLMCollector(lambda: self.stats, self._named, adapter_slots))

    def _add_gauges(self, registry: CollectorRegistry) -> None:
        def gauge(name: str, help_text: str, field: str) -> None:
            series = Gauge(name, help_text, registry=registry)
            series.set_function(lambda: getattr(self.stats, field))

        gauge("lorax_requests_waiting", "Requests waiting for a place in the batch", "waiting")
        gauge("lorax_requests_running", "Requests in the batch", "running")
        gauge("lorax_kv_tokens_used", "Tokens whose keys and values are cached", "kv_tokens")
        gauge("lorax_kv_tokens_capacity", "Tokens that the KV cache can hold", "kv_capacity")
        gauge(
            "lorax_kv_tokens_cached",
            "Tokens of ended requests that are kept for prompts that begin alike",
            "kv_cached_tokens",
        )
        use = "Share of the KV cache that running requests take, in [0, 1]"
        Gauge("lorax_kv_usage_ratio", use, registry=registry).set_function(
            lambda: kv_usage(self.stats)
        )
        failed = (
            "What should be served and could not be loaded when last tried; a source or manifest "
            "that cannot be read counts as one"
        )
        Gauge("lorax_adapters_failed", failed, registry=registry).set_function(
            lambda: len(self.failures)
        )
        registry.register(_SchedulerCollector(lambda: self.stats))
        registry.register(_AdapterCollector(lambda: self.stats.adapters))
        registry.register(ResidencyCollector(self._named))

    def watch_manifest(self, reconciler: ManifestReconciler) -> None:
        """Add what becomes of a manifest."""
        self.registry.register(ManifestCollector(reconciler))

    def _named(self) -> Residency:
        """Where adapters are, of as many as may have a label: those in slots first."""
        found = self.residency()
        device = found.device[:MAX_ADAPTER_LABELS]
        host = found.host[: MAX_ADAPTER_LABELS - len(device)]
        at_work = (names[:MAX_ADAPTER_LABELS] for names in (found.running, found.waiting))
        return Residency(device, host, *at_work)

    def step(self, report: StepReport) -> None:
        """The engine has done a step (``AsyncEngine.on_step``)."""
        self.stats = stats = report.stats
        if stats.batch_size:
            self._batch_size.observe(stats.batch_size)
            self._step_time.observe(stats.step_seconds)

    def serving(self, now: bool) -> None:
        """Whether calls are let in."""
        self._serving.set(now)

    def error(self, code: str) -> None:
        """A call was answered with the error status ``code``."""
        self._errors.labels(code).inc()

    def admitted(self, stream: TextStream) -> None:
        """A request went to the engine."""
        self._prompt_tokens.labels(self._label(stream.adapter)).inc(stream.input_token_count)
        self._in_flight.inc()

    def token(self, stream: TextStream, output: TokenOutput, since_last: float) -> None:
        """A token came."""
        if stream.generated_token_count == 1:
            self._time_to_first_token.observe(since_last)
        else:
            self._inter_token.observe(since_last)
        if output.queue_seconds is not None:
            self._queue_time.observe(output.queue_seconds)
        self._generated_tokens.labels(self._label(stream.adapter)).inc()

    def ended(self, stream: TextStream, reason: StopReason) -> None:
        """A request is over."""
        self._requests.labels(self._label(stream.adapter), reason.name.lower()).inc()
        self._in_flight.dec()
        if reason is StopReason.ERROR:
            self._failed.inc()

    def loaded(self, adapter: Adapter) -> None:
        """A version of an adapter is ready."""
        self._loads.inc()
        self._versions.setdefault(adapter.name, set()).add(adapter.key)

    def refused(self, name: str, error: LoraxError) -> None:
        """A load has failed. The name is not a label: it may be anything."""
        typed = error.reason if isinstance(error, AdapterRejected | SourceFailed) else None
        self._rejects.labels(typed or _reject_reason(type(error))).inc()

    def unloaded(self, adapter: Adapter) -> None:
        """A version is freed; with a name's last version, its series go too."""
        self._unloads.inc()
        versions = self._versions[adapter.name]
        versions.discard(adapter.key)
        if versions:
            return
        del self._versions[adapter.name]
        if adapter.name in self._labels:
            self._labels.discard(adapter.name)
            for series in (self._prompt_tokens, self._generated_tokens, self._requests):
                series.remove_by_labels({"adapter": adapter.name})

    def _label(self, adapter: Adapter | None) -> str:
        if adapter is None:
            return BASE_LABEL
        if isinstance(adapter, Composed):
            return COMPOSED_LABEL
        if adapter.name not in self._labels:
            if len(self._labels) >= MAX_ADAPTER_LABELS:
                return OTHER_LABEL
            self._labels.add(adapter.name)
        return adapter.name


class _SchedulerCollector(Collector):
    """What the engine counts from its start; made when Prometheus asks."""

    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        """All series."""
        now = self._stats()
        queries = "Prompt tokens looked up in the prefix cache"
        yield CounterMetricFamily("lorax_prefix_cache_queries", queries, now.prefix_cache_queries)
        hits = "Prompt tokens found in the prefix cache"
        yield CounterMetricFamily("lorax_prefix_cache_hits", hits, now.prefix_cache_hits)
        preemptions = "Requests that gave their memory to others and were computed again"
        yield CounterMetricFamily("lorax_preemptions", preemptions, now.preemptions)


class _AdapterCollector(Collector):
    """The adapters' tiers, made when Prometheus asks: a step costs nothing."""

    def __init__(self, stats: Callable[[], AdapterStats]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        """All series."""
        now = self._stats()
        known = "Loaded adapters and compositions of them, wherever their weights are"
        yield GaugeMetricFamily("lorax_adapters_loaded", known, now.known)
        resident = GaugeMetricFamily(
            "lorax_adapters_resident", "Adapters in memory, by tier", labels=["tier"]
        )
        taken = GaugeMetricFamily(
            "lorax_adapter_bytes",
            "Memory taken by adapters, by tier; a CPU's slots take none beside the host's",
            labels=["tier"],
        )
        limits = GaugeMetricFamily(
            "lorax_adapter_bytes_limit", "Memory budgets for adapters, by tier", labels=["tier"]
        )
        evictions = CounterMetricFamily(
            "lorax_adapter_evictions",
            "Adapters that made room for others, by tier left",
            labels=["tier"],
        )
        for tier, count, nbytes, limit, evicted in (
            ("host", now.host, now.host_bytes, now.host_limit, now.host_evictions),
            ("device", now.device, now.device_bytes, now.device_limit, now.device_evictions),
        ):
            resident.add_metric([tier], count)
            taken.add_metric([tier], nbytes)
            evictions.add_metric([tier], evicted)
            if limit is not None:
                limits.add_metric([tier], limit)
        yield from (resident, taken, limits, evictions)
        reads = "Adapters that were read from disk again for a request"
        yield CounterMetricFamily("lorax_adapter_reads", reads, now.reads)
        seconds = "Time spent on reading adapters again"
        yield CounterMetricFamily("lorax_adapter_read_seconds", seconds, now.read_seconds)
        late = "Reads that had not ended when a request would have had its turn"
        yield CounterMetricFamily("lorax_adapter_late_reads", late, now.late_reads)


class MetricsServer:
    """Serves ``/metrics`` over HTTP on a thread of its own, so that no scrape delays a token.

    Args:
        metrics: what to serve.
        host: address to listen on.
        port: 0 takes a free one.

    Raises:
        InvalidRequest: the port cannot be listened on.
    """

    def __init__(self, metrics: Metrics, host: str, port: int) -> None:
        try:
            self._http, self._thread = start_http_server(port, host, metrics.registry)
        except OSError as error:
            raise InvalidRequest(
                f"metrics_port: cannot listen on {host}:{port}: {error.strerror}"
            ) from error
        self.port: int = self._http.server_port

    async def stop(self) -> None:
        """Close the port."""
        await asyncio.to_thread(self._http.shutdown)
        self._thread.join()
        self._http.server_close()
