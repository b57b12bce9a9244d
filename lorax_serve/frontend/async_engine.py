"""The engine's process as seen from an asyncio program."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import multiprocessing
import socket
from collections.abc import Callable, Iterable
from multiprocessing.context import SpawnProcess

from lorax_serve.config import EngineConfig
from lorax_serve.core import (
    AdapterInfo,
    AdapterTier,
    AdapterWork,
    EngineStats,
    Freed,
    ModelInfo,
    Part,
    StopReason,
    TokenOutput,
)
from lorax_serve.engine import process
from lorax_serve.engine.messages import (
    HEADER_BYTES,
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
    Stop,
    Submit,
    UnpinAdapter,
    decode,
    encode,
)
from lorax_serve.errors import EngineFailed, Overloaded
from lorax_serve.report import LoadReport

__all__ = ["AsyncEngine", "TokenSink"]

TokenSink = Callable[[TokenOutput], None]
"""Receives a request's outputs on the event loop, the last one with a stop reason."""

_JOIN_SECONDS = 10.0

log = logging.getLogger(__name__)


class AsyncEngine:
    """A running engine. Make one with ``await AsyncEngine.start(config)``.

    Every request that was submitted ends with exactly one output that has a stop reason, unless it
    is aborted; if the process dies, they all end with ``StopReason.ERROR``.

    Attributes:
        info: what the engine says of its base model.
        stats: its gauges after the last step.
        died: set when the process has gone without being asked to.
        on_step: called with each step's report, after the outputs were delivered.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.info: ModelInfo
        self._process: SpawnProcess
        self._writer: asyncio.StreamWriter
        self._reading: asyncio.Task[None]
        self.stats = EngineStats()
        self.died = asyncio.Event()
        self.on_step: Callable[[StepReport], None] = lambda report: None
        self._max_waiting = config.max_waiting
        self._sinks: dict[int, TokenSink] = {}
        self._calls: dict[int, asyncio.Future[object]] = {}
        self._call_ids = itertools.count(1)
        self._outbox: list[Command] = []
        self._closing = False
        self._loop = asyncio.get_running_loop()

    @classmethod
    async def start(cls, config: EngineConfig) -> AsyncEngine:
        """Start the process and wait until its model is loaded and warm.

        Raises:
            ModelUnsupported: the model cannot be found or run.
            EngineFailed: the process died while starting.
        """
        engine = cls(config)
        ours, theirs = socket.socketpair()
        # Spawned, not forked: gRPC and torch both keep threads that a fork would break.
        context = multiprocessing.get_context("spawn")
        engine._process = context.Process(
            target=process.main, args=(config, theirs), name="lorax-engine", daemon=True
        )
        ready = engine._call(process.READY_CALL)
        engine._process.start()
        theirs.close()
        reader, engine._writer = await asyncio.open_connection(sock=ours)
        engine._reading = asyncio.create_task(engine._read(reader), name="engine-reader")
        try:
            info = await ready
        except BaseException:
            await engine.close()
            raise
        assert isinstance(info, ModelInfo)
        engine.info = info
        return engine

    def submit(self, command: Submit, sink: TokenSink) -> None:
        """Start a request; ``sink`` gets its outputs.

        Raises:
            Overloaded: too many requests are in flight.
            EngineFailed: the process is dead.
        """
        self._alive()
        if len(self._sinks) >= self.info.max_batch_size + self._max_waiting:
            raise Overloaded(
                f"{len(self._sinks)} requests are running or waiting, the most that this server "
                "takes (--max-batch-size + --max-waiting); try again later"
            )
        self._sinks[command.request_id] = sink
        self._send(command)

    def abort(self, request_id: int) -> None:
        """Forget a request; its sink is not called again. Unknown ids are ignored."""
        if self._sinks.pop(request_id, None) is not None and not self.died.is_set():
            self._send(Abort(request_id))

    @property
    def in_flight(self) -> int:
        """Requests that are submitted and have not ended."""
        return len(self._sinks)

    async def load_adapter(self, version: int, path: str) -> AdapterInfo:
        """Have the adapter directory at ``path`` read and checked, without pausing the steps.

        Raises:
            AdapterRejected: with the reason; nothing of it is kept.
            Overloaded: host memory for adapters is full.
        """
        info = await self._ask(lambda call: LoadAdapter(call, version, path))
        assert isinstance(info, AdapterInfo)
        return info

    async def inspect_adapter(self, path: str) -> LoadReport:
        """What a load of the adapter directory at ``path`` would find; a refusal is a report."""
        report = await self._ask(lambda call: InspectAdapter(call, path))
        assert isinstance(report, LoadReport)
        return report

    async def compose_adapter(self, version: int, parts: tuple[Part, ...]) -> AdapterInfo:
        """Have several loaded adapters added up into one more, each with its scale.

        Raises:
            AdapterRejected: one of them is more than LoRA.
            Overloaded: host memory for adapters is full.
        """
        info = await self._ask(lambda call: LoadAdapter(call, version, "a composition", parts))
        assert isinstance(info, AdapterInfo)
        return info

    async def drop_adapter(self, version: int) -> Freed:
        """Free an adapter that no request uses any more; returns the memory freed."""
        freed = await self._ask(lambda call: DropAdapter(call, version))
        assert isinstance(freed, Freed)
        return freed

    async def pin_adapter(self, version: int, instead_of: int | None = None) -> None:
        """Keep an adapter in host memory.

        Args:
            version: a loaded one.
            instead_of: a pinned version that is about to be unpinned.

        Raises:
            Overloaded: it would leave others no room.
        """
        await self._ask(lambda call: PinAdapter(call, version, instead_of))

    async def unpin_adapter(self, version: int) -> None:
        """Let an adapter leave host memory again."""
        await self._ask(lambda call: UnpinAdapter(call, version))

    async def find_adapters(self) -> dict[int, AdapterTier]:
        """Where the weights of all loaded versions are."""
        tiers = await self._ask(FindAdapters)
        assert isinstance(tiers, dict)
        return tiers

    async def find_work(self) -> AdapterWork:
        """Which versions have requests."""
        work = await self._ask(FindWork)
        assert isinstance(work, AdapterWork)
        return work

    async def check_integrity(self) -> tuple[str, ...]:
        """What is wrong in the engine's accounting: empty when all is well."""
        problems = await self._ask(CheckIntegrity)
        assert isinstance(problems, tuple)
        return problems

    async def close(self) -> None:
        """Stop the process; requests still in flight end with an error."""
        self._closing = True
        if not self.died.is_set():
            self._send(Stop())
        self._flush()
        await asyncio.to_thread(self._process.join, _JOIN_SECONDS)
        if self._process.is_alive():
            log.error("the engine did not stop within %.0f s and was killed", _JOIN_SECONDS)
            self._process.kill()
            await asyncio.to_thread(self._process.join)
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()
        await self._reading

    def _alive(self) -> None:
        if self.died.is_set() or self._closing:
            raise EngineFailed("the engine's process is gone; the server must be restarted")

    def _call(self, call_id: int) -> asyncio.Future[object]:
        future: asyncio.Future[object] = self._loop.create_future()
        self._calls[call_id] = future
        return future

    async def _ask(self, command: Callable[[int], Command]) -> object:
        self._alive()
        call_id = next(self._call_ids)
        future = self._call(call_id)
        self._send(command(call_id))
        return await future

    def _send(self, command: Command) -> None:
        # Commands given in one turn of the event loop travel as one message.
        if not self._outbox:
            self._loop.call_soon(self._flush)
        self._outbox.append(command)

    def _flush(self) -> None:
        if self._outbox and not self._writer.is_closing():
            self._writer.write(encode(self._outbox))
        self._outbox.clear()

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            while True:
                header = await reader.readexactly(HEADER_BYTES)
                body = await reader.readexactly(int.from_bytes(header, "little"))
                report = decode(body)
                assert isinstance(report, StepReport)
                self._deliver(report)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self._fail_all()

    def _deliver(self, report: StepReport) -> None:
        self.stats = report.stats
        for output in report.tokens:
            if output.stop_reason is StopReason.NOT_FINISHED:
                sink = self._sinks.get(output.request_id)
            else:
                sink = self._sinks.pop(output.request_id, None)
            if sink is not None:  # else it was aborted while this report was on its way
                sink(output)
        self._resolve(report.replies)
        self.on_step(report)

    def _resolve(self, replies: Iterable[Reply]) -> None:
        for reply in replies:
            future = self._calls.pop(reply.call_id, None)
            if future is None or future.done():
                continue
            if reply.error is not None:
                future.set_exception(reply.error)
            else:
                future.set_result(reply.value)

    def _fail_all(self) -> None:
        if not self._closing:
            log.critical("the engine's process died (exit code %s)", self._process.exitcode)
            self.died.set()
        error = "the engine's process is gone"
        for future in self._calls.values():
            if not future.done():
                future.set_exception(EngineFailed(error))
        self._calls.clear()
        sinks, self._sinks = self._sinks, {}
        for request_id, sink in sinks.items():
            sink(TokenOutput(request_id, None, StopReason.ERROR, error=error))
