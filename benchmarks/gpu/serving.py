"""The engine in this process, on the runner that the other parts use: requests in, times out."""

from __future__ import annotations

import itertools
import queue
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.gpu.bench import Bench
from lorax_serve.core import AdapterInfo, AdapterTier, EngineStats, SamplingParams, StopReason
from lorax_serve.engine.adapter_loader import AdapterLoader, Load, LoadFinished
from lorax_serve.engine.engine import Engine
from lorax_serve.engine.messages import FindAdapters, LoadAdapter, Submit
from lorax_serve.model.runner import HostAdapter

__all__ = ["LocalEngine"]

_PATIENCE_SECONDS = 60.0


class LocalEngine:
    """An engine and its loading thread, stepped as ``engine.process`` steps them.

    Attributes:
        times: ``time.perf_counter`` of each token, by request.
        sent: when each request came.
        stats: after the last step.
    """

    def __init__(self, bench: Bench, **settings: Any) -> None:
        # As in the engine's own process: the loading thread must not hold up the steps.
        sys.setswitchinterval(0.0001)
        runner = bench.runner
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        loader = AdapterLoader(
            runner.modules,
            runner.fold,
            runner.without_copies,
            self._inbox.put,
            probe="off",
            fingerprint=runner.fingerprint,
        )
        self._engine = Engine(replace(bench.config, **settings), runner, loader)
        self._ids = itertools.count(1)
        self._open: set[int] = set()
        self._replies: dict[int, Any] = {}
        self.times: dict[int, list[float]] = {}
        self.sent: dict[int, float] = {}
        self.stats = EngineStats()

    def add(self, weights: HostAdapter) -> int:
        """Make an adapter known as if it had been read; it is in host memory. Returns its
        version. Several may share their weights: to the engine they are different adapters."""
        version = next(self._ids)
        info = AdapterInfo(f"random-{version}", 0, 0, weights.nbytes)
        self._engine.handle(LoadFinished(Load(version, "", call_id=version), info, weights))
        self.pump()
        return version

    def read(self, directory: Path) -> int:
        """Have an adapter read in the background; ``is_known`` says when that is done."""
        version = next(self._ids)
        self._engine.handle(LoadAdapter(version, version, str(directory)))
        return version

    def is_known(self, version: int) -> bool:
        """Whether a ``read`` has ended."""
        return version in self._replies

    def tier(self, version: int) -> AdapterTier:
        """Where an adapter is."""
        call = next(self._ids)
        self._engine.handle(FindAdapters(call))
        self.until(lambda: call in self._replies)
        found: AdapterTier = self._replies[call][version]
        return found

    def submit(self, prompt: Sequence[int], new_tokens: int, adapter: int | None = None) -> int:
        """Start a request, greedy and without an end; returns its id."""
        request = next(self._ids)
        self._open.add(request)
        self.times[request] = []
        self.sent[request] = time.perf_counter()
        self._engine.handle(
            Submit(request, tuple(prompt), adapter, SamplingParams(), new_tokens, 0, frozenset())
        )
        return request

    def pump(self) -> None:
        """Take what has been read, and do one step if there is one to do."""
        while not self._inbox.empty():
            self._engine.handle(self._inbox.get())
        if self._engine.busy:
            self._engine.step()
        report = self._engine.take_report()
        now = time.perf_counter()
        self.stats = report.stats
        for token in report.tokens:
            if token.token_id is None:
                raise RuntimeError(token.error)
            self.times[token.request_id].append(now)
            if token.stop_reason is not StopReason.NOT_FINISHED:
                self._open.discard(token.request_id)
        for reply in report.replies:
            if reply.error is not None:
                raise reply.error
            self._replies[reply.call_id] = reply.value

    def until(self, done: Callable[[], bool]) -> None:
        """Go on until something is the case.

        Raises:
            RuntimeError: nothing happens any more.
        """
        while True:
            self.pump()
            if done():
                return
            if not self._engine.busy:  # what it needs is being read
                try:
                    self._engine.handle(self._inbox.get(timeout=_PATIENCE_SECONDS))
                except queue.Empty:
                    raise RuntimeError("the engine waits for what does not come") from None

    def finish(self) -> None:
        """Go on until every request has ended."""
        self.until(lambda: not self._open)

    def ttft(self, request: int) -> float:
        """Seconds to the first token."""
        return self.times[request][0] - self.sent[request]
