"""Streams through the gateway, and what became of each."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import grpc

from lorax_serve.client.failures import error_of
from lorax_serve.client.requests import channel_options, generate_fields, metadata
from lorax_serve.pb.lorax.v1.generation_pb2 import STOP_REASON_MAX_TOKENS, GenerateStreamRequest
from lorax_serve.pb.lorax.v1.generation_pb2_grpc import GenerationServiceStub
from lorax_serve.routing import REPLICA_METADATA

__all__ = ["Call", "Calls", "Load", "even", "power_law"]

Choose = Callable[[], str]
_PROMPT = "w10 w11 w12 w13 w14 w15 w16 w17"


@dataclass
class Call:
    """One stream.

    Attributes:
        replica: who has answered; None if that is not known.
        error: what our client raises for how it failed, and gRPC's status; "" if it has not.
        tokens: how many came.
        whole: whether it ended as it should.
        ended: ``time.monotonic`` then.
    """

    adapter: str
    started: float
    replica: str | None = None
    error: str = ""
    details: str = ""
    tokens: int = 0
    whole: bool = False
    ended: float = 0.0


@dataclass
class Calls:
    """What became of many."""

    ended: list[Call] = field(default_factory=list)

    @property
    def failed(self) -> list[Call]:
        """Those that did not end as they should."""
        return [call for call in self.ended if not call.whole]

    @property
    def errors(self) -> dict[str, int]:
        """How many failed in each way."""
        return dict(Counter(call.error or "cut short" for call in self.failed))

    @property
    def details(self) -> list[str]:
        """What was told of those that failed."""
        return sorted({call.details for call in self.failed})

    def homes(self) -> dict[str, str]:
        """The replica that has answered most of each adapter's calls."""
        by_adapter: dict[str, Counter[str]] = {}
        for call in self.ended:
            if call.replica is not None:
                by_adapter.setdefault(call.adapter, Counter())[call.replica] += 1
        return {adapter: count.most_common(1)[0][0] for adapter, count in by_adapter.items()}

    def by_replica(self) -> Counter[str]:
        """How many calls each replica has answered."""
        return Counter(call.replica for call in self.ended if call.replica is not None)


def even(names: Sequence[str], seed: int = 0) -> Choose:
    """Every adapter as often as every other one."""
    chance = random.Random(seed)
    return lambda: chance.choice(names)


def power_law(names: Sequence[str], exponent: float = 1.0, seed: int = 0) -> Choose:
    """The n-th adapter with a probability of ``n ** -exponent``, but for a factor."""
    chance = random.Random(seed)
    weights = [rank**-exponent for rank in range(1, len(names) + 1)]
    return lambda: chance.choices(names, weights)[0]


class Load:
    """Makes calls at a gateway, without retries of its own.

    Args:
        target: its address.
    """

    def __init__(self, target: str) -> None:
        self._target = target
        self._channel = grpc.aio.insecure_channel(target, options=channel_options(0))
        self._stub = GenerationServiceStub(self._channel)

    async def close(self) -> None:
        """Let go of the connection."""
        await self._channel.close()

    async def __aenter__(self) -> Load:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def call(self, adapter: str, tokens: int = 8, timeout: float = 60.0) -> Call:
        """One stream of so many tokens."""
        fields = generate_fields(_PROMPT, adapter, {"max_new_tokens": tokens, "ignore_eos": True})
        made = Call(adapter, time.monotonic())
        stream = self._stub.GenerateStream(
            GenerateStreamRequest(**fields), metadata=metadata(adapter), timeout=timeout
        )
        try:
            async for chunk in stream:
                made.tokens = chunk.generated_token_count
                made.whole = chunk.stop_reason == STOP_REASON_MAX_TOKENS and made.tokens == tokens
        except grpc.aio.AioRpcError as error:
            kind = type(error_of(error, self._target)).__name__
            made.error, made.whole = f"{kind} ({error.code().name})", False
            made.details = str(error.details())
        made.replica = dict(await stream.trailing_metadata() or ()).get(REPLICA_METADATA)
        made.ended = time.monotonic()
        return made

    async def run(self, choose: Choose, calls: int, at_once: int, tokens: int = 8) -> Calls:
        """So many calls, some of them at once."""
        done = Calls()
        left = iter(range(calls))

        async def work() -> None:
            for _ in left:
                done.ended.append(await self.call(choose(), tokens))

        await asyncio.gather(*(work() for _ in range(at_once)))
        return done

    @asynccontextmanager
    async def running(self, choose: Choose, at_once: int, tokens: int = 8) -> AsyncIterator[Calls]:
        """Calls that go on during the block; those that were begun end before it does."""
        done = Calls()
        over = asyncio.Event()

        async def work() -> None:
            while not over.is_set():
                done.ended.append(await self.call(choose(), tokens))

        tasks = [asyncio.create_task(work()) for _ in range(at_once)]
        try:
            yield done
        finally:
            over.set()
            await asyncio.gather(*tasks)
