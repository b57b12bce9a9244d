"""Text generation: a request becomes a stream of text chunks."""

from __future__ import annotations

import asyncio
import itertools
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

from lorax_serve.core import ChatMessage, GenerateRequest, ModelInfo, StopReason, TokenOutput
from lorax_serve.engine.messages import Submit
from lorax_serve.errors import Draining, EngineFailed, InvalidRequest
from lorax_serve.frontend.async_engine import AsyncEngine
from lorax_serve.frontend.text import Detokenizer, StopMatcher, Tokenizer
from lorax_serve.registry.admission import Admission
from lorax_serve.registry.version import Adapter

__all__ = ["RequestListener", "TextChunk", "TextGenerator", "TextStream"]

# Tokenising longer prompts takes milliseconds, during which the event loop would stand still.
_LONG_PROMPT = 4096


@dataclass(slots=True)
class TextChunk:
    """What became of a request since the last chunk.

    Attributes:
        text: whole characters; may lag behind the tokens.
        tokens: the new tokens, the EOS included.
        stop_reason: ``NOT_FINISHED`` but in the last chunk.
        stop_sequence: the one that matched, with ``STOP_SEQUENCE``.
    """

    text: str
    tokens: list[TokenOutput]
    stop_reason: StopReason = StopReason.NOT_FINISHED
    stop_sequence: str | None = None


class RequestListener:
    """Told of a stream's life; this one ignores it (metrics override it)."""

    def admitted(self, stream: TextStream) -> None:
        """The request went to the engine."""

    def token(self, stream: TextStream, output: TokenOutput, since_last: float) -> None:
        """A token came, so many seconds after the last one or, for the first, after admission."""

    def ended(self, stream: TextStream, reason: StopReason) -> None:
        """The request is over."""


class TextStream:
    """One admitted request. Iterate over it for chunks; ``cancel`` it if you stop early.

    Tokens become text as they come, whether or not anybody reads: a slow reader finds one chunk
    with all that happened meanwhile, and never delays the engine.

    Attributes:
        adapter: the pinned version; None for the base model.
        seed: the seed in use, drawn by the server if the request gave none.
        input_token_count: tokens of the prompt.
        generated_token_count: tokens so far.
    """

    def __init__(
        self,
        generator: TextGenerator,
        request: GenerateRequest,
        prompt: list[int],
        adapter: Adapter | None,
    ) -> None:
        self.adapter = adapter
        self.seed = request.sampling.seed
        self.input_token_count = len(prompt)
        self.generated_token_count = 0
        self._generator = generator
        self._stop = request.stop
        self._detokenizer = Detokenizer(generator.tokenizer, prompt)
        self._matcher = StopMatcher(request.stop.stop_sequences, request.stop.include_stop_sequence)
        self._pending = TextChunk("", [])
        self._changed = asyncio.Event()
        self._error: str = ""
        self._ended = False
        self._last_time = time.perf_counter()
        self.request_id = generator.next_request_id()

    def feed(self, output: TokenOutput) -> None:
        """Take one step's output (called on the event loop, in order)."""
        if output.token_id is None:
            self._error = output.error
            self._end(output.stop_reason)
            return
        now = time.perf_counter()
        self.generated_token_count += 1
        self._generator.listener.token(self, output, now - self._last_time)
        self._last_time = now
        self._pending.tokens.append(output)
        text = self._detokenizer.push(output.token_id)
        if text and self.generated_token_count >= self._stop.min_new_tokens:
            text, stop = self._matcher.push(text)
            if stop is not None:
                self._pending.text += text
                self._pending.stop_sequence = stop
                self._generator.abort(self)
                self._end(StopReason.STOP_SEQUENCE)
                return
        self._pending.text += text
        if output.stop_reason is not StopReason.NOT_FINISHED:
            self._pending.text += self._matcher.flush()
            self._end(output.stop_reason)
        else:
            self._changed.set()

    def cancel(self) -> None:
        """End it here, unless it has ended: the engine frees it before its next step."""
        if not self._ended:
            self._generator.abort(self)
            self._end(StopReason.CANCELLED)

    async def __aiter__(self) -> AsyncIterator[TextChunk]:
        """Chunks, until one with a stop reason.

        Raises:
            EngineFailed: the engine failed on this request.
        """
        while True:
            await self._changed.wait()
            self._changed.clear()
            chunk, self._pending = self._pending, TextChunk("", [])
            if chunk.stop_reason is StopReason.ERROR:
                raise EngineFailed(self._error)
            if chunk.text or chunk.tokens or self._ended:
                yield chunk
            if chunk.stop_reason is not StopReason.NOT_FINISHED:
                return

    def _end(self, reason: StopReason) -> None:
        assert not self._ended, "a request ended twice"
        self._ended = True
        self._pending.stop_reason = reason
        self._changed.set()
        self._generator.ended(self, reason)


class TextGenerator:
    """Admits requests and turns them into streams.

    Args:
        engine: a started engine.
        admission: pins the adapters that requests name.
        tokenizer: the base model's.
        listener: told of every request's life.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        admission: Admission,
        tokenizer: Tokenizer,
        listener: RequestListener | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.listener = listener or RequestListener()
        self._engine = engine
        self._admission = admission
        self._ids = itertools.count(1)
        self._active = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = False

    @property
    def info(self) -> ModelInfo:
        """The base model."""
        return self._engine.info

    def next_request_id(self) -> int:
        """A number that no other request of this engine has."""
        return next(self._ids)

    async def tokenize(self, request: GenerateRequest) -> list[int]:
        """The prompt's token ids.

        Raises:
            InvalidRequest: see ``Tokenizer.encode``; or an id is not in the vocabulary.
        """
        prompt = request.prompt
        if _characters(prompt) > _LONG_PROMPT:
            ids = await asyncio.to_thread(self.tokenizer.encode, prompt)
        else:
            ids = self.tokenizer.encode(prompt)
        largest = max(ids)
        if min(ids) < 0 or largest >= self.info.vocab_size:
            raise InvalidRequest(
                f"token_ids must be in [0, {self.info.vocab_size}), found {largest} or below 0"
            )
        return ids

    async def start(self, request: GenerateRequest, *, seeded: bool) -> TextStream:
        """Admit a request.

        Args:
            request: what to generate.
            seeded: whether the request chose its seed; if not, one is drawn.

        Raises:
            InvalidRequest, AdapterNotFound, Overloaded, Draining, EngineFailed: it was not
                admitted, and nothing is kept of it.
        """
        ids = await self.tokenize(request)
        limit = self.info.max_sequence_length
        if len(ids) >= limit:
            raise InvalidRequest(
                f"prompt has {len(ids)} tokens; with at least one new token, this server takes at "
                f"most {limit - 1} (--max-sequence-length {limit})"
            )
        if self._draining:
            raise Draining("the server is shutting down; send the request to another one")
        if not seeded:
            request = replace(
                request, sampling=replace(request.sampling, seed=secrets.randbits(63))
            )
        adapter = await self._admit(request)
        if adapter is not None and self._draining:  # it may have come late, after a load
            self._admission.release(adapter)
            raise Draining("the server is shutting down; send the request to another one")
        try:
            stream = TextStream(self, request, ids, adapter)
            self._engine.submit(self._command(stream, request, ids), stream.feed)
        except BaseException:
            if adapter is not None:
                self._admission.release(adapter)
            raise
        self._active += 1
        self._idle.clear()
        self.listener.admitted(stream)
        return stream

    async def _admit(self, request: GenerateRequest) -> Adapter | None:
        """Pin what the request names; None for the base model."""
        if request.composition:
            return await self._admission.admit_together(request.composition)
        if request.adapter_id is not None:
            return await self._admission.admit(request.adapter_id)
        return None

    def abort(self, stream: TextStream) -> None:
        """Tell the engine to forget the stream."""
        self._engine.abort(stream.request_id)

    def ended(self, stream: TextStream, reason: StopReason) -> None:
        """Called by each stream exactly once."""
        if stream.adapter is not None:
            self._admission.release(stream.adapter)
        self.listener.ended(stream, reason)
        self._active -= 1
        if self._active == 0:
            self._idle.set()

    async def drain(self, seconds: float) -> bool:
        """Admit nothing more, and wait for what runs; whether it ended in time."""
        self._draining = True
        try:
            await asyncio.wait_for(self._idle.wait(), seconds)
        except TimeoutError:
            return False
        return True

    def _command(self, stream: TextStream, request: GenerateRequest, ids: list[int]) -> Submit:
        info, stop = self.info, request.stop
        return Submit(
            request_id=stream.request_id,
            tokens=tuple(ids),
            adapter=stream.adapter.key if stream.adapter else None,
            sampling=request.sampling,
            max_new_tokens=stop.max_new_tokens,
            min_new_tokens=stop.min_new_tokens,
            eos_token_ids=frozenset() if stop.ignore_eos else frozenset(info.eos_token_ids),
            priority=request.priority,
            weight=stream.adapter.weight if stream.adapter else 1,
        )


def _characters(prompt: str | tuple[int, ...] | tuple[ChatMessage, ...]) -> int:
    """How much text there is to tokenise."""
    if isinstance(prompt, str):
        return len(prompt)
    return sum(len(part.content) for part in prompt if isinstance(part, ChatMessage))
