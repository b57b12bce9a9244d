"""The engine: commands in, one step at a time, reports out. One thread owns it and the device."""

from __future__ import annotations

import logging
import time
from dataclasses import replace

from lorax_serve.config import EngineConfig
from lorax_serve.core import Batch, CacheKey, EngineStats, Sequence, StopReason, TokenOutput
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
from lorax_serve.model.runner import ModelRunner
from lorax_serve.model.sampler import Sample

__all__ = ["Engine"]

log = logging.getLogger(__name__)


class Engine:
    """Continuous batching of one model with many adapters.

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
        slots = AdapterSlots(config.adapter_slots, config.max_device_adapter_bytes, host.use)
        shared = runner.info.device == "cpu"
        self._store = AdapterStore(loader.request, host, slots, runner.clear_adapter, shared=shared)
        blocks = blocks_of(runner.kv_tokens)
        self._rows = KVRows(runner.kv_rows, blocks, prefix_caching=config.prefix_caching)
        self._prefill_budget = PrefillBudget(config.max_prefill_slowdown)
        self._scheduler = Scheduler(
            config.max_batch_size,
            config.max_batch_tokens,
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

    @property
    def busy(self) -> bool:
        """Whether there is a step to do, before another message has come."""
        scheduler = self._scheduler
        return bool(scheduler.running or scheduler.waiting) and not self._stalled

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
            case CheckIntegrity(call_id):
                self._reply(Reply(call_id, self.check_integrity()))

    def step(self) -> None:
        """Compute one step for everything that runs."""
        started = time.perf_counter()
        self._last_batch = batch = self._scheduler.schedule()
        self._bring_in_adapters(batch)
        for sequence, _ in batch.prefills:
            if sequence.queue_seconds is None:
                sequence.queue_seconds = started - sequence.arrived
        if not (batch or batch.copies):
            return
        try:
            results = self._runner.run(batch)
        except Exception as error:  # out of memory, say: these requests fail, the engine goes on
            log.exception("a step failed")
            self._fail(batch.sequences, f"the step failed: {type(error).__name__}: {error}")
            self._rows.forget()  # what was copied for the step may be half there
            return
        for sequence, length in batch.prefills:
            sequence.computed += length
        for sequence in batch.decodes:
            sequence.computed += 1
        for sequence, sample in results:
            self._advance(sequence, sample)
        self._step_seconds = time.perf_counter() - started
        prompt_tokens = sum(length for _, length in batch.prefills)
        self._prefill_budget.observe(len(batch.decodes), prompt_tokens, self._step_seconds)

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
        # If all that is to do needs weights that are being read, the engine sleeps until they come.
        self._stalled = idle and self._store.reading > 0

    def _advance(self, sequence: Sequence, sample: Sample) -> None:
        """Append a sampled token, report it, and end the sequence if it was the last."""
        if sample.token_id is None:
            self._fail(
                [sequence],
                "the model's output is not finite (NaN or infinity) for this request: "
                "the adapter's weights are too large for this model or dtype",
            )
            return
        sequence.tokens.append(sample.token_id)
        reason = self._stop_reason(sequence, sample.token_id)
        self._report.tokens.append(
            TokenOutput(
                sequence.request_id,
                sample.token_id,
                reason,
                logprob=sample.logprob,
                top_logprobs=sample.top_logprobs,
                queue_seconds=sequence.queue_seconds if sequence.generated == 1 else None,
            )
        )
        if reason is not StopReason.NOT_FINISHED:
            self._release(sequence)

    def _stop_reason(self, sequence: Sequence, token_id: int) -> StopReason:
        if token_id in sequence.eos_token_ids:
            return StopReason.EOS_TOKEN
        if sequence.generated >= sequence.max_new_tokens:
            return StopReason.MAX_TOKENS
        if len(sequence.tokens) >= self._runner.max_length:
            return StopReason.TOKEN_LIMIT
        return StopReason.NOT_FINISHED

    def _fail(self, sequences: list[Sequence], error: str) -> None:
        for sequence in sequences:
            self._report.tokens.append(
                TokenOutput(sequence.request_id, None, StopReason.ERROR, error=error)
            )
            self._release(sequence, may_hold_nan=True)

    def _release(self, sequence: Sequence, *, may_hold_nan: bool = False) -> None:
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
