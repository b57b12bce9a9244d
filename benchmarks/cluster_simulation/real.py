"""Real replicas: the server's engine in a process each, and a gateway that drives them.

A process has the model, the loading thread and the step loop of ``engine.process``, and keeps what
each step and load took. gRPC is left out: the gateway here hands requests over by pipes.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import queue
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.cluster_simulation.costs import Loaded, Step
from benchmarks.cluster_simulation.replica import Job
from benchmarks.cluster_simulation.routing import Router
from lorax_serve.config import EngineConfig

__all__ = ["RealReplicas", "Work"]

_FIRST_TOKEN = 20


class Work(NamedTuple):
    """What the replicas did in a run."""

    steps: list[Step]
    loads: list[Loaded]
    wakes: list[float]


class RealReplicas:
    """Some engines with the same adapters, known by their numbers.

    Args:
        config: of each.
        adapters: directories by number.
        count: of replicas.
    """

    def __init__(self, config: EngineConfig, adapters: Mapping[int, Path], count: int) -> None:
        # Read by the OpenMP runtime when torch is loaded, as in the server's engine.
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
        context = multiprocessing.get_context("spawn")
        self._links: list[Connection] = []
        self._processes = []
        paths = {number: str(path) for number, path in adapters.items()}
        for _ in range(count):
            here, there = context.Pipe()
            process = context.Process(target=_main, args=(there, config, paths), daemon=True)
            process.start()
            there.close()
            self._links.append(here)
            self._processes.append(process)
        ready = [link.recv() for link in self._links]
        self.vocab_size, self.adapter_bytes = ready[0]

    def reset(self) -> None:
        """Forget all adapters and load them again in their order."""
        for link in self._links:
            link.send("reset")
        for link in self._links:
            link.recv()

    def run(self, router: Router, jobs: Sequence[Job], seed: int) -> Work:
        """Send each job when it arrives; fills in what became of it.

        A job's ``arrival`` is set to when its replica had it: how late this process was to send it
        on a busy machine is no part of what is measured.

        Args:
            router: knows no replicas yet.
            jobs: by arrival.
            seed: of the prompts.
        """
        for number in range(len(self._links)):
            router.join(number)
        by_link = {id(link): number for number, link in enumerate(self._links)}
        coming = iter(jobs)
        job, open_jobs = next(coming, None), {each.number: each for each in jobs}
        started = time.perf_counter() + 0.1
        while open_jobs:
            left = None if job is None else job.arrival - (time.perf_counter() - started)
            if job is not None and left is not None and left <= 0:
                job.replica = router.choose(job.adapter)
                router.sent(job.replica)
                self._links[job.replica].send((job.number, job.adapter, *_shape(job), seed))
                job = next(coming, None)
                continue
            for link in wait(self._links, left):
                assert isinstance(link, Connection)
                number, tier, came, first, end = link.recv()
                done = open_jobs.pop(number)
                router.ended(by_link[id(link)])
                done.arrival, done.first, done.end = came - started, first - started, end - started
                done.tier = tier
                done.fate = "done"
        found = Work([], [], [])
        for link in self._links:
            link.send("collect")
            steps, loads, wakes = link.recv()
            steps = [step._replace(at=step.at - started) for step in steps]
            loads = [load._replace(at=load.at - started) for load in loads]
            found = Work(found.steps + steps, found.loads + loads, found.wakes + wakes)
        return found

    def close(self) -> None:
        """End the processes."""
        for link, process in zip(self._links, self._processes, strict=True):
            link.send("stop")
            process.join()


def _shape(job: Job) -> tuple[int, int]:
    return job.prompt_tokens, job.new_tokens


def _main(link: Connection, config: EngineConfig, adapters: dict[int, str]) -> None:
    sys.setswitchinterval(0.0001)  # as engine.process
    import torch

    torch.set_num_threads(config.threads or len(os.sched_getaffinity(0)))
    server = _Server(config, adapters, link)
    server.reset()
    server.loop()


class _Server:
    """The loop of ``engine.process``, with a record of what it does."""

    def __init__(self, config: EngineConfig, adapters: dict[int, str], link: Connection) -> None:
        from lorax_serve.core import Batch
        from lorax_serve.engine.adapter_loader import AdapterLoader, LoadFinished
        from lorax_serve.engine.engine import Engine
        from lorax_serve.model.runner import Launched, ModelRunner

        server = self
        self._batches: list[Batch] = []

        class Recording(ModelRunner):
            def launch(self, batch: Batch) -> Launched:
                server._batches.append(batch)
                return super().launch(batch)

        self._link, self._adapters = link, adapters
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._loads: list[tuple[float, float]] = []
        self._steps: list[Step] = []
        self._calls = itertools.count(1)
        self._wakes: list[float] = []
        self._ended = 0.0
        self._running: dict[int, list[Any]] = {}
        runner = Recording(config)
        runner.warm_up()
        self._vocab_size = runner.info.vocab_size

        def finished(loaded: LoadFinished) -> None:
            now = time.perf_counter()
            self._loads.append((now - loaded.seconds, now))
            self._inbox.put(loaded)

        loader = AdapterLoader(
            runner.modules,
            runner.fold,
            runner.without_copies,
            finished,
            probe=config.probe,
            fingerprint=runner.fingerprint,
        )
        self._engine = Engine(config, runner, loader)
        self._nbytes = 0

    def reset(self) -> None:
        """Drop and load all adapters."""
        from lorax_serve.engine.messages import DropAdapter, LoadAdapter

        first = not self._nbytes
        for version, path in self._adapters.items():
            if not first:
                self._engine.handle(DropAdapter(next(self._calls), version))
            self._engine.handle(LoadAdapter(next(self._calls), version, path))
            self._engine.handle(self._inbox.get())
            for reply in self._engine.take_report().replies:
                if reply.error is not None:
                    raise reply.error
                self._nbytes = getattr(reply.value, "nbytes", self._nbytes)
        self._forget()
        self._link.send((self._vocab_size, self._nbytes) if first else None)

    def loop(self) -> None:
        """Serve until told to stop."""
        threading.Thread(target=self._receive, daemon=True).start()
        engine = self._engine
        while True:
            busy = engine.busy
            # What comes between two steps is a part of the second.
            started = self._ended if busy else 0.0
            messages = [] if busy else [self._inbox.get()]
            if not busy:
                started = time.perf_counter()
                if isinstance(messages[0], tuple):
                    self._wakes.append(started - messages[0][-1])
            while not self._inbox.empty():
                messages.append(self._inbox.get())
            for message in messages:
                if message == "stop":
                    return
                if message == "reset":
                    self.reset()
                elif message == "collect":
                    self._link.send(self._collect())
                    self._forget()
                elif isinstance(message, tuple):
                    self._submit(*message)
                else:
                    engine.handle(message)
            if engine.busy:
                self._step(started)

    def _receive(self) -> None:
        # While a reset waits for loads, nothing else comes: the gateway waits for its answer.
        message: Any = None
        while message != "stop":
            try:
                message = self._link.recv()
            except EOFError:  # the gateway has gone
                message = "stop"
            if isinstance(message, tuple):
                message = (*message, time.perf_counter())
            self._inbox.put(message)

    def _submit(
        self, number: int, adapter: int, prompt: int, new: int, seed: int, came: float
    ) -> None:
        import random

        from lorax_serve.core import SamplingParams
        from lorax_serve.engine.messages import FindAdapters, Submit

        engine = self._engine
        engine.handle(FindAdapters(next(self._calls)))
        found = engine.take_report()
        self._take(found.tokens, time.perf_counter())
        tier = found.replies[-1].value[adapter].value  # type: ignore[index, union-attr]
        self._running[number] = [tier, came, None]
        rng = random.Random(f"{seed} {number}")
        tokens = tuple(rng.randrange(_FIRST_TOKEN, self._vocab_size) for _ in range(prompt))
        sampling = SamplingParams(temperature=0.0)
        engine.handle(Submit(number, tokens, adapter, sampling, new, 0, frozenset()))

    def _step(self, started: float) -> None:
        self._engine.step()
        report = self._engine.take_report()
        now = self._ended = time.perf_counter()
        self._take(report.tokens, now)
        for batch in self._batches:
            prompt_tokens = sum(length for _, length in batch.prefills)
            # A sequence that has ended in this step holds no slot any more, but its adapter.
            adapters = len({s.adapter for s in batch.sequences} - {None})
            puts = len(batch.loads)
            took = now - started
            step = Step(len(batch.decodes), prompt_tokens, adapters, puts, 0.0, took, started)
            self._steps.append(step)
        self._batches.clear()

    def _take(self, tokens: Sequence[Any], now: float) -> None:
        from lorax_serve.core import StopReason

        for token in tokens:
            if token.token_id is None:
                raise RuntimeError(token.error)
            seen = self._running[token.request_id]
            seen[2] = seen[2] or now
            if token.stop_reason is not StopReason.NOT_FINISHED:
                self._link.send((token.request_id, *seen, now))
                del self._running[token.request_id]

    def _collect(self) -> tuple[list[Step], list[Loaded], list[float]]:
        steps = []
        for step in self._steps:
            start, end = step.at, step.at + step.seconds
            beside = sum(max(0.0, min(end, b) - max(start, a)) for a, b in self._loads)
            steps.append(step._replace(beside_load=beside))
        return steps, [Loaded(b - a, a) for a, b in self._loads], list(self._wakes)

    def _forget(self) -> None:
        self._steps.clear()
        self._loads.clear()
        self._wakes.clear()
