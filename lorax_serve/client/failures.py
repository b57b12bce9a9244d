"""From gRPC statuses back to errors: the inverse of ``lorax_serve.server.status``."""

from __future__ import annotations

from typing import Any

import grpc
from google.protobuf.message import DecodeError

from lorax_serve.client.results import load_report
from lorax_serve.errors import (
    AdapterConflict,
    AdapterNotFound,
    AdapterRejected,
    EngineFailed,
    InvalidRequest,
    LoraxError,
    Overloaded,
    RejectReason,
    SourceFailed,
    SourceReason,
)
from lorax_serve.pb.lorax.v1 import adapter_pb2
from lorax_serve.report import LoadReport
from lorax_serve.routing import REPLICA_METADATA

__all__ = ["ServerError", "TimedOut", "Unavailable", "error_of"]

_RESET = "RST_STREAM"
# What gRPC says of a connection that could not be made, and what to make of that.
_CONNECTING = {
    "CERTIFICATE_VERIFY_FAILED": "the server's certificate is not trusted",
    "Hostname Verification": "the server's certificate is for another name",
    "WRONG_VERSION_NUMBER": "the server does not speak TLS",
    "TSI_DATA_CORRUPTED": "the server asks for a client certificate, or refuses the one it got",
    "Handshake read failed": "the server ended the connection in the middle of TLS's handshake",
    "Socket closed": "the server may ask for TLS, or for a client certificate",
    "Connection reset": "the server may ask for TLS, or for a client certificate",
}
_REJECT_REASON = "lorax-reject-reason"
_LOAD_REPORT = "lorax-load-report-bin"
_SOURCE_REASON = "lorax-source-reason"

_ERRORS: dict[grpc.StatusCode, type[LoraxError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.NOT_FOUND: AdapterNotFound,
    grpc.StatusCode.FAILED_PRECONDITION: AdapterConflict,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.INTERNAL: EngineFailed,
}


class ServerError(LoraxError):
    """A call failed with a status that stands for none of the server's own errors."""


class Unavailable(ServerError):
    """The server cannot be reached, TLS with it fails, it is starting or shutting down, or has lost
    its engine; or it, or the proxy before it, vanished during the call."""


class TimedOut(ServerError):
    """The call took longer than its timeout; the server has dropped it."""


def error_of(call: Any, address: str) -> LoraxError:
    """The error that a failed call stands for.

    Args:
        call: a ``grpc.RpcError`` of either kind of channel.
        address: of the server, for the message.
    """
    code, message = call.code(), call.details() or ""
    trailing = dict(call.trailing_metadata() or ())
    if _REJECT_REASON in trailing:
        try:
            reason = RejectReason(trailing[_REJECT_REASON])
            return AdapterRejected(reason, message, _report(trailing.get(_LOAD_REPORT)))
        except ValueError:  # a newer server's reason
            return InvalidRequest(message)
    # A newer server's reason is left to the code, which says as much as is known here.
    if trailing.get(_SOURCE_REASON) in list(SourceReason):
        return SourceFailed(SourceReason(trailing[_SOURCE_REASON]), message)
    # A proxy cannot end a stream that has begun with a status: when its server has vanished, it
    # resets the stream, which gRPC calls INTERNAL. What a server says itself comes with its name.
    reset = _RESET in message and REPLICA_METADATA not in trailing
    if code in _ERRORS and not reset:
        return _ERRORS[code](message)
    if code is grpc.StatusCode.UNAVAILABLE or reset:
        return Unavailable(f"{address}: {_explained(message)}")
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return TimedOut(f"{address} did not answer in time; raise the timeout")
    return ServerError(f"{address}: {code.name}: {message}")


def _explained(message: str) -> str:
    if "failed to connect" in message:
        for sign, meaning in _CONNECTING.items():
            if sign in message:
                return f"{meaning}: {message}"
    return message


def _report(raw: bytes | None) -> LoadReport | None:
    if raw is None:
        return None
    try:
        return load_report(adapter_pb2.LoadReport.FromString(raw))
    except DecodeError:  # a proxy has cut it; the error says enough without
        return None
