"""What the next step computes. Plain integers and queues; knows no tensors.

Running sequences always go on: each that decodes gets its one token. Prompt tokens fill what the
step's budget leaves, oldest sequence first. Waiting sequences are admitted in order of arrival as
soon as a row of the KV cache and, if they name an adapter, a device slot for it can be had.
"""

from __future__ import annotations

import heapq
from collections import Counter, deque

from lorax_serve.core import BASE, Batch, Sequence
from lorax_serve.engine.adapter_slots import AdapterSlots

__all__ = ["Scheduler"]

# A sequence that waits for an adapter slot lets this many others pass; then they queue behind it,
# or adapters that are never idle would keep it waiting for ever.
_MAX_PASSED = 32


class Scheduler:
    """Queues, KV rows and adapter slots.

    Args:
        max_batch_size: rows of the KV cache: sequences that run at once.
        max_batch_tokens: prompt tokens a step.
        adapter_slots: distinct adapters that run at once.
    """

    def __init__(self, max_batch_size: int, max_batch_tokens: int, adapter_slots: int) -> None:
        self._max_batch_tokens = max_batch_tokens
        self._max_batch_size = max_batch_size
        self._slots = AdapterSlots(adapter_slots)
        self._free_rows = list(range(max_batch_size))
        self._waiting: deque[Sequence] = deque()
        self._running: dict[int, Sequence] = {}

    @property
    def waiting(self) -> int:
        """Number of sequences that are not admitted yet."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Number of sequences that have a KV row."""
        return len(self._running)

    @property
    def resident_adapters(self) -> int:
        """Number of adapters in device slots."""
        return len(self._slots)

    @property
    def kv_tokens(self) -> int:
        """Tokens in the KV cache."""
        return sum(sequence.computed for sequence in self._running.values())

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        self._waiting.append(sequence)

    def schedule(self) -> Batch:
        """Admit what fits and choose the next step's work; empty if there is none."""
        batch = Batch()
        budget = self._max_batch_tokens
        for sequence in self._running.values():
            if sequence.remaining == 1:
                batch.decodes.append(sequence)
            elif budget:
                budget -= self._take_chunk(batch, sequence, budget)
        while budget and self._free_rows and (admitted := self._admit(batch)):
            budget -= self._take_chunk(batch, admitted, budget)
        return batch

    def finish(self, sequence: Sequence) -> None:
        """Take a running sequence out and free what it holds."""
        del self._running[sequence.request_id]
        heapq.heappush(self._free_rows, sequence.kv_slot)
        if sequence.adapter is not None:
            self._slots.unpin(sequence.adapter)
        sequence.kv_slot, sequence.adapter_slot = -1, BASE

    def find(self, request_id: int) -> Sequence | None:
        """The running sequence of that id, if any."""
        return self._running.get(request_id)

    def withdraw(self, request_id: int) -> bool:
        """Take a waiting sequence out; whether there was one."""
        for sequence in self._waiting:
            if sequence.request_id == request_id:
                self._waiting.remove(sequence)
                return True
        return False

    def drop_adapter(self, version: int) -> int | None:
        """Forget an adapter that no sequence names; returns the slot that it leaves, if any."""
        assert all(s.adapter != version for s in self._waiting), f"version {version} is wanted"
        return self._slots.drop(version)

    def evict_adapter(self, version: int) -> None:
        """Take back a slot whose weights could not be brought in."""
        self._slots.drop(version)

    def problems(self) -> list[str]:
        """What is wrong in the accounting; empty when all is well."""
        running = list(self._running.values())
        pins = Counter(s.adapter for s in running if s.adapter is not None)
        found = self._slots.problems(dict(pins))
        rows = sorted([*self._free_rows, *(s.kv_slot for s in running)])
        if rows != list(range(self._max_batch_size)):
            found.append(f"KV rows are lost or doubled: {rows}")
        return found

    def _take_chunk(self, batch: Batch, sequence: Sequence, budget: int) -> int:
        length = min(sequence.remaining, budget)
        batch.prefills.append((sequence, length))
        return length

    def _admit(self, batch: Batch) -> Sequence | None:
        for index, sequence in enumerate(self._waiting):
            if sequence.adapter is not None:
                pinned = self._slots.pin(sequence.adapter)
                if pinned is None:
                    if sequence.passed >= _MAX_PASSED:
                        return None
                    continue
                sequence.adapter_slot = pinned.slot
                if pinned.is_new:
                    batch.loads.append((pinned.slot, sequence.adapter))
            for passed in range(index):
                self._waiting[passed].passed += 1
            del self._waiting[index]
            sequence.kv_slot = heapq.heappop(self._free_rows)
            self._running[sequence.request_id] = sequence
            return sequence
        return None
