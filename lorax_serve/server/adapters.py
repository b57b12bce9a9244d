"""``lorax.v1.AdapterService``: the registry over gRPC."""

from __future__ import annotations

from typing import Any

from lorax_serve.frontend.registry import AdapterRegistry
from lorax_serve.pb.lorax.v1 import adapter_pb2 as pb
from lorax_serve.pb.lorax.v1 import adapter_pb2_grpc
from lorax_serve.server import convert
from lorax_serve.server.report import report_message

__all__ = ["AdapterServicer"]


class AdapterServicer(adapter_pb2_grpc.AdapterServiceServicer):  # type: ignore[misc]
    """Administration of adapters over gRPC.

    Attributes:
        registry: set by the server before it lets calls through.
    """

    registry: AdapterRegistry

    async def LoadAdapter(self, request: Any, context: Any) -> Any:
        """Load or replace; answer with what the name means now."""
        path = request.path if request.HasField("path") else None
        weight = request.weight if request.HasField("weight") else None
        adapter = await self.registry.load(request.adapter_id, path, weight)
        return pb.LoadAdapterResponse(
            adapter=convert.adapter_message(adapter), report=report_message(adapter.info.report)
        )

    async def InspectAdapter(self, request: Any, context: Any) -> Any:
        """Say what a load would find."""
        path = request.path if request.HasField("path") else None
        report = await self.registry.inspect(request.adapter_id, path)
        return pb.InspectAdapterResponse(report=report_message(report))

    async def UnloadAdapter(self, request: Any, context: Any) -> Any:
        """Take the name away, wait for its last request, answer with the bytes freed."""
        return pb.UnloadAdapterResponse(freed_bytes=await self.registry.unload(request.adapter_id))

    async def RollbackAdapter(self, request: Any, context: Any) -> Any:
        """Make the name mean an earlier version again; answer with that."""
        digest = request.digest if request.HasField("digest") else None
        adapter = await self.registry.roll_back(request.adapter_id, digest)
        return pb.RollbackAdapterResponse(adapter=convert.adapter_message(adapter))

    async def ListAdapters(self, request: Any, context: Any) -> Any:
        """All versions in memory."""
        adapters = [convert.adapter_message(adapter) for adapter in self.registry.adapters()]
        return pb.ListAdaptersResponse(adapters=adapters)
