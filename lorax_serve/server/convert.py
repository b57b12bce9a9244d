"""Between protobuf messages and the engine's nouns. Errors name the message's field.

Defaults are those of ``SamplingParams`` and ``StopParams``: only fields that are present are set.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lorax_serve.core import (
    AdapterScale,
    AdapterTier,
    ChatMessage,
    GenerateRequest,
    SamplingParams,
    StopParams,
    TokenOutput,
)
from lorax_serve.errors import AdapterRejected, InvalidRequest, LoraxError, SourceFailed
from lorax_serve.frontend.text import Tokenizer
from lorax_serve.pb.lorax.v1 import adapter_pb2, generation_pb2
from lorax_serve.registry.events import AdapterEvent
from lorax_serve.registry.version import Adapter, AdapterState

__all__ = [
    "adapter_message",
    "event_message",
    "failure_message",
    "generate_request",
    "prompt_of",
    "token_messages",
]

_MAX_NAME = 128

_STATES = {
    AdapterState.READY: adapter_pb2.ADAPTER_STATE_READY,
    AdapterState.SUPERSEDED: adapter_pb2.ADAPTER_STATE_SUPERSEDED,
    AdapterState.DRAINING: adapter_pb2.ADAPTER_STATE_DRAINING,
}
_TIERS = {
    None: adapter_pb2.ADAPTER_TIER_UNSPECIFIED,
    AdapterTier.DEVICE: adapter_pb2.ADAPTER_TIER_DEVICE,
    AdapterTier.HOST: adapter_pb2.ADAPTER_TIER_HOST,
    AdapterTier.DISK: adapter_pb2.ADAPTER_TIER_DISK,
}


def generate_request(message: Any) -> GenerateRequest:
    """The request that a ``GenerateRequest`` or ``GenerateStreamRequest`` message means.

    Raises:
        InvalidRequest: naming the field that is missing or out of range.
    """
    parameters = message.parameters
    sampling = _given(parameters.sampling, "temperature", "top_k", "top_p", "seed")
    if "temperature" not in sampling and ("top_k" in sampling or "top_p" in sampling):
        sampling["temperature"] = 1.0
    sampling |= _given(parameters.decoding, "repetition_penalty")
    sampling |= _given(parameters.response, "logprobs")
    stopping = _given(
        parameters.stopping,
        "max_new_tokens",
        "min_new_tokens",
        "include_stop_sequence",
        "ignore_eos",
    )
    return GenerateRequest(
        prompt=prompt_of(message),
        adapter_id=_adapter_id(message),
        composition=tuple(_adapter_scale(*each) for each in enumerate(message.adapters)),
        sampling=SamplingParams(**sampling),
        stop=StopParams(stop_sequences=tuple(parameters.stopping.stop_sequences), **stopping),
        **_given(message, "priority"),
    )


def prompt_of(message: Any) -> str | tuple[int, ...] | tuple[ChatMessage, ...]:
    """The prompt of any message that has one.

    Raises:
        InvalidRequest: there is none, or it is empty.
    """
    kind = message.WhichOneof("prompt")
    if kind == "text":
        text: str = message.text
        return text
    if kind == "token_ids":
        if not message.token_ids.ids:
            raise InvalidRequest("token_ids.ids is empty: give at least one token")
        return tuple(message.token_ids.ids)
    if kind == "chat":
        messages = tuple(ChatMessage(each.role, each.content) for each in message.chat.messages)
        if not messages:
            raise InvalidRequest("chat.messages is empty: give at least one message")
        if not all(each.role for each in messages):
            raise InvalidRequest("chat.messages: role is missing; say who speaks, such as 'user'")
        return messages
    raise InvalidRequest("prompt is missing: set one of text, token_ids and chat")


def token_messages(outputs: Iterable[TokenOutput], tokenizer: Tokenizer) -> Iterable[Any]:
    """``Token`` messages of generated tokens."""
    for output in outputs:
        if output.token_id is None:
            continue
        yield generation_pb2.Token(
            id=output.token_id,
            piece=tokenizer.piece(output.token_id),
            logprob=output.logprob,
            top=[
                generation_pb2.TopToken(id=token, piece=tokenizer.piece(token), logprob=logprob)
                for token, logprob in output.top_logprobs
            ],
        )


def adapter_message(adapter: Adapter, tier: AdapterTier | None = None) -> Any:
    """The ``Adapter`` message of a loaded version, which is in ``tier`` if that is known."""
    message = adapter_pb2.Adapter(
        adapter_id=adapter.name,
        version=adapter.version,
        digest=adapter.info.digest,
        state=_STATES[adapter.state],
        rank=adapter.info.max_rank,
        module_count=adapter.info.num_modules,
        host_bytes=adapter.info.nbytes,
        active_requests=adapter.references,
        total_requests=adapter.requests,
        weight=adapter.weight,
        pinned=adapter.pinned,
        tier=_TIERS[tier],
    )
    message.last_used.FromNanoseconds(int(adapter.last_used * 1e9))
    return message


def event_message(event: AdapterEvent) -> Any:
    """The message of one change."""
    message = adapter_pb2.WatchAdaptersResponse(
        event=f"ADAPTER_EVENT_{event.kind.name}", adapter_id=event.name
    )
    if event.adapter is not None:
        message.adapter.CopyFrom(adapter_message(event.adapter))
    if event.error is not None:
        message.message, message.reason = _told(event.error)
    return message


def failure_message(name: str, error: LoraxError) -> Any:
    """The message of an adapter that could not be loaded."""
    text, reason = _told(error)
    return adapter_pb2.FailedAdapter(adapter_id=name, message=text, reason=reason)


def _told(error: LoraxError) -> tuple[str, str]:
    """An error's text, and the class of it if it has one."""
    reason = error.reason if isinstance(error, AdapterRejected | SourceFailed) else ""
    return str(error).encode(errors="replace").decode(), reason


def _adapter_id(message: Any) -> str | None:
    if not message.HasField("adapter_id"):
        return None
    if not message.adapter_id:
        raise InvalidRequest("adapter_id is empty: leave it out for the base model")
    return _sized(message.adapter_id, "adapter_id")


def _adapter_scale(index: int, message: Any) -> AdapterScale:
    field = f"adapters[{index}].adapter_id"
    if not message.adapter_id:
        raise InvalidRequest(f"{field} is missing: name an adapter")
    scale = message.scale if message.HasField("scale") else 1.0
    return AdapterScale(_sized(message.adapter_id, field), scale)


def _sized(adapter_id: str, field: str) -> str:
    if len(adapter_id.partition("@")[0]) > _MAX_NAME:
        raise InvalidRequest(
            f"{field} has {len(adapter_id)} characters; no adapter's name has more than {_MAX_NAME}"
        )
    return adapter_id


def _given(message: Any, *names: str) -> dict[str, Any]:
    """The fields of ``message`` that are present."""
    return {name: getattr(message, name) for name in names if message.HasField(name)}
