"""Loaded adapters in host memory, and the thread that reads them while the steps go on."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch

from lorax_serve import adapter as leaf
from lorax_serve.adapter import LinearShape, LoRAWeights
from lorax_serve.core import AdapterInfo
from lorax_serve.engine.messages import LoadAdapter
from lorax_serve.errors import AdapterRejected, LoraxError, Overloaded, RejectReason
from lorax_serve.model.multi_lora import AdapterSites

__all__ = ["AdapterLoader", "AdapterStore", "LoadFinished"]


@dataclass(frozen=True, slots=True)
class LoadFinished:
    """What the loading thread hands to the engine's thread: an adapter, or why there is none."""

    command: LoadAdapter
    info: AdapterInfo | None = None
    sites: AdapterSites | None = None
    error: LoraxError | None = None


class AdapterLoader:
    """Reads, checks and folds adapters on a thread of its own, one after the other.

    Args:
        modules: every linear module of the base model by path.
        fold: brings weights into the batch ops' form.
        finished: called on the loading thread with each result.
    """

    def __init__(
        self,
        modules: dict[str, LinearShape],
        fold: Callable[[LoRAWeights], AdapterSites],
        finished: Callable[[LoadFinished], None],
    ) -> None:
        self._modules = modules
        self._fold = fold
        self._finished = finished
        self._commands: queue.SimpleQueue[LoadAdapter] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="adapter-loader", daemon=True).start()

    def request(self, command: LoadAdapter) -> None:
        """Queue a load; returns at once."""
        self._commands.put(command)

    def _run(self) -> None:
        # One core is enough for checks on small tensors; the steps need the others. The setting is
        # this thread's own, since the engine's thread has run (warm_up) and keeps its number.
        torch.set_num_threads(1)
        while True:
            command = self._commands.get()
            self._finished(self._load(command))

    def _load(self, command: LoadAdapter) -> LoadFinished:
        try:
            files = leaf.read(command.path)
            weights = leaf.match_weights(files.config, files.tensors, self._modules)
            sites = self._fold(weights)
        except LoraxError as error:
            return LoadFinished(command, error=error)
        except Exception as error:  # a defect of ours, but it must not end the thread
            reason = AdapterRejected(
                RejectReason.BAD_FILE, f"{command.path}: {type(error).__name__}: {error}"
            )
            return LoadFinished(command, error=reason)
        info = AdapterInfo(
            digest=files.digest,
            max_rank=weights.max_rank,
            num_modules=len(weights.pairs),
            nbytes=sum(site.nbytes for site in sites if site is not None),
        )
        return LoadFinished(command, info, sites)


class AdapterStore:
    """Host memory: adapters by version, within a budget of bytes."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._adapters: dict[int, tuple[AdapterInfo, AdapterSites]] = {}
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._adapters)

    def add(self, version: int, info: AdapterInfo, sites: AdapterSites) -> None:
        """Keep an adapter.

        Raises:
            Overloaded: it does not fit into the budget.
        """
        if self.nbytes + info.nbytes > self._max_bytes:
            raise Overloaded(
                f"the adapter takes {info.nbytes} bytes, but {self.nbytes} of the "
                f"{self._max_bytes} bytes for adapters are taken (--max-adapter-bytes); unload one"
            )
        self._adapters[version] = info, sites
        self.nbytes += info.nbytes

    def get(self, version: int) -> AdapterSites:
        """The adapter's weights."""
        return self._adapters[version][1]

    def __contains__(self, version: int) -> bool:
        return version in self._adapters

    def drop(self, version: int) -> int:
        """Free an adapter; returns its bytes."""
        info, _ = self._adapters.pop(version)
        self.nbytes -= info.nbytes
        return info.nbytes

    def problems(self) -> list[str]:
        """What is wrong in the accounting."""
        total = sum(info.nbytes for info, _ in self._adapters.values())
        return [] if total == self.nbytes else [f"adapter bytes are {self.nbytes}, not {total}"]
