"""``lorax.v1.AdapterService``: the registry over gRPC."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any

from lorax_serve.errors import AdapterConflict, InvalidRequest, LoraxError
from lorax_serve.pb.lorax.v1 import adapter_pb2 as pb
from lorax_serve.pb.lorax.v1 import adapter_pb2_grpc
from lorax_serve.registry.events import AdapterWatchers
from lorax_serve.registry.registry import AdapterRegistry
from lorax_serve.registry.upload import Upload
from lorax_serve.server import convert
from lorax_serve.server.report import report_message

__all__ = ["AdapterServicer"]


class AdapterServicer(adapter_pb2_grpc.AdapterServiceServicer):  # type: ignore[misc]
    """Administration of adapters over gRPC.

    Attributes:
        registry: set by the server before it lets calls through.
        manifest: what decides what is served, instead of calls; None: calls do.
        failures: what should be served and could not be loaded, by name.
        watchers: the calls that watch; a listener of the registry.
    """

    registry: AdapterRegistry

    def __init__(self, manifest: str | None = None) -> None:
        self.manifest = manifest
        self.failures: Mapping[str, LoraxError] = {}
        self.watchers = AdapterWatchers()

    async def LoadAdapter(self, request: Any, context: Any) -> Any:
        """Load or replace; answer with what the name means now."""
        self._check_by_hand()
        adapter = await self.registry.load(
            request.adapter_id,
            _optional(request, "path"),
            _optional(request, "weight"),
            _optional(request, "pinned"),
        )
        return pb.LoadAdapterResponse(
            adapter=convert.adapter_message(adapter), report=report_message(adapter.info.report)
        )

    async def UploadAdapter(self, requests: AsyncIterator[Any], context: Any) -> Any:
        """Take the files, and load them as LoadAdapter does."""
        self._check_by_hand()
        messages = aiter(requests)
        first = await anext(messages, None)
        if first is None or first.WhichOneof("part") != "header":
            raise InvalidRequest("header is missing: it must be in the first message")
        header = first.header
        upload = Upload(
            header.digest, header.config_bytes, header.weights_bytes, _data_of(messages)
        )
        adapter = await self.registry.upload(
            header.adapter_id, upload, _optional(header, "weight"), _optional(header, "pinned")
        )
        return pb.UploadAdapterResponse(
            adapter=convert.adapter_message(adapter), report=report_message(adapter.info.report)
        )

    async def UpdateAdapter(self, request: Any, context: Any) -> Any:
        """Change the weight or the pin."""
        self._check_by_hand()
        adapter = await self.registry.update(
            request.adapter_id, _optional(request, "weight"), _optional(request, "pinned")
        )
        return pb.UpdateAdapterResponse(adapter=convert.adapter_message(adapter))

    async def InspectAdapter(self, request: Any, context: Any) -> Any:
        """Say what a load would find."""
        report = await self.registry.inspect(request.adapter_id, _optional(request, "path"))
        return pb.InspectAdapterResponse(report=report_message(report))

    async def UnloadAdapter(self, request: Any, context: Any) -> Any:
        """Take the name away, wait for its last request, answer with the bytes freed."""
        self._check_by_hand()
        freed = await self.registry.unload(request.adapter_id)
        return pb.UnloadAdapterResponse(
            freed_bytes=freed.host + freed.device,
            host_bytes=freed.host,
            device_bytes=freed.device,
            disk_bytes=freed.disk,
        )

    async def RollbackAdapter(self, request: Any, context: Any) -> Any:
        """Make the name mean an earlier version again; answer with that."""
        self._check_by_hand()
        digest = _optional(request, "digest")
        adapter = await self.registry.roll_back(request.adapter_id, digest)
        return pb.RollbackAdapterResponse(adapter=convert.adapter_message(adapter))

    async def ListAdapters(self, request: Any, context: Any) -> Any:
        """All versions in memory, and what should be there and is not."""
        tiers = await self.registry.tiers()
        return pb.ListAdaptersResponse(
            adapters=[
                convert.adapter_message(adapter, tiers.get(adapter.key))
                for adapter in self.registry.adapters()
            ],
            failed=[convert.failure_message(*each) for each in sorted(self.failures.items())],
        )

    async def WatchAdapters(self, request: Any, context: Any) -> None:
        """Send what is there, then every change."""
        events = self.watchers.watch(self.registry.adapters(), _optional(request, "adapter_id"))
        async for event in events:
            await context.write(convert.event_message(event))

    def _check_by_hand(self) -> None:
        if self.manifest is not None:
            raise AdapterConflict(
                f"this server serves what --manifest {self.manifest} says: change it there, for "
                "all replicas"
            )


async def _data_of(messages: AsyncIterator[Any]) -> AsyncIterator[bytes]:
    async for message in messages:
        if message.WhichOneof("part") != "data":
            raise InvalidRequest("data is missing: messages after the header have data only")
        yield message.data


def _optional(message: Any, field: str) -> Any:
    """The field's value, None if it is absent."""
    return getattr(message, field) if message.HasField(field) else None
