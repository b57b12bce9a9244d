"""One simulated replica: the engine's own decisions, with a model of time in place of arithmetic.

``Scheduler``, ``AdapterStore`` (with ``HostCache`` and ``AdapterSlots``) and ``PrefillBudget`` are
those of the server. What is simulated is the step, whose seconds come from ``Costs``, the loading
thread, which reads one adapter after the other, and fetching from a source.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

from benchmarks.cluster_simulation.costs import STEADY, Costs, Pace
from lorax_serve.core import AdapterInfo, AdapterTier, Batch, SamplingParams, Sequence
from lorax_serve.engine.adapter_loader import Load, LoadFinished
from lorax_serve.engine.adapter_slots import AdapterSlots
from lorax_serve.engine.adapter_store import AdapterStore
from lorax_serve.engine.fair_queue import TOKEN_COST
from lorax_serve.engine.host_cache import HostCache
from lorax_serve.engine.kv_rows import KVRows, blocks_of
from lorax_serve.engine.prefill_budget import PrefillBudget
from lorax_serve.engine.scheduler import Scheduler

__all__ = ["SOURCE", "Job", "Limits", "Replica"]

SOURCE = "source"
"""Where an adapter is that a replica has never fetched."""

_OVERTAKERS = 4
"""Loads for waiting requests that may pass one for the first time (``AdapterLoader``)."""
_MOST_FETCHES = 16
"""Fetches at once (``registry.library``)."""
_RETRY_SECONDS = 0.001
_SAMPLING = SamplingParams()
_WEIGHTS = cast(Any, object())


@dataclass(frozen=True, slots=True)
class Limits:
    """The settings of a replica, named as those of ``EngineConfig``.

    Attributes:
        adapter_bytes: of each adapter.
        shared: slots hold the host's own tensors (on a CPU).
        max_length: most tokens of a request.
        fetch_seconds: of one adapter from its source, if it is not on disk.
    """

    adapter_bytes: int
    max_adapter_bytes: int
    adapter_slots: int = 64
    max_batch_size: int = 32
    max_batch_tokens: int = 256
    max_prefill_slowdown: float = 2.0
    adapter_quantum: int = 2048
    max_waiting: int = 1024
    shared: bool = True
    max_length: int = 4096
    fetch_seconds: float = 0.0


@dataclass(slots=True, eq=False)
class Job:
    """A request, and what became of it. Times are seconds; -1: not yet."""

    number: int
    arrival: float
    adapter: int
    prompt_tokens: int
    new_tokens: int
    replica: int = -1
    tier: str = ""
    first: float = -1.0
    end: float = -1.0
    retries: int = 0
    fate: str = ""
    """done, refused (overload), or failed (its replica died after the first token)."""

    @property
    def ttft(self) -> float:
        """Seconds to the first token."""
        return self.first - self.arrival


class _Rows(KVRows):
    """Those of the engine, but each takes memory for the longest request at once: preemption is
    not simulated, so no step need ask whether there is more."""

    def __init__(self, rows: int, max_length: int) -> None:
        self._longest = blocks_of(max_length)
        super().__init__(rows, rows * (self._longest + 1), prefix_caching=False)

    def take(self, sequence: Sequence) -> None:
        """See ``KVRows``."""
        super().take(sequence)
        self._resize(sequence.kv_slot, self._longest)


class _Host(HostCache):
    """The engine's, which can also be told of what is on disk."""

    def know(self, version: int, nbytes: int) -> None:
        """A version is on disk only."""
        self._bytes_of[version] = nbytes


class _Store(AdapterStore):
    """The engine's, which can also be told of what is on disk."""

    def know(self, loaded: LoadFinished) -> None:
        """An adapter is on disk only."""
        assert loaded.info is not None
        self._known[loaded.load.version] = loaded.info, loaded.load


class _Scheduler(Scheduler):
    """The engine's decisions, without its work for what is not simulated: prefixes, preemption, and
    steps that begin before the last one ends. It can also pass over steps that are all the same."""

    def schedule(self) -> Batch:
        """See ``Scheduler``."""
        batch = Batch()
        barred = self._take_turns(batch)
        prompts = []
        for sequence in self._running.values():
            if self._parked and self._is_parked(sequence):
                continue
            if sequence.computed + 1 == len(sequence.tokens):
                batch.decodes.append(sequence)
                if sequence.computed >= sequence.charged:
                    self._queue.flow(sequence).charge(TOKEN_COST)
                    sequence.charged = sequence.computed + 1
            else:
                prompts.append(sequence)
        if prompts or self._queue:
            places = self._max_batch_size - len(self._running)
            self._share_prompt_budget(batch, prompts, places, barred)
        batch.copies = self._rows.take_copies()
        return batch

    def skip(self, decodes: list[Sequence], steps: int) -> None:
        """Do what ``steps`` calls of ``schedule`` would, and their steps."""
        for sequence in decodes:
            sequence.computed += steps
            sequence.tokens += [1] * steps
            self._queue.flow(sequence).charge(steps * TOKEN_COST)
            sequence.charged = sequence.computed


@dataclass(slots=True)
class _Flight:
    """A step, or ``steps`` that are the same, from ``start``; each takes ``each`` seconds."""

    batch: Batch
    prompt_tokens: int
    start: float
    each: float
    steps: int

    @property
    def end(self) -> float:
        return self.start + self.steps * self.each


@dataclass(slots=True)
class _Loading:
    """The loading thread's queue, in the order of ``AdapterLoader``."""

    queue: list[tuple[int, bool, int]] = field(default_factory=list)
    order: Any = field(default_factory=itertools.count)
    now: tuple[bool, int] | None = None
    until: float = 0.0


class Replica:
    """A server.

    Args:
        limits: its settings.
        costs: what its work takes.
        rng: for noise.
        at: ``at(seconds, call)`` has ``call(seconds)`` called then; no more after ``die``.
        over: called with each job whose ``fate`` is known.
        jump: pass over steps that are all the same at once; the same results but for noise.
        exact: schedule with the engine's ``Scheduler`` itself, to compare; implies no ``jump``.
        pace: the machine's.

    Attributes:
        busy_seconds: that steps took.
        fetched, read, put: adapters from the source, from disk to host memory, and into slots.
    """

    def __init__(
        self,
        limits: Limits,
        costs: Costs,
        rng: random.Random,
        at: Callable[[float, Callable[[float], None]], None],
        over: Callable[[Job, float], None],
        *,
        jump: bool = True,
        exact: bool = False,
        pace: Pace = STEADY,
    ) -> None:
        self._pace = pace
        self._limits, self._costs, self._rng = limits, costs, rng
        self._at, self._over, self._jump = at, over, jump and not exact
        self._host = host = _Host(limits.max_adapter_bytes)
        self._slots = slots = AdapterSlots(limits.adapter_slots, None, host.use)
        self._store = _Store(self._read, host, slots, lambda slot: None, shared=limits.shared)
        self._on_disk = bytearray()
        self._budget = PrefillBudget(limits.max_prefill_slowdown)
        scheduler = Scheduler if exact else _Scheduler
        self._scheduler = scheduler(
            limits.max_batch_size,
            limits.max_batch_tokens,
            slots,
            _Rows(limits.max_batch_size, limits.max_length),
            prompt_tokens_beside=self._budget.tokens,
            adapter_quantum=limits.adapter_quantum,
        )
        self._info = AdapterInfo("", 0, 0, limits.adapter_bytes)
        self._jobs: dict[int, Job] = {}
        self._awaited: dict[int, list[Job]] = {}
        """Jobs whose adapter is being fetched, or loaded for the first time."""
        self._lanes = [0.0] * _MOST_FETCHES
        self._loading = _Loading()
        self._inbox: list[Callable[[], None]] = []
        self._flight: _Flight | None = None
        self._dead = False
        self._now = 0.0
        self.busy_seconds = 0.0
        self.fetched = self.read = self.put = 0

    @property
    def store(self) -> AdapterStore:
        """Where its adapters are."""
        return self._store

    def problems(self) -> list[str]:
        """What is wrong in the engine's accounting; empty when all is well."""
        return self._scheduler.problems() + self._store.problems()

    @property
    def jobs(self) -> list[Job]:
        """Those that it has not ended."""
        return [*self._jobs.values(), *itertools.chain(*self._awaited.values())]

    def know(self, adapter: int) -> None:
        """Load an adapter before the start, at no time."""
        self._store.add(self._finished(adapter))

    def warm(self, recent: list[int], adapters: int) -> None:
        """Place adapters as requests for them would have, before the start and at no time.

        Args:
            recent: what is on disk, the last that was asked for first. As many as fit are in
                memory, and the first of these in slots.
            adapters: how many there are; they are numbered from 0.
        """
        limits = self._limits
        for adapter in reversed(recent[: limits.max_adapter_bytes // limits.adapter_bytes]):
            self.know(adapter)
        for adapter in reversed(recent[: limits.adapter_slots]):
            if adapter in self._host:
                self._slots.pin(adapter)
                self._slots.unpin(adapter)
        # There may be many, and few of them are asked for: the store is told of these then.
        self._on_disk = bytearray(adapters)
        for adapter in recent:
            self._on_disk[adapter] = adapter not in self._store

    @property
    def disk(self) -> int:
        """Adapters that it has on disk."""
        return self._host.known + self._on_disk.count(1)

    def submit(self, job: Job, now: float) -> None:
        """Take a request."""
        waiting = self._scheduler.waiting + sum(map(len, self._awaited.values()))
        if waiting >= self._limits.max_waiting:
            job.fate = "refused"
            self._over(job, now)
        elif self._has(job.adapter):
            self._deliver(lambda: self._enqueue(job), now)
        else:
            job.tier = SOURCE
            jobs = self._awaited.setdefault(job.adapter, [])
            jobs.append(job)
            if len(jobs) == 1:
                self._fetch(job.adapter, now)

    def _has(self, adapter: int) -> bool:
        if adapter in self._store:
            return True
        if adapter >= len(self._on_disk) or not self._on_disk[adapter]:
            return False
        self._on_disk[adapter] = 0
        self._host.know(adapter, self._limits.adapter_bytes)
        self._store.know(self._finished(adapter))
        return True

    def die(self) -> list[Job]:
        """Stop at once; returns the jobs that it had."""
        self._dead = True
        lost = self.jobs
        self._jobs, self._awaited = {}, {}
        return lost

    def _fetch(self, adapter: int, now: float) -> None:
        begin = max(now, heapq.heappop(self._lanes))
        end = begin + self._limits.fetch_seconds
        heapq.heappush(self._lanes, end)

        def arrived(now: float) -> None:
            self.fetched += 1
            self._load(adapter, now, first=True)

        self._later(end, arrived)

    def _read(self, load: Load) -> None:
        """What ``AdapterStore`` calls for an adapter that is on disk."""
        self._load(load.version, self._now, first=False)

    def _load(self, adapter: int, now: float, *, first: bool) -> None:
        loading = self._loading
        place = next(loading.order) + (_OVERTAKERS if first else 0)
        heapq.heappush(loading.queue, (place, first, adapter))
        if loading.now is None:
            self._next_load(now)

    def _next_load(self, now: float) -> None:
        loading = self._loading
        if not loading.queue:
            loading.now = None
            return
        _, first, adapter = heapq.heappop(loading.queue)
        seconds = self._costs.load(self._rng) * self._pace.at(now)
        loading.now, loading.until = (first, adapter), now + seconds

        def done(now: float) -> None:
            self.read += 1
            self._next_load(now)
            self._deliver(lambda: self._loaded(adapter, first=first), now)

        self._later(loading.until, done)

    def _loaded(self, adapter: int, *, first: bool) -> None:
        if not first:
            self._store.arrived(self._finished(adapter))
            return
        self._store.add(self._finished(adapter))
        for job in self._awaited.pop(adapter):
            self._enqueue(job)

    def _finished(self, adapter: int) -> LoadFinished:
        return LoadFinished(Load(adapter, ""), self._info, _WEIGHTS)

    def _enqueue(self, job: Job) -> None:
        job.tier = job.tier or self._tier(job.adapter).value
        self._jobs[job.number] = job
        self._scheduler.add(
            Sequence(
                request_id=job.number,
                tokens=[1] * job.prompt_tokens,
                prompt_length=job.prompt_tokens,
                adapter=job.adapter,
                sampling=_SAMPLING,
                max_new_tokens=job.new_tokens,
                min_new_tokens=0,
                eos_token_ids=frozenset(),
                end=job.prompt_tokens + job.new_tokens,
                arrived=job.arrival,
            )
        )
        self._store.want(job.adapter)

    def _tier(self, adapter: int) -> AdapterTier:
        if adapter in self._slots:
            return AdapterTier.DEVICE
        return AdapterTier.HOST if adapter in self._host else AdapterTier.DISK

    def _deliver(self, message: Callable[[], None], now: float) -> None:
        """The engine takes messages between steps."""
        self._inbox.append(message)
        flight = self._flight
        if flight is None:
            if len(self._inbox) == 1:
                self._later(now + self._costs.wake(self._rng), self._wake)
        elif flight.steps > 1:
            begun = int((now - flight.start) / flight.each) + 1
            if begun < flight.steps:
                flight.steps = begun
                self._later(flight.end, lambda now: self._land(flight, now))

    def _wake(self, now: float) -> None:
        if self._flight is None:
            self._run(now)

    def _run(self, now: float) -> None:
        """Take the messages, and begin the next step if there is one."""
        self._now = now
        for message in self._inbox:
            message()
        self._inbox.clear()
        scheduler, store = self._scheduler, self._store
        if not (scheduler.running or scheduler.waiting):
            return
        batch = scheduler.schedule()
        store.free_emptied_slots()
        self.put += len(batch.loads)
        store.read_ahead(scheduler.waiting_adapters)
        if not batch:
            if not store.reading:  # the engine would try again at once
                self._later(now + _RETRY_SECONDS, self._wake)
            return
        self._flight = flight = self._begin(batch, now)
        self._later(flight.end, lambda now: self._land(flight, now))

    def _begin(self, batch: Batch, now: float) -> _Flight:
        scheduler, costs = self._scheduler, self._costs
        prompt_tokens = sum(length for _, length in batch.prefills)
        decodes = batch.decodes
        adapters = {sequence.adapter for sequence in decodes}
        adapters.update(sequence.adapter for sequence, _ in batch.prefills)
        seconds = costs.seconds(len(decodes), prompt_tokens, len(adapters), len(batch.loads))
        steps = 1
        calm = self._jump and not (batch.loads or batch.prefills or scheduler.waiting)
        everybody = calm and len(decodes) == scheduler.running
        # With a single token of its prompt left one decodes too, but its next token is its first.
        if everybody and all(len(each.tokens) > each.prompt_length for each in decodes):
            steps = min([each.end - len(each.tokens) for each in decodes])
        seconds *= costs.factor(self._rng, steps, prompts=prompt_tokens > 0) * self._pace.at(now)
        if self._loading.now is not None:
            beside = min(seconds * steps, self._loading.until - now)
            seconds += costs.beside_load * beside / steps
        return _Flight(batch, prompt_tokens, now, seconds, steps)

    def _land(self, flight: _Flight, now: float) -> None:
        """Take in the results of a step."""
        if flight is not self._flight or now < flight.end:  # it was cut short
            return
        batch, scheduler = flight.batch, self._scheduler
        self._flight = None
        self.busy_seconds += now - flight.start
        if flight.steps > 1:
            assert isinstance(scheduler, _Scheduler)
            scheduler.skip(batch.decodes, flight.steps - 1)
        for sequence in batch.decodes:
            sequence.computed += 1
            self._append(sequence, now)
        for sequence, length in batch.prefills:
            sequence.computed += length
            if sequence.computed == len(sequence.tokens):
                self._append(sequence, now)
        for _ in range(min(flight.steps, 20)):  # after that, nothing new is learned
            self._budget.observe(len(batch.decodes), flight.prompt_tokens, flight.each)
        self._run(now)

    def _append(self, sequence: Sequence, now: float) -> None:
        """A sequence has got a token."""
        tokens = sequence.tokens
        tokens.append(1)
        if len(tokens) == sequence.prompt_length + 1:
            self._jobs[sequence.request_id].first = now
        if len(tokens) == sequence.end:
            self._scheduler.finish(sequence)
            job = self._jobs.pop(sequence.request_id)
            job.end, job.fate = now, "done"
            self._over(job, now)

    def _later(self, when: float, call: Callable[[float], object]) -> None:
        def unless_dead(now: float) -> None:
            if not self._dead:
                call(now)

        self._at(when, unless_dead)
