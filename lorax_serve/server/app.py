"""The server: everything in the right order, from start to drain."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from types import TracebackType
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from lorax_serve.config import EngineConfig, ServerConfig
from lorax_serve.core import EngineStats, ModelInfo
from lorax_serve.errors import InvalidRequest, LoraxError
from lorax_serve.frontend.async_engine import AsyncEngine
from lorax_serve.frontend.generator import TextGenerator
from lorax_serve.frontend.text import Tokenizer
from lorax_serve.metrics import Metrics, MetricsServer
from lorax_serve.pb.lorax.v1 import (
    adapter_pb2,
    adapter_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
)
from lorax_serve.registry.in_place import InPlace
from lorax_serve.registry.library import Library
from lorax_serve.registry.manifest_reader import ManifestReader
from lorax_serve.registry.manifest_reconciler import ManifestReconciler
from lorax_serve.registry.reconciler import Reconciler
from lorax_serve.registry.registry import AdapterRegistry
from lorax_serve.registry.residency import Residency
from lorax_serve.registry.start_failures import StartFailures
from lorax_serve.registry.version import Adapter
from lorax_serve.server.adapters import AdapterServicer
from lorax_serve.server.generation import GenerationServicer
from lorax_serve.server.status import Guard
from lorax_serve.sources import FetchLimits, open_source

__all__ = ["SERVICES", "Server"]

SERVICES = tuple(
    service.full_name
    for module in (generation_pb2, adapter_pb2)
    for service in module.DESCRIPTOR.services_by_name.values()
)
"""The services that have a health status of their own."""

# For the last messages of streams that have ended to reach their clients.
_LAST_WRITES_SECONDS = 2.0
_PROGRESS_SECONDS = 5.0
_SCRAPE_SECONDS = 1.0

_OPTIONS = (
    ("grpc.max_receive_message_length", 4 << 20),
    # A second server on the same port fails, instead of taking half of the connections.
    ("grpc.so_reuseport", 0),
    # A client that vanished without closing is noticed, and its requests freed, within 40 s.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # Clients may keep idle connections alive through proxies that would cut them.
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
)

log = logging.getLogger(__name__)


class Server:
    """A server with its engine: ``start`` it and ``stop`` it once, or use it in ``async with``.

    It listens from the beginning, and answers UNAVAILABLE and NOT_SERVING until its model and the
    adapters in its directory are loaded. An adapter that is refused is reported and holds up
    nothing. If the engine's process dies, the server is good for nothing more: see ``failed``.

    Args:
        config: its settings.
        start_engine: another engine, for tests.
        clock: seconds that never go back; says when what has failed may be tried again.

    Attributes:
        port: of gRPC, once it listens.
        metrics_port: of ``/metrics``, or None.
        metrics: its series.
        refused: why adapters in its directory could not be loaded, by name.
        failed: set when the engine's process has died.
    """

    def __init__(
        self,
        config: ServerConfig,
        start_engine: Callable[[EngineConfig], Awaitable[AsyncEngine]] = AsyncEngine.start,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.port = 0
        self.metrics_port: int | None = None
        self.metrics = Metrics(
            vllm_names=config.vllm_metric_names, adapter_slots=config.engine.adapter_slots
        )
        self.refused: dict[str, LoraxError] = {}
        self.failed = asyncio.Event()
        self._config = config
        self._start_engine = start_engine
        self._clock = clock
        self._health = health.aio.HealthServicer()
        self._guard = Guard(self.metrics.error, config.replica_name or socket.gethostname())
        self._grpc = grpc.aio.server(options=_OPTIONS, interceptors=[self._guard])
        self._generation = GenerationServicer()
        self._adapters = AdapterServicer(config.manifest)
        self._ports = contextlib.AsyncExitStack()
        """What listens; closed before all else, which the calls need."""
        self._cleanup = contextlib.AsyncExitStack()
        self._engine: AsyncEngine
        self._generator: TextGenerator

    @property
    def info(self) -> ModelInfo:
        """The base model."""
        return self._engine.info

    @property
    def stats(self) -> EngineStats:
        """The engine's gauges."""
        return self._engine.stats

    @property
    def adapters(self) -> list[Adapter]:
        """The adapters in memory."""
        return self._adapters.registry.adapters()

    async def start(self) -> None:
        """Listen, start the engine, load the adapters, and let requests in.

        Raises:
            LoraxError: it cannot be started so; nothing is left running.
        """
        try:
            await self._listen()
            await self._load()
        except BaseException:
            await self._close()
            raise
        self._guard.open()
        self.metrics.serving(True)
        await self._report_health(health_pb2.HealthCheckResponse.SERVING)

    async def stop(self) -> None:
        """Refuse new requests, wait for those that run up to ``drain_seconds``, and as long as a
        proxy needs to notice (``linger_seconds``), then stop."""
        self.metrics.serving(False)
        closing = asyncio.create_task(asyncio.sleep(self._config.linger_seconds))
        await self._health.enter_graceful_shutdown()
        self._adapters.watchers.close()
        if not await self._generator.drain(self._config.drain_seconds):
            log.warning("requests still ran after %g s", self._config.drain_seconds)
            await self._grpc.stop(None)  # which cancels them
        await closing
        await self._close()

    async def __aenter__(self) -> Server:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.stop()

    async def _close(self) -> None:
        async with self._cleanup:
            await self._ports.aclose()

    async def _listen(self) -> None:
        host, port, metrics_port = self._config.host, self._config.port, self._config.metrics_port
        if metrics_port is not None:
            metrics_server = MetricsServer(self.metrics, host, metrics_port)
            self._ports.push_async_callback(metrics_server.stop)
            self.metrics_port = metrics_server.port
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(self._generation, self._grpc)
        adapter_pb2_grpc.add_AdapterServiceServicer_to_server(self._adapters, self._grpc)
        reflection.enable_server_reflection(
            (*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), self._grpc
        )
        await self._report_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            self.port = self._grpc.add_insecure_port(address)
        except RuntimeError as error:
            raise InvalidRequest(f"port: cannot listen on {address}: is it in use?") from error
        await self._grpc.start()
        self._ports.push_async_callback(self._grpc.stop, _LAST_WRITES_SECONDS)

    async def _load(self) -> None:
        root, written = self._config.adapters, self._config.manifest
        manifest = None if written is None else ManifestReader(written)
        library = self._open_library()
        # What was acknowledged is served without: it may be on a disk that is not mounted.
        kept = library is not None and await library.names()
        if manifest is not None and not kept:
            await manifest.read()
        if root is not None and not root.is_dir() and not kept:
            raise InvalidRequest(f"adapters: no such directory: {root}")
        self._engine = engine = await self._start_engine(self._config.engine)
        files = InPlace(root) if library is None else library
        failures = StartFailures()
        registry = AdapterRegistry(
            engine,
            files,
            (self.metrics, self._adapters.watchers, failures),
            history=self._config.adapter_history,
            on_demand=self._config.load_on_demand,
            clock=self._clock,
        )
        # The engine outlives the loads, and the library both.
        self._cleanup.push_async_callback(engine.close)
        self._cleanup.push_async_callback(registry.close)
        self._watch(engine)
        self.metrics.stats = engine.stats
        self.metrics.residency = _from_a_thread(registry.residency)
        engine.on_step = self.metrics.step
        tokenizer = await asyncio.to_thread(Tokenizer, engine.info.directory)
        self._generator = TextGenerator(engine, registry.admission, tokenizer, self.metrics)
        self._generation.generator = self._generator
        self._adapters.registry = registry
        if isinstance(files, InPlace):
            self._show_failures(failures.by_name)
            await _load_all(registry, await files.listing(), failures.by_name)
        elif manifest is not None:
            await self._follow(registry, files, manifest)
        else:
            await self._reconcile(registry, files)

    async def _reconcile(self, registry: AdapterRegistry, library: Library) -> None:
        """Serve what should be served, and go on seeing to that."""
        config = self._config
        reconciler = Reconciler(
            registry, library, from_source=not config.load_on_demand, clock=self._clock
        )
        self._show_failures(reconciler.failures)
        await reconciler.run_once()
        if config.watch_seconds:
            self._in_background(reconciler.run_for_ever(config.watch_seconds), "reconciler")

    async def _follow(
        self, registry: AdapterRegistry, library: Library, manifest: ManifestReader
    ) -> None:
        """Serve what a manifest says, and go on seeing to that."""
        config = self._config
        reconciler = ManifestReconciler(
            registry, library, manifest, config.adapters, clock=self._clock
        )
        self._cleanup.push_async_callback(reconciler.close)
        self._show_failures(reconciler.failures)
        self.metrics.watch_manifest(reconciler)
        await reconciler.run_once()
        if config.watch_seconds:
            self._in_background(reconciler.run_for_ever(config.watch_seconds), "manifest")

    def _show_failures(self, failures: dict[str, LoraxError]) -> None:
        """Show what becomes of them to all who ask."""
        self.refused = self._adapters.failures = self.metrics.failures = failures

    def _in_background(self, work: Coroutine[Any, Any, None], name: str) -> None:
        """Run ``work`` until the server stops."""
        task = asyncio.create_task(work, name=name)

        async def stop() -> None:
            task.cancel()
            await asyncio.wait([task])

        self._cleanup.push_async_callback(stop)

    def _open_library(self) -> Library | None:
        """What the state directory has, before the model is loaded for nothing."""
        config = self._config
        if config.state is None:
            return None
        place = config.source or (None if config.adapters is None else str(config.adapters))
        source = None if place is None else open_source(place)
        limits = FetchLimits(config.engine.max_adapter_bytes, config.fetch_seconds)
        library = Library(config.state, source, limits, config.adapter_history)
        self._cleanup.callback(library.close)
        return library

    def _watch(self, engine: AsyncEngine) -> None:
        async def watch() -> None:
            await engine.died.wait()
            self._guard.close("the engine has died; the server must be restarted")
            self.metrics.serving(False)
            self.failed.set()
            await self._health.enter_graceful_shutdown()

        self._in_background(watch(), "engine-watch")

    async def _report_health(self, status: int) -> None:
        for service in ("", *SERVICES):
            await self._health.set(service, status)


def _from_a_thread(ask: Callable[[], Coroutine[Any, Any, Residency]]) -> Callable[[], Residency]:
    """``ask`` for the thread that answers scrapes. A scrape waits for one step, not for a long one:
    then the answer is that of the last scrape."""
    loop, last = asyncio.get_running_loop(), Residency()

    def asked() -> Residency:
        nonlocal last
        work = ask()
        try:
            future = asyncio.run_coroutine_threadsafe(work, loop)
        except RuntimeError:  # the loop has ended
            work.close()
            return last
        try:
            last = future.result(_SCRAPE_SECONDS)
        except (TimeoutError, LoraxError):
            future.cancel()
        return last

    return asked


async def _load_all(
    registry: AdapterRegistry, names: Sequence[str], failures: dict[str, LoraxError]
) -> None:
    """Load the adapters of these names; tells ``failures`` of the refusals."""
    last_word = time.monotonic()
    for done, name in enumerate(names):
        if time.monotonic() - last_word > _PROGRESS_SECONDS:
            last_word = time.monotonic()
            log.info("%d of %d adapters loaded", done - len(failures), len(names))
        try:
            await registry.load(name)
        except LoraxError as error:
            failures[name] = error
            log.error("adapter %s refused: %s", name, error)
