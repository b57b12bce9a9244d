"""From errors to gRPC statuses: the one place that knows which is which."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from lorax_serve.errors import (
    AdapterConflict,
    AdapterNotFound,
    AdapterRejected,
    Draining,
    EngineFailed,
    InvalidRequest,
    LoraxError,
    ModelUnsupported,
    Overloaded,
    SourceFailed,
    SourceReason,
    StoreFailed,
)
from lorax_serve.routing import REPLICA_METADATA
from lorax_serve.server.report import report_bytes

__all__ = ["LOAD_REPORT", "REJECT_REASON", "SOURCE_REASON", "Guard", "status_of"]

REJECT_REASON = "lorax-reject-reason"
"""Trailing metadata of a refused adapter: a value of ``RejectReason``."""
LOAD_REPORT = "lorax-load-report-bin"
"""Trailing metadata of a refused adapter: a ``LoadReport``, if a load has looked at it."""
SOURCE_REASON = "lorax-source-reason"
"""Trailing metadata of an adapter that its source did not give: a value of ``SourceReason``."""

_CODES: dict[type[LoraxError], grpc.StatusCode] = {
    InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    AdapterRejected: grpc.StatusCode.INVALID_ARGUMENT,
    AdapterNotFound: grpc.StatusCode.NOT_FOUND,
    AdapterConflict: grpc.StatusCode.FAILED_PRECONDITION,
    ModelUnsupported: grpc.StatusCode.FAILED_PRECONDITION,
    Overloaded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Draining: grpc.StatusCode.UNAVAILABLE,
    EngineFailed: grpc.StatusCode.INTERNAL,
    StoreFailed: grpc.StatusCode.INTERNAL,
}
_SOURCE_CODES = {
    SourceReason.NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    SourceReason.DENIED: grpc.StatusCode.PERMISSION_DENIED,
    SourceReason.TOO_LARGE: grpc.StatusCode.RESOURCE_EXHAUSTED,
}
# A status travels in HTTP/2 headers, whose size peers limit to 8 KiB or so.
_MAX_MESSAGE = 1000
# Health and reflection answer at all times, and in their own way.
_ALWAYS_OPEN = "/grpc."

log = logging.getLogger(__name__)


def status_of(
    error: LoraxError,
) -> tuple[grpc.StatusCode, str, tuple[tuple[str, str | bytes], ...]]:
    """The status code, message and trailing metadata that stand for ``error``."""
    # Names of files may hold bytes that are no text, which a status cannot carry.
    message = str(error).encode(errors="replace").decode()
    if len(message) > _MAX_MESSAGE:
        message = f"{message[:_MAX_MESSAGE]}..."
    if isinstance(error, SourceFailed):
        code = _SOURCE_CODES.get(error.reason, grpc.StatusCode.UNAVAILABLE)
        return code, message, ((SOURCE_REASON, str(error.reason)),)
    trailing: tuple[tuple[str, str | bytes], ...] = ()
    if isinstance(error, AdapterRejected):
        trailing = ((REJECT_REASON, str(error.reason)),)
        if error.report is not None:
            trailing += ((LOAD_REPORT, report_bytes(error.report)),)
    return _CODES.get(type(error), grpc.StatusCode.INTERNAL), message, trailing


class Guard(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Stands around every call of our own services: while closed it refuses with UNAVAILABLE, and
    it turns what they raise into statuses.

    Args:
        on_error: called with the name of each error status that is sent.
        replica: this server's name, which every answer carries.
    """

    def __init__(self, on_error: Callable[[str], None], replica: str) -> None:
        self._on_error = on_error
        self._trailing = ((REPLICA_METADATA, replica),)
        self._closed: str | None = "the server is starting; try again later"

    def open(self) -> None:
        """Let calls through."""
        self._closed = None

    def close(self, reason: str) -> None:
        """Refuse new calls; an engine's failure on a running one is UNAVAILABLE from here on."""
        self._closed = reason

    async def intercept_service(
        self,
        continuation: Callable[[Any], Awaitable[Any]],
        handler_call_details: Any,
    ) -> Any:
        """Part of gRPC's interface: wraps the handler of one call."""
        handler = await continuation(handler_call_details)
        if handler is None or handler_call_details.method.startswith(_ALWAYS_OPEN):
            return handler
        # Handlers get raw messages: gRPC itself would log garbage with a traceback.
        read: Callable[[Callable[[bytes], Any], Any], Any] = _read
        if handler.request_streaming:
            method, wrap = handler.stream_unary, grpc.stream_unary_rpc_method_handler
            read = _read_all
        elif handler.response_streaming:
            method, wrap = handler.unary_stream, grpc.unary_stream_rpc_method_handler
        else:
            method, wrap = handler.unary_unary, grpc.unary_unary_rpc_method_handler
        return wrap(
            self._guarded(method, partial(read, handler.request_deserializer)),
            response_serializer=handler.response_serializer,
        )

    def _guarded(
        self, method: Callable[[Any, Any], Awaitable[Any]], request_of: Callable[[Any], Any]
    ) -> Callable[[Any, Any], Awaitable[Any]]:
        async def call(sent: Any, context: Any) -> Any:
            context.set_trailing_metadata(self._trailing)
            try:
                if self._closed is not None:
                    raise Draining(self._closed)
                return await method(request_of(sent), context)
            except LoraxError as error:
                code, text, trailing = status_of(error)
                if isinstance(error, EngineFailed) and self._closed is not None:
                    code = grpc.StatusCode.UNAVAILABLE
            except Exception:
                log.exception("a call failed")
                code, text, trailing = grpc.StatusCode.INTERNAL, "internal error", ()
            self._on_error(code.name)
            await context.abort(code, text, (*self._trailing, *trailing))

        return call


def _read(deserialize: Callable[[bytes], Any], message: bytes) -> Any:
    try:
        return deserialize(message)
    except DecodeError as error:
        raise InvalidRequest("the message is no valid protobuf") from error


async def _read_all(
    deserialize: Callable[[bytes], Any], messages: AsyncIterator[bytes]
) -> AsyncIterator[Any]:
    async for message in messages:
        yield _read(deserialize, message)
