"""The engine: commands in, one step at a time, reports out. One thread owns it and the device."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace

from lorax_serve.config import EngineConfig
from lorax_serve.core import (
    PENDING,
    Batch,
    CacheKey,
    EngineStats,
    Sequence,
    StopReason,
    TokenOutput,
)
from lorax_serve.engine.adapter_loader import AdapterLoader, Load, LoadFinished
from lorax_serve.engine.adapter_slots import AdapterSlots
from lorax_serve.engine.adapter_store import AdapterStore
from lorax_serve.engine.host_cache import HostCache
from lorax_serve.engine.kv_rows import BLOCK, KVRows, blocks_of
from lorax_serve.engine.messages import (
    Abort,
    CheckIntegrity,
    Command,
    DropAdapter,
    FindAdapters,
    FindWork,
    InspectAdapter,
    LoadAdapter,
    PinAdapter,
    Reply,
    StepReport,
    Submit,
    UnpinAdapter,
)
from lorax_serve.engine.prefill_budget import PrefillBudget
from lorax_serve.engine.probing import Prober
from lorax_serve.engine.scheduler import Scheduler
from lorax_serve.errors import AdapterRejected, EngineFailed, LoraxError
from lorax_serve.model.runner import Launched, ModelRunner
from lorax_serve.model.sampling.sampler import Sample

__all__ = ["Engine"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Flight:
    """A step that the device computes.

    Attributes:
        places: where in its tokens each of ``launched.sequences`` has ``PENDING`` for the step's
            sample.
    """

    batch: Batch
    launched: Launched
    places: list[int]
    started: float


class Engine:
    """Continuous batching of one model with many adapters.

    Where the device works by itself, a step is launched before the last one's tokens are known:
    they stay on the device, where the next step takes them from, and what is to be done with them
    here is done while it runs. A sequence that turns out to have ended was computed once too often;
    that result is dropped.

    Args:
        config: sizes and limits.
        runner: the model.
        loader: reads adapters in the background; its results come back through ``handle``.
    """

    def __init__(self, config: EngineConfig, runner: ModelRunner, loader: AdapterLoader) -> None:
        self._runner = runner
        self._loader = loader
        self._prober = Prober(runner, config.probe)
        host = HostCache(config.max_adapter_bytes)
        slots = AdapterSlots(config.adapter_slots, runner.device_adapter_bytes, host.use)
        shared = not runner.slots_copy
        self._store = AdapterStore(loader.request, host, slots, runner.clear_adapter, shared=shared)
        blocks = blocks_of(runner.kv_tokens)
        self._rows = KVRows(runner.kv_rows, blocks, prefix_caching=config.prefix_caching)
        self._prefill_budget = PrefillBudget(config.max_prefill_slowdown)
        self._scheduler = Scheduler(
            *runner.batch_limits,
            slots,
            self._rows,
            prompt_tokens_beside=self._prefill_budget.tokens,
            adapter_quantum=config.adapter_quantum,
        )
        self._kv_capacity = blocks * BLOCK
        self._stalled = False
        self._report = StepReport()
        self._last_batch = Batch()
        self._step_seconds = 0.0
        self._flight: _Flight | None = None
        self._landed = 0.0

    @property
    def busy(self) -> bool:
        """Whether there is a step to do, before another message has come."""
        scheduler = self._scheduler
        work = bool(scheduler.running or scheduler.waiting) and not self._stalled
        return work or self._flight is not None

    def handle(
        self,
        message: Command | LoadFinished,
    ) -> None:
        """Take one command or one finished load; answers go into the next report."""
        self._stalled = False
        match message:
            case Submit():
                self._submit(message)
                if message.adapter is not None:
                    self._store.want(message.adapter)
            case Abort(request_id):
                self._abort(request_id)
            case LoadAdapter(call_id, version, path, parts):
                self._loader.request(Load(version, path, call_id, parts=parts))
            case InspectAdapter(call_id, path):
                self._loader.request(Load(0, path, call_id, dry=True))
            case LoadFinished():
                self._keep(message)
            case DropAdapter(call_id, version):
                self._drop(call_id, version)
            case PinAdapter(call_id, version, instead_of):
                self._pin(call_id, version, instead_of)
            case UnpinAdapter(call_id, version):
                self._store.unpin(version)
                self._reply(Reply(call_id))
            case FindAdapters(call_id):
                self._reply(Reply(call_id, self._store.tiers()))
            case FindWork(call_id):
                self._reply(Reply(call_id, self._scheduler.work()))
            case CheckIntegrity(call_id):
                self._reply(Reply(call_id, self.check_integrity()))

    def step(self) -> None:
        """Launch a step for everything that runs, and take in the results of the one before; of
        this one, if the device cannot work by itself."""
        if not self._scheduler.may_run_ahead:
            self._land()
        started = time.perf_counter()
        self._last_batch = batch = self._scheduler.schedule()
        self._bring_in_adapters(batch)
        for sequence, _ in batch.prefills:
            if sequence.queue_seconds is None:
                sequence.queue_seconds = started - sequence.arrived
        flight = self._launch(batch, started) if batch or batch.copies else None
        self._land()
        self._flight = flight
        if not self._runner.runs_ahead:
            self._land()

    def _launch(self, batch: Batch, started: float) -> _Flight | None:
        try:
            launched = self._runner.launch(batch)
        except Exception as error:  # out of memory, say: these requests fail, the engine goes on
            self._step_failed(batch, error)
            return None
        for sequence, length in batch.prefills:
            sequence.computed += length
        for sequence in batch.decodes:
            sequence.computed += 1
        places = [len(sequence.tokens) for sequence in launched.sequences]
        for sequence in launched.sequences:
            sequence.tokens.append(PENDING)
        return _Flight(batch, launched, places, started)

    def _land(self) -> None:
        """Take in the results of the step that was launched last, if they were not yet."""
        flight, self._flight = self._flight, None
        if flight is None:
            return
        launched = flight.launched
        try:
            samples = launched.samples()
        except Exception as error:
            self._step_failed(flight.batch, error)
            return
        for sequence, place, sample in zip(launched.sequences, flight.places, samples, strict=True):
            # Others have ended since the launch.
            if self._scheduler.find(sequence.request_id) is sequence:
                self._advance(sequence, place, sample)
        # While steps overlap, one takes from the last one's end to its own.
        now = time.perf_counter()
        self._step_seconds = now - max(flight.started, self._landed)
        self._landed = now
        batch = flight.batch
        prompt_tokens = sum(length for _, length in batch.prefills)
        self._prefill_budget.observe(len(batch.decodes), prompt_tokens, self._step_seconds)

    def _step_failed(self, batch: Batch, error: Exception) -> None:
        log.exception("a step failed", exc_info=error)
        here = [s for s in batch.sequences if self._scheduler.find(s.request_id) is s]
        self._fail(here, f"the step failed: {type(error).__name__}: {error}")
        self._rows.forget()  # what was copied for the step may be half there

    def take_report(self) -> StepReport:
        """What happened since the last report."""
        report, self._report = self._report, StepReport()
        batch, self._last_batch = self._last_batch, Batch()
        report.stats = EngineStats(
            waiting=self._scheduler.waiting,
            running=self._scheduler.running,
            batch_size=len(batch.sequences),
            batch_tokens=len(batch.decodes) + sum(length for _, length in batch.prefills),
            kv_tokens=self._scheduler.kv_tokens,
            kv_cached_tokens=self._rows.cached_tokens,
            kv_capacity=self._kv_capacity,
            prefix_cache_queries=self._rows.queries,
            prefix_cache_hits=self._rows.hits,
            preemptions=self._scheduler.preemptions,
            adapters=self._store.stats,
            step_seconds=self._step_seconds if batch else 0.0,
        )
        return report

    def check_integrity(self) -> tuple[str, ...]:
        """Problems in the accounting of rows, slots, pins and bytes; empty when all is well."""
        return (*self._scheduler.problems(), *self._store.problems())

    def _submit(self, command: Submit) -> None:
        adapter, start, key = command.adapter, 0, None
        if adapter is not None:
            info = self._store.info(adapter)
            start = info.start_in(command.tokens)
            key = CacheKey(info.digest, start)
        self._scheduler.add(
            Sequence(
                request_id=command.request_id,
                tokens=list(command.tokens),
                prompt_length=len(command.tokens),
                adapter=adapter,
                sampling=command.sampling,
                max_new_tokens=command.max_new_tokens,
                min_new_tokens=command.min_new_tokens,
                eos_token_ids=command.eos_token_ids,
                adapter_start=start,
                cache_key=key,
                priority=command.priority,
                weight=command.weight,
                end=min(len(command.tokens) + command.max_new_tokens, self._runner.max_length),
                arrived=time.perf_counter(),
            )
        )

    def _abort(self, request_id: int) -> None:
        sequence = self._scheduler.find(request_id)
        if sequence is not None:
            self._release(sequence)
        else:
            self._scheduler.withdraw(request_id)  # or it has ended already

    def _bring_in_adapters(self, batch: Batch) -> None:
        """Copy the batch's new adapters to the device; start reading what others wait for."""
        idle = not batch
        self._store.free_emptied_slots()
        for slot, version in batch.loads:
            try:
                self._runner.put_adapter(slot, self._store.get(version))
            except Exception as error:  # no device memory: only its own requests fail
                log.exception("adapter version %d cannot be brought to the device", version)
                victims = self._scheduler.running_with(version)
                batch.prefills = [(s, n) for s, n in batch.prefills if s.adapter != version]
                batch.decodes = [s for s in batch.decodes if s.adapter != version]
                self._fail(victims, f"the adapter cannot be brought to the device: {error}")
                self._scheduler.evict_adapter(version)
        self._store.read_ahead(self._scheduler.waiting_adapters)
        # If all that is to do needs weights that are being read, the engine sleeps until they come;
        # but not before it has seen what the end of a step that is under way sets free.
        self._stalled = idle and self._flight is None and self._store.reading > 0

    def _advance(self, sequence: Sequence, place: int, sample: Sample) -> None:
        """Put a sampled token in its place, report it, and end the sequence if it was the last."""
        if sample.token_id is None:
            self._fail(
                [sequence],
                "the model's output is not finite (NaN or infinity) for this request: "
                "the adapter's weights are too large for this model or dtype",
            )
            return
        sequence.tokens[place] = sample.token_id
        generated = place + 1 - sequence.prompt_length
        reason = self._stop_reason(sequence, sample.token_id, place + 1)
        self._report.tokens.append(
            TokenOutput(
                sequence.request_id,
                sample.token_id,
                reason,
                logprob=sample.logprob,
                top_logprobs=sample.top_logprobs,
                queue_seconds=sequence.queue_seconds if generated == 1 else None,
            )
        )
        if reason is not StopReason.NOT_FINISHED:
            self._release(sequence)

    def _stop_reason(self, sequence: Sequence, token_id: int, tokens: int) -> StopReason:
        """Whether a sequence ends with its token ``token_id``, with which it has ``tokens``."""
        if token_id in sequence.eos_token_ids:
            return StopReason.EOS_TOKEN
        if tokens - sequence.prompt_length >= sequence.max_new_tokens:
            return StopReason.MAX_TOKENS
        if tokens >= self._runner.max_length:
            return StopReason.TOKEN_LIMIT
        return StopReason.NOT_FINISHED

    def _fail(self, sequences: list[Sequence], error: str) -> None:
        for sequence in sequences:
            self._report.tokens.append(
                TokenOutput(sequence.request_id, None, StopReason.ERROR, error=error)
            )
            self._release(sequence, may_hold_nan=True)

    def _release(self, sequence: Sequence, *, may_hold_nan: bool = False) -> None:
        if sequence.is_pending:
            # The step that computes it may yet turn out to have written NaN.
            sequence.tokens.pop()
            sequence.computed = min(sequence.computed, len(sequence.tokens) - 1)
        # A sequence that never gave a token may have computed NaN without anybody seeing it.
        sound = bool(sequence.generated) and not may_hold_nan
        if not sound:
            self._runner.scrub(sequence)
        self._scheduler.finish(sequence, keep=sound)

    def _keep(self, loaded: LoadFinished) -> None:
        load = loaded.load
        if load.call_id is None:
            error = self._store.arrived(loaded)
            if error is not None:
                self._fail_waiting(load.version, str(error))
            return
        try:
            info = self._prober.check(loaded)
            if load.dry:
                self._reply(Reply(load.call_id, info.report))
                return
            # Thousands of adapters may be known, and the lists take 100 KB of each.
            info = replace(info, report=info.report.brief())
            self._reply(Reply(load.call_id, self._store.add(replace(loaded, info=info))))
        except LoraxError as error:
            report = error.report if isinstance(error, AdapterRejected) else None
            if load.dry and report is not None:
                self._reply(Reply(load.call_id, report))
            else:
                self._reply(Reply(load.call_id, error=error))

    def _fail_waiting(self, version: int, error: str) -> None:
        for sequence in self._scheduler.waiting_for(version):
            if sequence.kv_slot >= 0:  # parked: it may have computed something
                self._release(sequence)
            else:
                self._scheduler.withdraw(sequence.request_id)
            self._report.tokens.append(
                TokenOutput(sequence.request_id, None, StopReason.ERROR, error=error)
            )

    def _pin(self, call_id: int, version: int, instead_of: int | None) -> None:
        if version not in self._store:
            self._reply(_not_loaded(call_id, version))
            return
        try:
            self._store.pin(version, instead_of)
        except LoraxError as error:
            self._reply(Reply(call_id, error=error))
        else:
            self._reply(Reply(call_id))

    def _drop(self, call_id: int, version: int) -> None:
        if version not in self._store:
            self._reply(_not_loaded(call_id, version))
            return
        slot = self._scheduler.drop_adapter(version)
        self._reply(Reply(call_id, self._store.drop(version, slot)))

    def _reply(self, reply: Reply) -> None:
        self._report.replies.append(reply)


def _not_loaded(call_id: int, version: int) -> Reply:
    return Reply(call_id, error=EngineFailed(f"adapter version {version} is not loaded"))
