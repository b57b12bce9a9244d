"""lorax's engine as a worker, without gRPC as the peers are."""

from __future__ import annotations

import asyncio
from pathlib import Path

from benchmarks.measure import drive
from benchmarks.ours import OfflineEngine
from benchmarks.peers.worker import Requests, serve
from benchmarks.workloads import Request
from lorax_serve.config import EngineConfig


class Ours:
    """See ``worker.Backend``."""

    packages = ("lorax-serve", "torch")

    def __init__(self) -> None:
        self._loop = asyncio.Runner()
        self._engine: OfflineEngine | None = None

    def prepare(self, model: str, adapters: dict[str, str], batch: int, dtype: str) -> None:
        self.close()
        config = EngineConfig(model=model, dtype=dtype, max_batch_size=max(32, batch))
        paths = {name: Path(path) for name, path in adapters.items()}
        self._engine = self._loop.run(OfflineEngine.start(config, paths))

    def run(self, requests: Requests) -> list[int]:
        assert self._engine is not None
        work = [Request(**{**each, "prompt": tuple(each["prompt"])}) for each in requests]
        run = self._loop.run(drive(self._engine, work))
        return [len(trace.tokens) for trace in run.traces]

    def close(self) -> None:
        if self._engine is not None:
            self._loop.run(self._engine.close())
            self._engine = None


if __name__ == "__main__":
    serve(Ours())
