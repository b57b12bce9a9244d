"""The adapters of an engine: on disk, in host memory, in device slots, and the ways between."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace

from lorax_serve.core import AdapterInfo, AdapterStats, AdapterTier, Freed
from lorax_serve.engine.adapter_loader import Load, LoadFinished
from lorax_serve.engine.adapter_slots import AdapterSlots
from lorax_serve.engine.host_cache import HostCache
from lorax_serve.errors import EngineFailed, LoraxError, Overloaded
from lorax_serve.model.runner import HostAdapter

__all__ = ["AdapterStore"]

log = logging.getLogger(__name__)

_LONGEST_PAUSE = 16
"""Steps until a pinned adapter is read again that could not be read."""


class AdapterStore:
    """Adapters by version, in three tiers.

    Every loaded adapter stays known with its directory and digest. Its folded weights are in host
    memory while the budget lets them; else they are read again when a request wants them. On a CPU
    the slots hold the host's own tensors: what leaves host memory leaves its slot too, and what is
    pinned stays. On another device the slots have copies, and the two tiers know nothing of each
    other.

    Args:
        read: starts reading one in the background; the result comes back through ``arrived``.
        host: decides what is in host memory.
        slots: decides what is on the device.
        clear_slot: frees the device memory of a slot.
        shared: the device's memory is the host's.
    """

    def __init__(
        self,
        read: Callable[[Load], None],
        host: HostCache,
        slots: AdapterSlots,
        clear_slot: Callable[[int], None],
        *,
        shared: bool,
    ) -> None:
        self._read = read
        self._host = host
        self._slots = slots
        self._clear_slot = clear_slot
        self._shared = shared
        self._known: dict[int, tuple[AdapterInfo, Load]] = {}
        self._weights: dict[int, HostAdapter] = {}
        self._late: set[int] = set()
        self._settled = True
        self._failures: Counter[int] = Counter()
        """Of reading each adapter, since it was last read."""
        self._pause = 0
        self._reads = self._late_reads = 0
        self._read_seconds = 0.0

    def __contains__(self, version: int) -> bool:
        return version in self._known

    @property
    def stats(self) -> AdapterStats:
        """Gauges and counts."""
        host, slots = self._host, self._slots
        return AdapterStats(
            known=len(self._known),
            host=len(host),
            device=len(slots),
            host_bytes=host.nbytes,
            host_limit=host.max_bytes,
            device_bytes=0 if self._shared else slots.nbytes,
            device_limit=slots.max_bytes,
            host_evictions=host.evictions,
            device_evictions=slots.evictions,
            reads=self._reads,
            read_seconds=self._read_seconds,
            late_reads=self._late_reads,
        )

    @property
    def reading(self) -> int:
        """Number of adapters that are being read again."""
        return self._host.reading

    def info(self, version: int) -> AdapterInfo:
        """What is known of the adapter, wherever it is."""
        return self._known[version][0]

    def get(self, version: int) -> HostAdapter:
        """The weights of an adapter in host memory."""
        return self._weights[version]

    def add(self, loaded: LoadFinished) -> AdapterInfo:
        """Take an adapter that was loaded for the first time.

        Raises:
            Overloaded: it alone does not fit into a budget.
        """
        version, info, weights = loaded.load.version, loaded.info, loaded.weights
        assert info is not None
        assert weights is not None
        room = self._host.max_bytes - self._host.pinned_bytes
        _check_size(loaded, room, "host memory", "max-adapter-bytes")
        if (on_device := self._slots.max_bytes) is not None:
            _check_size(loaded, on_device, "device memory", "max-device-adapter-bytes")
        self._known[version] = info, loaded.load
        self._evict(self._host.add(version, info.nbytes, self._in_use()))
        if version in self._host:
            self._weights[version] = weights
        return info

    def pin(self, version: int, instead_of: int | None) -> None:
        """Keep an adapter in host memory; if it is not there, it is read.

        Raises:
            Overloaded: it would leave others no room.
        """
        excess = self._host.pin(version, instead_of)
        if excess is not None:
            raise Overloaded(
                f"the adapter cannot be pinned: the pinned ones and the largest other would take "
                f"{excess} bytes more than the {self._host.max_bytes} of host memory for adapters "
                "(--max-adapter-bytes); raise that limit, or unpin others"
            )
        self._settled = False

    def unpin(self, version: int) -> None:
        """Let an adapter leave host memory again."""
        self._host.unpin(version)

    def tiers(self) -> dict[int, AdapterTier]:
        """Where each adapter is."""
        return {
            version: AdapterTier.DEVICE
            if version in self._slots
            else AdapterTier.HOST
            if version in self._host
            else AdapterTier.DISK
            for version in self._known
        }

    def want(self, version: int) -> None:
        """A request for this adapter waits."""
        if self._host.use(version) is None:
            self._settled = False

    def read_ahead(self, waiting: Callable[[], Iterable[int]]) -> None:
        """Start reading what waiting requests need, the next to be served first.

        To be called after each scheduling.

        Args:
            waiting: the versions that waiting requests name, the oldest request's first. Asked
                for only if one of them may not be in memory.
        """
        if self._pause:
            self._pause -= 1
            self._settled = self._settled and bool(self._pause)
        refused = self._slots.take_refused()
        missing = [version for version in refused if version not in self._host]
        if self._settled and not missing:
            return
        self._late.update(missing)
        wanted = dict.fromkeys(refused)
        wanted.update(dict.fromkeys(waiting()))
        if not self._shared:
            wanted = {v: None for v in wanted if v not in self._slots}
        first = dict.fromkeys(self._host.missing)
        plan = self._host.plan({**first, **wanted}, self._in_use())
        self._slots.short |= plan.short
        self._evict(plan.evict)
        for version in plan.read:
            info, load = self._known[version]
            self._read(replace(load, call_id=None, digest=info.digest))
        self._settled = plan.settled and not plan.short

    def arrived(self, loaded: LoadFinished) -> LoraxError | None:
        """Take an adapter that was read again; an error if its waiting requests must fail."""
        version = loaded.load.version
        late = version in self._late
        self._late.discard(version)
        if loaded.weights is None:
            if not self._host.lost(version):
                return None
            if not self._failures[version]:
                log.warning("adapter version %d cannot be read again: %s", version, loaded.error)
            self._failures[version] += 1
            if version in self._host.missing:  # pinned: no request need ask for it
                self._pause = min(1 << self._failures[version], _LONGEST_PAUSE)
            if isinstance(loaded.error, EngineFailed):  # a part of a composition, and which
                return loaded.error
            return EngineFailed(
                f"the adapter cannot be read again from disk: {loaded.error}; restore its files, "
                "or load the adapter again to serve the new ones"
            )
        if self._host.arrived(version):  # else it was dropped in the meantime
            self._weights[version] = loaded.weights
            del self._failures[version]
            self._reads += 1
            self._read_seconds += loaded.seconds
            self._late_reads += late
        return None

    def free_emptied_slots(self) -> None:
        """Free the device memory of evicted adapters, before others are brought in."""
        for slot in self._slots.take_emptied():
            self._clear_slot(slot)
            self._settled = False  # whose adapter it was may be wanted, and be on disk only

    def drop(self, version: int, slot: int | None) -> Freed:
        """Forget an adapter that no request uses; returns the memory that this frees.

        Args:
            version: the adapter.
            slot: the device slot that it has just left, if any.
        """
        freed = self._host.drop(version)
        info, _ = self._known.pop(version)
        self._weights.pop(version, None)
        self._late.discard(version)
        del self._failures[version]
        if slot is None:
            return Freed(host=freed)
        self._clear_slot(slot)
        return Freed(host=freed, device=0 if self._shared else info.nbytes)

    def problems(self) -> list[str]:
        """What is wrong between the tiers; empty when all is well."""
        found = self._host.problems()
        resident = {version for version in self._known if version in self._host}
        if self._weights.keys() != resident:
            found.append(f"weights are kept of {sorted(self._weights)}, not of {sorted(resident)}")
        if self._host.known != len(self._known):
            found.append(f"{self._host.known} adapters are accounted for, {len(self._known)} known")
        strays = [v for v in self._slots if v not in (resident if self._shared else self._known)]
        if strays:
            found.append(f"adapter versions {strays} are in slots, but not in memory")
        return found

    def _in_use(self) -> Collection[int]:
        """What must not leave host memory: running requests compute with it, if it is shared."""
        return self._slots.pinned if self._shared else ()

    def _evict(self, versions: Iterable[int]) -> None:
        for version in versions:
            del self._weights[version]
            if self._shared and (slot := self._slots.drop(version)) is not None:
                self._clear_slot(slot)
            self._settled = False  # a request may wait for it


def _check_size(loaded: LoadFinished, max_bytes: int, what: str, flag: str) -> None:
    assert loaded.info is not None
    nbytes = loaded.info.nbytes
    if nbytes > max_bytes:
        taker, advice = "the adapter takes", "train it with a smaller rank"
        if loaded.load.parts:
            taker, advice = "the adapters together take", "name fewer"
        raise Overloaded(
            f"{taker} {nbytes} bytes, more than the {max_bytes} bytes of {what} that adapters have "
            f"(--{flag}) beside pinned ones; raise that limit or {advice}"
        )
