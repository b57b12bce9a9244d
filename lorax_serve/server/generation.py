"""``lorax.v1.GenerationService``: each call admits a request and follows its stream."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

from lorax_serve import __version__
from lorax_serve.core import GenerateRequest, StopReason
from lorax_serve.errors import InvalidRequest
from lorax_serve.frontend.generator import TextChunk, TextGenerator, TextStream
from lorax_serve.pb.lorax.v1 import generation_pb2 as pb
from lorax_serve.pb.lorax.v1 import generation_pb2_grpc
from lorax_serve.registry.compositions import Composed
from lorax_serve.routing import ADAPTER_METADATA, routing_key
from lorax_serve.server import convert

__all__ = ["GenerationServicer"]

# Of a routing key in a message.
_MOST_SHOWN = 300

_STOP_REASONS = {
    StopReason.NOT_FINISHED: pb.STOP_REASON_UNSPECIFIED,
    StopReason.MAX_TOKENS: pb.STOP_REASON_MAX_TOKENS,
    StopReason.EOS_TOKEN: pb.STOP_REASON_EOS_TOKEN,
    StopReason.CANCELLED: pb.STOP_REASON_CANCELLED,
    StopReason.STOP_SEQUENCE: pb.STOP_REASON_STOP_SEQUENCE,
    StopReason.TOKEN_LIMIT: pb.STOP_REASON_TOKEN_LIMIT,
    StopReason.ERROR: pb.STOP_REASON_ERROR,
}


class GenerationServicer(generation_pb2_grpc.GenerationServiceServicer):  # type: ignore[misc]
    """Generation over gRPC.

    Attributes:
        generator: set by the server before it lets calls through.
    """

    generator: TextGenerator

    async def Generate(self, request: Any, context: Any) -> Any:
        """Answer with the whole text."""
        stream = await self._start(request, context)
        provenance = _provenance(stream)
        try:
            whole = TextChunk("", [])
            async for chunk in stream:
                whole.text += chunk.text
                whole.tokens += chunk.tokens
                whole.stop_reason, whole.stop_sequence = chunk.stop_reason, chunk.stop_sequence
        finally:
            stream.cancel()  # the client cancelled or its deadline passed: else it has ended
        fields = self._news(request, stream, whole)
        return pb.GenerateResponse(**fields, **provenance)

    async def GenerateStream(self, request: Any, context: Any) -> None:
        """Send the text as it comes. Writes, instead of yielding, to be told of cancellation."""
        stream = await self._start(request, context)
        provenance = _provenance(stream)
        try:
            async for chunk in stream:
                fields = self._news(request, stream, chunk)
                await context.write(pb.GenerateStreamResponse(**fields, **provenance))
                provenance = {}
        finally:
            stream.cancel()

    async def Tokenize(self, request: Any, context: Any) -> Any:
        """Answer with the token ids of a prompt."""
        ids = await self.generator.tokenize(GenerateRequest(convert.prompt_of(request)))
        piece = self.generator.tokenizer.piece
        # There may be a million of them, for which the streams must not wait.
        pieces = await asyncio.to_thread(lambda: [piece(each) for each in ids])
        return pb.TokenizeResponse(token_count=len(ids), token_ids=ids, tokens=pieces)

    async def ModelInfo(self, request: Any, context: Any) -> Any:
        """Describe the base model."""
        info = self.generator.info
        return pb.ModelInfoResponse(
            model=info.model,
            dtype=info.dtype,
            device=info.device,
            vocab_size=info.vocab_size,
            max_sequence_length=info.max_sequence_length,
            eos_token_ids=info.eos_token_ids,
            num_parameters=info.num_parameters,
            server_version=__version__,
        )

    async def _start(self, message: Any, context: Any) -> TextStream:
        request = convert.generate_request(message)
        _check_metadata(request, context.invocation_metadata() or ())
        seeded = message.parameters.sampling.HasField("seed")
        return await self.generator.start(request, seeded=seeded)

    def _news(self, message: Any, stream: TextStream, chunk: TextChunk) -> dict[str, Any]:
        wanted = message.parameters.response
        tokens = chunk.tokens if wanted.generated_tokens or wanted.HasField("logprobs") else []
        return {
            "text": chunk.text,
            "tokens": convert.token_messages(tokens, self.generator.tokenizer),
            "stop_reason": _STOP_REASONS[chunk.stop_reason],
            "stop_sequence": chunk.stop_sequence,
            "generated_token_count": stream.generated_token_count,
        }


def _check_metadata(request: GenerateRequest, metadata: Iterable[tuple[str, str]]) -> None:
    """Refuse a request that was routed by another adapter than it names."""
    parts = [part.adapter_id for part in request.composition]
    named = parts or ([] if request.adapter_id is None else [request.adapter_id])
    key = routing_key(named)
    for name, value in metadata:
        # What a client of other make repeats with its digest was routed well enough.
        if name != ADAPTER_METADATA or (named and value in (key, request.adapter_id)):
            continue
        field = "adapters" if parts else "adapter_id"
        raise InvalidRequest(
            f"{field} is {key[:_MOST_SHOWN] or None!r}, but the metadata {ADAPTER_METADATA} is "
            f"{value[:_MOST_SHOWN]!r}: send the same, or no such metadata"
        )


def _provenance(stream: TextStream) -> dict[str, Any]:
    fields = {"input_token_count": stream.input_token_count, "seed": stream.seed}
    if stream.adapter is None:
        return fields
    if isinstance(stream.adapter, Composed):
        parts = [
            pb.AppliedAdapter(
                adapter_id=adapter.name,
                version=adapter.version,
                digest=adapter.info.digest,
                scale=scale,
            )
            for adapter, scale in stream.adapter.parts
        ]
        return {**fields, "adapters": parts}
    return {
        **fields,
        "adapter_id": stream.adapter.name,
        "adapter_version": stream.adapter.version,
        "adapter_digest": stream.adapter.info.digest,
    }
