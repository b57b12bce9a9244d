"""The synchronous client."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from types import TracebackType
from typing import Any, Unpack

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from lorax_serve.client import requests
from lorax_serve.client.failures import error_of
from lorax_serve.client.requests import Adapters, GenerateOptions, Prompt
from lorax_serve.client.results import (
    Adapter,
    AdapterEvent,
    FailedAdapter,
    Generation,
    Model,
    Tokens,
    load_report,
)
from lorax_serve.client.tls import Tls
from lorax_serve.client.upload import upload_messages
from lorax_serve.core import Freed
from lorax_serve.pb.lorax.v1 import (
    adapter_pb2,
    adapter_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
)
from lorax_serve.report import LoadReport

__all__ = ["Client"]


class Client:
    """A connection to a server; threads may share it. Close it, or use it in ``with``.

    Args:
        address: ``host:port`` of the server's gRPC.
        tls: how to speak TLS, as gateways do; None speaks plain HTTP/2, as the server itself does.
        timeout: seconds that a call may take, None for ever; each call may say otherwise.
        retries: how often a call is made again that met an unavailable server, 0 to 4.

    Raises:
        InvalidRequest: ``retries`` is out of range, or a file of ``tls`` cannot be used.

    Every call raises:
        InvalidRequest, AdapterRejected, AdapterNotFound, AdapterConflict, SourceFailed,
        Overloaded, EngineFailed: the server's own errors, with its message.
        Unavailable, TimedOut, ServerError: the others.
    """

    def __init__(
        self,
        address: str = "localhost:50051",
        *,
        tls: Tls | None = None,
        timeout: float | None = None,
        retries: int = 3,
    ) -> None:
        self._address = address
        self._timeout = timeout
        options = requests.channel_options(retries)
        if tls is None:
            self._channel = grpc.insecure_channel(address, options)
        else:
            self._channel = grpc.secure_channel(address, tls.credentials(), options)
        self._generation = generation_pb2_grpc.GenerationServiceStub(self._channel)
        self._adapters = adapter_pb2_grpc.AdapterServiceStub(self._channel)
        self._health = health_pb2_grpc.HealthStub(self._channel)

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Cancel what runs and close the connection."""
        self._channel.close()

    def generate(
        self,
        prompt: Prompt,
        *,
        adapter: Adapters = None,
        timeout: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Generation:
        """Generate text and wait for all of it.

        Args:
            prompt: text, token ids, or chat messages.
            adapter: an adapter's name; None is the base model. ``{name: scale, ...}`` adds up what
                several adapters, or one with a scale, do to the base.
            timeout: seconds that this call may take.
            options: see ``GenerateOptions``.
        """
        fields = requests.generate_fields(prompt, adapter, options)
        request = generation_pb2.GenerateRequest(**fields)
        return Generation.of(self._call(self._generation.Generate, request, timeout, adapter))

    def stream(
        self,
        prompt: Prompt,
        *,
        adapter: Adapters = None,
        timeout: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Generator[Generation, None, None]:
        """Generate text and yield it as it comes; arguments as for ``generate``.

        Leaving the loop early, or closing the iterator, cancels the request on the server.
        """
        fields = requests.generate_fields(prompt, adapter, options)
        call = self._generation.GenerateStream(
            generation_pb2.GenerateStreamRequest(**fields),
            timeout=self._timeout if timeout is None else timeout,
            metadata=requests.metadata(adapter),
        )
        first: Generation | None = None
        try:
            for message in call:
                chunk = Generation.of(message, first)
                first = first or chunk
                yield chunk
        except grpc.RpcError as error:
            raise error_of(error, self._address) from None
        finally:
            call.cancel()

    def tokenize(self, prompt: Prompt, *, timeout: float | None = None) -> Tokens:
        """The tokens that ``generate`` would see."""
        request = generation_pb2.TokenizeRequest(**requests.prompt(prompt))
        return Tokens.of(self._call(self._generation.Tokenize, request, timeout))

    def model_info(self, *, timeout: float | None = None) -> Model:
        """The base model."""
        request = generation_pb2.ModelInfoRequest()
        return Model.of(self._call(self._generation.ModelInfo, request, timeout))

    def serving(self, *, timeout: float | None = None) -> bool:
        """Whether the server takes requests: not while it starts or drains."""
        answer = self._call(self._health.Check, health_pb2.HealthCheckRequest(), timeout)
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    def load_adapter(
        self,
        name: str,
        path: str | None = None,
        *,
        weight: int | None = None,
        pinned: bool | None = None,
        timeout: float | None = None,
    ) -> Adapter:
        """Load an adapter, or replace what ``name`` means for new requests.

        Args:
            name: what requests will call it.
            path: its directory, inside the server's adapter directory; default ``name``.
            weight: its share of a busy server, in [1, 100]; default: what the name had, else 1.
            pinned: whether its weights never leave host memory; default: as the name was, else no.
            timeout: seconds that this call may take; the load goes on.
        """
        request = adapter_pb2.LoadAdapterRequest(
            adapter_id=name, path=path, weight=weight, pinned=pinned
        )
        return Adapter.loaded(self._call(self._adapters.LoadAdapter, request, timeout))

    def upload_adapter(
        self,
        name: str,
        directory: str | os.PathLike[str],
        *,
        weight: int | None = None,
        pinned: bool | None = None,
        timeout: float | None = None,
    ) -> Adapter:
        """Send an adapter's files, and load them; the server keeps them (``--state``).

        Args:
            name: what requests will call it.
            directory: here, with ``adapter_config.json`` and ``adapter_model.safetensors``.
            weight: as for ``load_adapter``.
            pinned: as for ``load_adapter``.
            timeout: seconds that this call may take.

        Raises:
            InvalidRequest: a file cannot be read.
        """
        messages = upload_messages(name, directory, weight, pinned)
        return Adapter.loaded(self._call(self._adapters.UploadAdapter, messages, timeout))

    def update_adapter(
        self,
        name: str,
        *,
        weight: int | None = None,
        pinned: bool | None = None,
        timeout: float | None = None,
    ) -> Adapter:
        """Change the weight or the pin of what a name means; None leaves it as it is."""
        request = adapter_pb2.UpdateAdapterRequest(adapter_id=name, weight=weight, pinned=pinned)
        answer = self._call(self._adapters.UpdateAdapter, request, timeout)
        return Adapter.of(answer.adapter)

    def inspect_adapter(
        self, name: str, path: str | None = None, *, timeout: float | None = None
    ) -> LoadReport:
        """What loading an adapter would find, and whether it would be refused; nothing is loaded.

        Args:
            name: what requests would call it.
            path: its directory, inside the server's adapter directory; default ``name``.
            timeout: seconds that this call may take.
        """
        request = adapter_pb2.InspectAdapterRequest(adapter_id=name, path=path)
        answer = self._call(self._adapters.InspectAdapter, request, timeout)
        return load_report(answer.report)

    def unload_adapter(self, name: str, *, timeout: float | None = None) -> Freed:
        """Take an adapter away, wait for its last request; returns the bytes that were freed."""
        request = adapter_pb2.UnloadAdapterRequest(adapter_id=name)
        answer = self._call(self._adapters.UnloadAdapter, request, timeout)
        return Freed(answer.host_bytes, answer.device_bytes, answer.disk_bytes)

    def roll_back_adapter(
        self, name: str, digest: str | None = None, *, timeout: float | None = None
    ) -> Adapter:
        """Make a name mean an earlier version again: the last one, or that with this digest."""
        request = adapter_pb2.RollbackAdapterRequest(adapter_id=name, digest=digest)
        return Adapter.of(self._call(self._adapters.RollbackAdapter, request, timeout).adapter)

    def list_adapters(self, *, timeout: float | None = None) -> list[Adapter]:
        """All versions in memory by name, those that drain included."""
        request = adapter_pb2.ListAdaptersRequest()
        answer = self._call(self._adapters.ListAdapters, request, timeout)
        return [Adapter.of(each) for each in answer.adapters]

    def list_failed_adapters(self, *, timeout: float | None = None) -> list[FailedAdapter]:
        """What the server should serve by its source or manifest, and could not load."""
        request = adapter_pb2.ListAdaptersRequest()
        answer = self._call(self._adapters.ListAdapters, request, timeout)
        return [FailedAdapter.of(each) for each in answer.failed]

    def watch_adapters(
        self, name: str | None = None, *, timeout: float | None = None
    ) -> Generator[AdapterEvent, None, None]:
        """What is loaded, then every change as it happens, of one name or of all.

        Leaving the loop, or closing the iterator, ends the watch.
        """
        call = self._adapters.WatchAdapters(
            adapter_pb2.WatchAdaptersRequest(adapter_id=name), timeout=timeout
        )
        try:
            for message in call:
                yield AdapterEvent.of(message)
        except grpc.RpcError as error:
            raise error_of(error, self._address) from None
        finally:
            call.cancel()

    def _call(
        self,
        method: Callable[..., Any],
        request: Any,
        timeout: float | None,
        adapter: Adapters = None,
    ) -> Any:
        try:
            return method(
                request,
                timeout=self._timeout if timeout is None else timeout,
                metadata=requests.metadata(adapter),
            )
        except grpc.RpcError as error:
            raise error_of(error, self._address) from None
