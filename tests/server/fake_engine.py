"""An engine without a model, in the place of ``AsyncEngine``: it repeats prompts."""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import dataclass
from pathlib import Path

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
from lorax_serve.engine.messages import StepReport, Submit
from lorax_serve.errors import AdapterRejected, EngineFailed, Overloaded, RejectReason
from lorax_serve.frontend.async_engine import AsyncEngine, TokenSink
from lorax_serve.report import LoadReport
from lorax_serve.store.digest import WEIGHTS_FILE, digest_of
from tests.frontend.toy_tokenizers import EOS, WORDS

STEP_SECONDS = 0.002


@dataclass
class _Running:
    command: Submit
    sink: TokenSink
    generated: int = 0


class FakeEngine(AsyncEngine):
    """Generates each prompt's tokens over and over, one a step.

    Attributes:
        paused: while set, no steps are done.
        steps: steps done so far.
        commands: every request that was submitted.
        aborted: ids of requests that were aborted, and how many steps had been done.
        loads: names of the directories that were loaded or are waiting.
        loads_open: loads wait for it.
        composed: what versions were composed of.
        dropped: versions that were freed.
        pinned: versions that are pinned.
        report: of what is loaded and inspected, in place of a plain one.
        closed: whether it was closed.
    """

    def __init__(self, tokenizer: Path, *, limit: int = 8, max_length: int = 64) -> None:
        self.info = ModelInfo(
            model="fake",
            directory=str(tokenizer),
            dtype="float32",
            device="cpu",
            vocab_size=len(WORDS),
            max_sequence_length=max_length,
            max_batch_size=limit,
            eos_token_ids=(EOS,),
            num_parameters=123,
            kv_cache_bytes=456,
        )
        self.stats = EngineStats(kv_capacity=789)
        self.died = asyncio.Event()
        self.on_step = lambda report: None
        self.paused = False
        self.steps = 0
        self.commands: list[Submit] = []
        self.aborted: list[tuple[int, int]] = []
        self.loads: list[str] = []
        self.loads_open = asyncio.Event()
        self.loads_open.set()
        self.composed: dict[int, tuple[Part, ...]] = {}
        self.dropped: list[int] = []
        self.pinned: set[int] = set()
        self.report: LoadReport | None = None
        self.closed = False
        self._limit = limit
        self._requests: dict[int, _Running] = {}
        self._stepping = asyncio.create_task(self._step_for_ever())

    @property
    def in_flight(self) -> int:
        return len(self._requests)

    def submit(self, command: Submit, sink: TokenSink) -> None:
        if self.died.is_set():
            raise EngineFailed("the engine's process is gone; the server must be restarted")
        if len(self._requests) >= self._limit:
            raise Overloaded("too many requests; try again later")
        self.commands.append(command)
        self._requests[command.request_id] = _Running(command, sink)

    def abort(self, request_id: int) -> None:
        if self._requests.pop(request_id, None) is not None:
            self.aborted.append((request_id, self.steps))

    async def load_adapter(self, version: int, path: str) -> AdapterInfo:
        self.loads.append(Path(path).name)
        await self.loads_open.wait()
        content = (Path(path) / "adapter_config.json").read_bytes()
        whole = (Path(path) / WEIGHTS_FILE).exists()
        digest = digest_of(path) if whole else hashlib.sha256(content).hexdigest()
        report = LoadReport(digest=digest, num_modules=14)
        if b"bad" in content:
            reason, message = RejectReason.SHAPE_MISMATCH, "lora_A of layer 3 has rank 5"
            raise AdapterRejected(reason, message, self.report or report.refused(reason, message))
        return AdapterInfo(digest, 8, 14, len(content), report=self.report or report)

    async def compose_adapter(self, version: int, parts: tuple[Part, ...]) -> AdapterInfo:
        self.composed[version] = parts
        await self.loads_open.wait()
        return AdapterInfo("+".join(part.digest for part in parts), 16, 14, 2000)

    async def inspect_adapter(self, path: str) -> LoadReport:
        return self.report or LoadReport(digest=Path(path).name)

    async def drop_adapter(self, version: int) -> Freed:
        assert version not in {each.command.adapter for each in self._requests.values()}
        self.dropped.append(version)
        return Freed(host=1000 + version)

    async def pin_adapter(self, version: int, instead_of: int | None = None) -> None:
        self.pinned.add(version)

    async def unpin_adapter(self, version: int) -> None:
        self.pinned.discard(version)

    async def find_adapters(self) -> dict[int, AdapterTier]:
        return dict.fromkeys(range(1, 1000), AdapterTier.HOST)

    async def find_work(self) -> AdapterWork:
        with_adapters = (each.command.adapter for each in self._requests.values())
        return AdapterWork(frozenset(each for each in with_adapters if each is not None))

    async def check_integrity(self) -> tuple[str, ...]:
        return ()

    async def close(self) -> None:
        self.closed = True
        self._stepping.cancel()
        await asyncio.wait([self._stepping])

    def fail(self, error: str = "the step failed") -> None:
        """End every request with an error."""
        requests, self._requests = self._requests, {}
        for request_id, each in requests.items():
            each.sink(TokenOutput(request_id, None, StopReason.ERROR, error=error))

    def die(self) -> None:
        """Do what ``AsyncEngine`` does when its process dies."""
        self.died.set()
        self.fail("the engine's process is gone")

    def step(self) -> None:
        """One token for every request."""
        self.steps += 1
        running = list(self._requests.values())
        tokens = [self._advance(each) for each in running]
        self.stats = EngineStats(
            running=len(running), batch_size=len(running), kv_capacity=789, step_seconds=0.001
        )
        for each, output in zip(running, tokens, strict=True):
            if output.stop_reason is not StopReason.NOT_FINISHED:
                del self._requests[output.request_id]
            each.sink(output)
        self.on_step(StepReport(tokens, [], self.stats))

    async def _step_for_ever(self) -> None:
        while True:
            await asyncio.sleep(STEP_SECONDS)
            if not self.paused:
                self.step()

    def _advance(self, each: _Running) -> TokenOutput:
        command = each.command
        token = command.tokens[each.generated % len(command.tokens)]
        each.generated += 1
        reason = StopReason.NOT_FINISHED
        if token in command.eos_token_ids:
            reason = StopReason.EOS_TOKEN
        elif each.generated == command.max_new_tokens:
            reason = StopReason.MAX_TOKENS
        elif each.generated + len(command.tokens) == self.info.max_sequence_length:
            reason = StopReason.TOKEN_LIMIT
        n = command.sampling.logprobs
        return TokenOutput(
            command.request_id,
            token,
            reason,
            logprob=None if n is None else -0.5,
            top_logprobs=tuple((token + i, -0.5 - i) for i in range(n or 0)),
            queue_seconds=0.25 if each.generated == 1 else None,
        )
