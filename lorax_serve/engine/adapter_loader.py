"""The thread that reads, checks and folds adapters while the steps go on."""

from __future__ import annotations

import hashlib
import itertools
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lorax_serve import adapter as leaf
from lorax_serve.adapter import LoRAWeights, ModuleShape
from lorax_serve.adapter.files import AdapterFiles
from lorax_serve.adapter.probe import Probe
from lorax_serve.core import AdapterInfo, Part
from lorax_serve.errors import AdapterRejected, EngineFailed, LoraxError, RejectReason
from lorax_serve.model.runner import HostAdapter

__all__ = ["AdapterLoader", "Load", "LoadFinished"]


# Loads for waiting requests that may pass one for the first time.
_OVERTAKERS = 4


@dataclass(frozen=True, slots=True)
class Load:
    """An adapter directory to read, or several to compose.

    Attributes:
        call_id: of the command to answer; None where waiting requests want it again.
        digest: what its files must still be; None the first time.
        dry: whether only the report is wanted.
        parts: what to compose; then ``path`` is only a name for it, and ``digest`` of all parts.
    """

    version: int
    path: str
    call_id: int | None = None
    digest: str | None = None
    dry: bool = False
    parts: tuple[Part, ...] = ()

    @property
    def again(self) -> bool:
        """Whether it was loaded before, and has passed all that is only looked at once."""
        return self.call_id is None


@dataclass(frozen=True, slots=True)
class LoadFinished:
    """What the loading thread hands to the engine's thread: an adapter, or why there is none.

    Attributes:
        probe: what the adapter still has to answer before it is used; None if there is nothing.
        fingerprint: of the base's weights; empty without a probe.
    """

    load: Load
    info: AdapterInfo | None = None
    weights: HostAdapter | None = None
    error: LoraxError | None = None
    seconds: float = 0.0
    probe: Probe | None = None
    fingerprint: str = ""


class AdapterLoader:
    """Reads adapters on a thread of its own, one after the other.

    What requests wait for may overtake what is loaded for the first time, but only so often that
    this is never put off for ever. Both take the same way, with all checks, so an adapter that is
    read again has the same bits.

    Args:
        modules: every linear module of the base model by path.
        fold: brings weights into the form that the device slots take.
        without_copies: takes out what an adapter's file has of the base's own weights.
        finished: called on the loading thread with each result.
        probe: what becomes of golden probes, see ``EngineConfig.probe``.
        fingerprint: of the base's weights; asked for on the loading thread, by the first probe.
    """

    def __init__(
        self,
        modules: dict[str, ModuleShape],
        fold: Callable[[LoRAWeights], HostAdapter],
        without_copies: Callable[[LoRAWeights], LoRAWeights],
        finished: Callable[[LoadFinished], None],
        *,
        probe: str,
        fingerprint: Callable[[], str],
    ) -> None:
        self._modules = modules
        self._fold = fold
        self._without_copies = without_copies
        self._finished = finished
        self._policy = probe
        self._fingerprint = fingerprint
        self._order = itertools.count()
        self._loads: queue.PriorityQueue[tuple[int, bool, Load]] = queue.PriorityQueue()
        threading.Thread(target=self._run, name="adapter-loader", daemon=True).start()

    def request(self, load: Load) -> None:
        """Queue a load; returns at once."""
        first = load.digest is None
        place = next(self._order) + (_OVERTAKERS if first else 0)
        self._loads.put((place, first, load))

    def _run(self) -> None:
        # One core is enough for checks on small tensors; the steps need the others. The setting is
        # this thread's own, since the engine's thread has run (warm_up) and keeps its number.
        torch.set_num_threads(1)
        while True:
            _, _, load = self._loads.get()
            self._finished(self._load(load))

    def _load(self, load: Load) -> LoadFinished:
        if load.parts:
            return self._compose(load)
        started = time.perf_counter()
        fingerprint = ""
        try:
            files = leaf.read(load.path)
            if load.digest not in (None, files.digest):
                raise _changed(load.path, files.digest, str(load.digest))
            probe, flaw = (None, "") if load.again else self._probe(files)
            refuses = self._policy == "refuse" and probe is not None
            match = leaf.match_tensors(
                files.config, files.tensors, self._modules, probed=load.again or refuses
            )
            match.warnings += [flaw] if flaw else []
            report = leaf.report_of(load.path, files, match, self._modules, probe)
            if match.weights is None:
                first = match.problems[0]
                raise AdapterRejected(first.reason, str(first), report)
            folded = self._fold(match.weights)
            if self._policy == "off":
                probe = None
            if probe is not None:
                fingerprint = self._fingerprint()
        except AdapterRejected as error:
            error.report = error.report or leaf.refusal(error, load.path)
            return LoadFinished(load, error=error)
        except LoraxError as error:
            return LoadFinished(load, error=error)
        except Exception as error:  # a defect of ours, but it must not end the thread
            reason = AdapterRejected(
                RejectReason.BAD_FILE, f"{load.path}: {type(error).__name__}: {error}"
            )
            return LoadFinished(load, error=reason)
        info = AdapterInfo(
            digest=files.digest,
            max_rank=match.weights.max_rank,
            num_modules=match.weights.num_modules,
            nbytes=folded.nbytes,
            invocation_tokens=match.weights.invocation_tokens,
            report=replace(report, host_bytes=folded.nbytes),
        )
        seconds = time.perf_counter() - started
        return LoadFinished(
            load, info, folded, seconds=seconds, probe=probe, fingerprint=fingerprint
        )

    def _compose(self, load: Load) -> LoadFinished:
        """Read all parts, which were loaded before, and fold them as one."""
        started = time.perf_counter()
        try:
            read = [(part.name, self._part(part), part.scale) for part in load.parts]
            composed = leaf.compose(read)
            folded = self._fold(composed)
        except AdapterRejected as error:
            added = " + ".join(f"{part.scale:g} x {part.name}" for part in load.parts)
            refusal = AdapterRejected(error.reason, f"{added}: {error}")
            return LoadFinished(load, error=refusal)
        except LoraxError as error:
            return LoadFinished(load, error=error)
        except Exception as error:  # a defect of ours, but it must not end the thread
            reason = AdapterRejected(
                RejectReason.BAD_FILE, f"{load.path}: {type(error).__name__}: {error}"
            )
            return LoadFinished(load, error=reason)
        info = AdapterInfo(
            digest=digest_of_parts(load.parts),
            max_rank=composed.max_rank,
            num_modules=composed.num_modules,
            nbytes=folded.nbytes,
        )
        return LoadFinished(load, info, folded, seconds=time.perf_counter() - started)

    def _part(self, part: Part) -> LoRAWeights:
        """Of an adapter that was loaded before: what it changes in the base.

        Raises:
            EngineFailed: its files have gone or changed.
        """
        try:
            files = leaf.read(part.path)
            if files.digest != part.digest:
                raise _changed(part.path, files.digest, part.digest)
            weights = leaf.match_weights(files.config, files.tensors, self._modules, probed=True)
        except AdapterRejected as error:
            raise EngineFailed(
                f"adapter {part.name!r} cannot be read again from disk: {error}; restore its "
                "files, or load it again to serve the new ones"
            ) from error
        return self._without_copies(weights)

    def _probe(self, files: AdapterFiles) -> tuple[Probe | None, str]:
        """The adapter's probe, and what is wrong with one that cannot be read.

        Raises:
            AdapterRejected: it cannot be read, and probes refuse adapters.
        """
        try:
            return Probe.from_metadata(files.metadata), ""
        except AdapterRejected as error:
            if self._policy == "refuse":
                raise
            return None, str(error)


def digest_of_parts(parts: Sequence[Part]) -> str:
    """What the keys and values of a composition depend on."""
    text = "\n".join(f"{part.digest} {part.scale!r}" for part in parts)
    return hashlib.sha256(f"composition\n{text}".encode()).hexdigest()


def _changed(path: str, found: str, wanted: str) -> AdapterRejected:
    return AdapterRejected(
        RejectReason.BAD_FILE,
        f"the files in {Path(path).name}/ are others than those that were loaded "
        f"(digest {found[:12]}, not {wanted[:12]})",
    )
