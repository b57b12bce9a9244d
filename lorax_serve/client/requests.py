"""From plain Python arguments to request messages, and the settings of a channel."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from lorax_serve.errors import InvalidRequest
from lorax_serve.pb.lorax.v1 import generation_pb2 as pb
from lorax_serve.routing import ADAPTER_METADATA, routing_key

__all__ = [
    "Adapters",
    "GenerateOptions",
    "Prompt",
    "channel_options",
    "generate_fields",
    "metadata",
    "prompt",
]

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]
"""Text, token ids, or chat messages: mappings with ``role`` and ``content``."""

Adapters = str | Mapping[str, float] | None
"""An adapter's name; names and scales of several to apply together; None for the base model."""

# gRPC itself makes no more than five attempts.
_MAX_RETRIES = 4


class GenerateOptions(TypedDict, total=False):
    """How to generate; what is left out has the server's default.

    Attributes:
        max_new_tokens: at least 1; default 256.
        min_new_tokens: in [0, max_new_tokens]; default 0.
        temperature: 0 (greedy) to 100; default 1 if ``top_k`` or ``top_p`` is given, else 0.
        top_k: keep the k most probable tokens; default 0, all.
        top_p: keep the most probable tokens up to this mass, in (0, 1]; default 1, all.
        seed: in [0, 2**64); default: drawn by the server and returned.
        repetition_penalty: in [0.01, 100]; default 1, off.
        stop: texts that end the generation, at most 16; one may be given as it is.
        include_stop: keep the text that ended it; default False.
        ignore_eos: go on past the end of the text; default False.
        logprobs: return tokens with their log-probability and that many alternatives, 0 to 20.
        return_tokens: return tokens; default False.
        priority: in [-2, 2]; each level doubles the share of a busy server; default 0.
    """

    max_new_tokens: int | None
    min_new_tokens: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    seed: int | None
    repetition_penalty: float | None
    stop: str | Sequence[str] | None
    include_stop: bool | None
    ignore_eos: bool | None
    logprobs: int | None
    return_tokens: bool | None
    priority: int | None


# Which field each option sets: in a group of ``Parameters``, or in the request itself.
_FIELDS = {
    "max_new_tokens": ("stopping", "max_new_tokens"),
    "min_new_tokens": ("stopping", "min_new_tokens"),
    "temperature": ("sampling", "temperature"),
    "top_k": ("sampling", "top_k"),
    "top_p": ("sampling", "top_p"),
    "seed": ("sampling", "seed"),
    "repetition_penalty": ("decoding", "repetition_penalty"),
    "include_stop": ("stopping", "include_stop_sequence"),
    "ignore_eos": ("stopping", "ignore_eos"),
    "logprobs": ("response", "logprobs"),
    "return_tokens": ("response", "generated_tokens"),
    "priority": ("", "priority"),
}


def generate_fields(
    text_or_ids_or_chat: Prompt, adapter: Adapters, options: GenerateOptions
) -> dict[str, Any]:
    """The fields of a ``GenerateRequest`` or ``GenerateStreamRequest``.

    Raises:
        InvalidRequest: an option is unknown, or its value cannot be sent.
    """
    request = pb.GenerateRequest()
    parameters = request.parameters
    stop = options.get("stop") or ()
    for name, value in options.items():
        if name == "stop" or value is None:
            continue
        if name not in _FIELDS:
            raise InvalidRequest(f"{name} is no option; there are {', '.join(_FIELDS)}, stop")
        group, field = _FIELDS[name]
        try:
            setattr(getattr(parameters, group) if group else request, field, value)
        except (TypeError, ValueError) as error:
            raise InvalidRequest(f"{name} cannot be {value!r}: {error}") from None
    parameters.stopping.stop_sequences.extend([stop] if isinstance(stop, str) else stop)
    own: dict[str, Any] = {"priority": request.priority} if request.HasField("priority") else {}
    return {
        **prompt(text_or_ids_or_chat),
        "parameters": parameters,
        **_adapter_fields(adapter),
        **own,
    }


def _adapter_fields(adapter: Adapters) -> dict[str, Any]:
    if adapter is None or isinstance(adapter, str):
        return {"adapter_id": adapter}
    if not isinstance(adapter, Mapping):
        raise InvalidRequest(f"adapter must be a name, or scales by name, found {adapter!r}")
    if not adapter:
        raise InvalidRequest("adapter: names no adapter; None is the base model")
    try:
        parts = [pb.AdapterScale(adapter_id=name, scale=scale) for name, scale in adapter.items()]
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidRequest(f"adapter: names and scales cannot be {adapter!r}: {error}") from None
    return {"adapters": parts}


def prompt(text_or_ids_or_chat: Prompt) -> dict[str, Any]:
    """The field of a request message that holds the prompt.

    Raises:
        InvalidRequest: it is neither text nor token ids nor chat messages.
    """
    if isinstance(text_or_ids_or_chat, str):
        return {"text": text_or_ids_or_chat}
    parts: list[Any] = list(text_or_ids_or_chat)
    try:
        if parts and isinstance(parts[0], Mapping):
            return {"chat": pb.ChatMessages(messages=[pb.ChatMessage(**part) for part in parts])}
        return {"token_ids": pb.TokenIds(ids=parts)}
    except (TypeError, ValueError) as error:
        raise InvalidRequest(
            f"prompt must be a string, token ids, or messages with 'role' and 'content': {error}"
        ) from None


def metadata(adapter: Adapters) -> tuple[tuple[str, str], ...]:
    """Request metadata: the routing key, for proxies that keep an adapter on one replica."""
    if not adapter:
        return ()
    key = routing_key((adapter,) if isinstance(adapter, str) else adapter)
    # Other characters cannot be sent; no adapter has them, and the server will say so.
    return ((ADAPTER_METADATA, key),) if key.isascii() and key.isprintable() else ()


def channel_options(retries: int) -> tuple[tuple[str, Any], ...]:
    """A channel's options: calls that met an unavailable server are made again, up to ``retries``
    times, unless they have begun to answer. Unloading is not: a second one would find nothing.

    Raises:
        InvalidRequest: ``retries`` is out of range.
    """
    if not 0 <= retries <= _MAX_RETRIES:
        raise InvalidRequest(f"retries must be in [0, {_MAX_RETRIES}], found {retries}")
    options: tuple[tuple[str, Any], ...] = (
        ("grpc.max_receive_message_length", 64 << 20),
        # A server that vanished without closing is noticed while a call waits for it.
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
    )
    if retries == 0:
        return (*options, ("grpc.enable_retries", 0))
    policy = {
        "name": [
            {"service": "lorax.v1.GenerationService"},
            {"service": "lorax.v1.AdapterService", "method": "LoadAdapter"},
            {"service": "lorax.v1.AdapterService", "method": "UpdateAdapter"},
            {"service": "lorax.v1.AdapterService", "method": "InspectAdapter"},
            {"service": "lorax.v1.AdapterService", "method": "ListAdapters"},
        ],
        "retryPolicy": {
            "maxAttempts": retries + 1,
            "initialBackoff": "0.2s",
            "maxBackoff": "2s",
            "backoffMultiplier": 2,
            "retryableStatusCodes": ["UNAVAILABLE"],
        },
    }
    return (*options, ("grpc.service_config", json.dumps({"methodConfig": [policy]})))
