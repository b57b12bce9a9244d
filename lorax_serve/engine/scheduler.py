"""What the next step computes. Plain integers and queues; knows no tensors.

Running sequences always go on: each that decodes gets its one token. What the step's budget leaves
goes to prompts, running or waiting, of the flow that was served least (``fair_queue``). A waiting
sequence is admitted when a row of the KV cache, memory for all its tokens (``kv_rows``) and, if it
names an adapter, a device slot for that can be had.

Decoding takes memory block by block. When there is none left, the running sequence of the lowest
priority, then the latest, gives its row up and waits again, at the head of its flow, with all its
tokens: they are computed again as a prompt, and what is drawn after them is what would have been,
because draws depend on seed and position only.

When more adapters have work than there are device slots, they take turns: one that got a quantum
of service ahead of another without a slot is parked. Its running sequences keep their rows and
stand still until it is their turn again; nothing is computed twice.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Callable

from lorax_serve.core import BASE, AdapterWork, Batch, Sequence
from lorax_serve.engine.adapter_slots import AdapterSlots
from lorax_serve.engine.fair_queue import SCALE, FairQueue, Flow
from lorax_serve.engine.kv_rows import KVRows

__all__ = ["Scheduler"]


class Scheduler:
    """Queues, KV rows and adapter slots.

    Args:
        max_batch_size: sequences that run at once.
        max_batch_tokens: most prompt tokens a step.
        slots: the device's adapter slots; a sequence whose adapter gets none now is passed over.
        rows: rows of the KV cache, at least ``max_batch_size``.
        prompt_tokens_beside: prompt tokens a step beside that many decoding sequences.
        adapter_quantum: service (in prompt tokens) by which an adapter in a slot may get ahead of
            one without.

    Attributes:
        preemptions: sequences that had to give up their row, so far.
    """

    def __init__(
        self,
        max_batch_size: int,
        max_batch_tokens: int,
        slots: AdapterSlots,
        rows: KVRows,
        *,
        prompt_tokens_beside: Callable[[int], int],
        adapter_quantum: int,
    ) -> None:
        self._max_batch_size = max_batch_size
        self._max_batch_tokens = max_batch_tokens
        self._prompt_tokens_beside = prompt_tokens_beside
        self._adapter_quantum = adapter_quantum * SCALE
        self._slots = slots
        self._rows = rows
        self._queue = FairQueue()
        self._running: dict[int, Sequence] = {}
        self._users: Counter[int] = Counter()
        """Running sequences of each adapter that holds a slot for them."""
        self._parked: Counter[int] = Counter()
        """Running sequences of each adapter that has none now; their ``adapter_slot`` is BASE."""
        self._refused: set[int] = set()
        """Adapters that asked for a slot in vain, until they get one or nobody wants them."""
        self._short = False
        """Whether memory for weights was short since there are any."""
        self.preemptions = 0

    @property
    def waiting(self) -> int:
        """Number of sequences that are not admitted yet."""
        return len(self._queue)

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
        """Tokens of running sequences in the KV cache."""
        return sum(sequence.computed for sequence in self._running.values())

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        self._queue.add(sequence)

    @property
    def may_run_ahead(self) -> bool:
        """Whether the next step can be chosen before the tokens of the last one are known: nobody
        will have to give its row up, and nobody's next token depends on more than is known."""
        if not self._rows.has_room():
            return False
        running = self._running.values()
        return all(not s.is_pending or s.sampling.repetition_penalty == 1 for s in running)

    def schedule(self) -> Batch:
        """Admit what fits and choose the next step's work; empty if there is none."""
        batch = Batch()
        for sequence in self._running.values():
            self._rows.commit(sequence)
        barred = self._take_turns(batch)
        preempted = self._secure_memory()
        prompts = []
        for sequence in self._running.values():
            # One whose last token is being computed may have all that it can have.
            if self._is_parked(sequence) or len(sequence.tokens) >= sequence.end:
                continue
            if sequence.remaining == 1:
                batch.decodes.append(sequence)
                self._queue.charge_token(sequence)
            else:
                prompts.append(sequence)
        # What was just preempted would come back at once, to be preempted again.
        places = 0 if preempted else self._max_batch_size - len(self._running)
        self._share_prompt_budget(batch, prompts, places, barred)
        batch.copies = self._rows.take_copies()
        return batch

    def finish(self, sequence: Sequence, *, keep: bool = True) -> None:
        """Take a running sequence out and free what it holds.

        Args:
            sequence: it has ended, failed, or was aborted.
            keep: whether its keys and values are sound and may serve other prompts.
        """
        del self._running[sequence.request_id]
        self._queue.ended(sequence)
        self._rows.release(sequence, keep=keep)
        if self._is_parked(sequence):
            _decrement(self._parked, sequence.adapter)
        elif sequence.adapter is not None:
            self._slots.unpin(sequence.adapter)
            _decrement(self._users, sequence.adapter)
        sequence.kv_slot, sequence.adapter_slot = -1, BASE

    def find(self, request_id: int) -> Sequence | None:
        """The running sequence of that id, if any."""
        return self._running.get(request_id)

    def withdraw(self, request_id: int) -> bool:
        """Take a waiting or parked sequence out; whether there was one."""
        sequence = self._running.get(request_id)
        if sequence is not None and self._is_parked(sequence):
            self.finish(sequence)
            return True
        return self._queue.withdraw(request_id)

    def waiting_adapters(self) -> list[int]:
        """The adapters that waiting or parked sequences name, the next to be served first."""
        flows = {flow for flow in self._queue.backlogged() if flow.adapter is not None}
        flows |= {self._queue.flow(s) for s in self._running.values() if self._is_parked(s)}
        ordered = sorted(flows, key=lambda flow: flow.counter)
        return [flow.adapter for flow in ordered if flow.adapter is not None]

    def work(self) -> AdapterWork:
        """The adapters that have requests."""
        running = frozenset(
            s.adapter
            for s in self._running.values()
            if s.adapter is not None and not self._is_parked(s)
        )
        return AdapterWork(running, frozenset(self.waiting_adapters()) - running)

    def waiting_for(self, version: int) -> list[Sequence]:
        """The waiting or parked sequences that name an adapter."""
        flows = [flow for flow in self._queue.backlogged() if flow.adapter == version]
        found = [sequence for flow in flows for sequence in flow.waiting]
        parked = (s for s in self._running.values() if self._is_parked(s))
        return found + [sequence for sequence in parked if sequence.adapter == version]

    def running_with(self, version: int) -> list[Sequence]:
        """The running sequences that name an adapter."""
        return [s for s in self._running.values() if s.adapter == version]

    def drop_adapter(self, version: int) -> int | None:
        """Forget an adapter that no sequence names; returns the slot that it leaves, if any."""
        self._queue.drop_adapter(version)
        return self._slots.drop(version)

    def evict_adapter(self, version: int) -> None:
        """Take back a slot whose weights could not be brought in."""
        self._slots.drop(version)

    def problems(self) -> list[str]:
        """What is wrong in the accounting; empty when all is well."""
        running = list(self._running.values())
        parked = [s for s in running if self._is_parked(s)]
        pins = Counter(s.adapter for s in running if s.adapter is not None)
        pins -= Counter(s.adapter for s in parked if s.adapter is not None)
        found = self._slots.problems(dict(pins))
        found += self._rows.problems(running)
        found += self._queue.problems()
        if pins != self._users:
            found.append(f"users of adapters are {self._users}, not {pins}")
        if Counter(s.adapter for s in parked) != self._parked:
            found.append(f"parked adapters are {self._parked}, not those of the sequences")
        if self._parked.keys() & self._users.keys():
            found.append("an adapter is parked and in use")
        return found

    def _secure_memory(self) -> bool:
        """Memory for every token that is decoded now, preempting if need be; whether it was."""
        before = self.preemptions
        for sequence in list(self._running.values()):
            # All of a prompt's memory was taken when it was admitted.
            if self._is_parked(sequence):
                continue
            while sequence.kv_slot >= 0 and not self._rows.reserve(sequence):
                everyone = self._running.values()
                self._preempt(max(everyone, key=lambda s: (-s.priority, s.arrived, s.request_id)))
        return self.preemptions > before

    def _preempt(self, sequence: Sequence) -> None:
        self.finish(sequence, keep=False)
        sequence.computed = 0
        self._queue.put_back(sequence)
        self.preemptions += 1

    def _share_prompt_budget(
        self, batch: Batch, prompts: list[Sequence], places: int, barred: set[int]
    ) -> None:
        """Fill the batch with prompts, the least served flow's first; admit to ``places``."""
        budget = self._prompt_budget(len(batch.decodes), len(prompts), places)
        order = itertools.count()  # at equal service, prompts that were begun go first
        queue: list[tuple[int, int, Flow, Sequence | None]] = []
        for prompt in prompts:
            flow = self._queue.flow(prompt)
            queue.append((flow.counter, next(order), flow, prompt))
        if places:
            queue += [(f.counter, next(order), f, None) for f in self._queue.backlogged()]
        heapq.heapify(queue)
        while budget and queue:
            counter, _, flow, sequence = heapq.heappop(queue)
            if counter < flow.counter:  # it was served meanwhile
                heapq.heappush(queue, (flow.counter, next(order), flow, sequence))
                continue
            if sequence is None:
                if not places or flow.adapter in barred:
                    continue
                if not self._rows.fits(flow.waiting[0]):
                    places = 0  # it is next: others must not take the memory that it waits for
                    continue
                sequence = self._admit(flow, batch)
                if sequence is None:
                    continue
                places -= 1
                if flow.waiting:
                    heapq.heappush(queue, (flow.counter, next(order), flow, None))
            length = min(sequence.remaining, budget)
            batch.prefills.append((sequence, length))
            self._queue.charge_prompt(sequence, length)
            budget -= length

    def _prompt_budget(self, decodes: int, prompts: int, places: int) -> int:
        """Prompt tokens of this step: all, or a few if they delay others that decode; as many
        times more as there are prompts to each of these."""
        if not decodes:
            return self._max_batch_tokens
        prompts += min(places, len(self._queue))
        share = self._prompt_tokens_beside(decodes) * max(prompts, decodes) // decodes
        return min(share, self._max_batch_tokens)

    def _admit(self, flow: Flow, batch: Batch) -> Sequence | None:
        """Start the flow's next sequence; None if its adapter can have no slot now."""
        sequence = flow.waiting[0]
        if sequence.adapter is not None:
            slot = self._pin(sequence.adapter, batch)
            if slot is None:
                return None
            sequence.adapter_slot = slot
            self._users[sequence.adapter] += 1
        self._queue.pop(flow)
        self._rows.take(sequence)
        self._running[sequence.request_id] = sequence
        return sequence

    def _take_turns(self, batch: Batch) -> set[int]:
        """Decide which adapters hold slots; returns those that may not admit in this step.

        Adapters with work but no slot get the free slots, the least served first. The next of
        them are set against those that hold slots, from the most served: who is more than a
        quantum ahead is parked for the other.
        """
        self._short |= self._slots.short
        self._slots.short = False
        self._refused.update(a for a in self._parked if not self._slots.is_loaded(a))
        free = self._slots.capacity - len(self._users)
        if not (self._parked or self._refused or (free <= 0 and self._queue)):
            self._short = False
            return set()
        backlog = sorted(self._queue.backlogged(), key=lambda flow: flow.counter)
        least: dict[int, int] = {}
        for flow in [*backlog, *map(self._queue.flow, self._running.values())]:
            if flow.adapter is not None:
                least[flow.adapter] = min(flow.counter, least.get(flow.adapter, flow.counter))
        self._refused &= least.keys()
        self._short &= bool(self._refused)
        waiting: set[int] = set()
        for flow in backlog if len(self._running) < self._max_batch_size else ():
            if not self._rows.fits(flow.waiting[0]):
                break  # nor will what comes after it be admitted
            if flow.adapter is not None:
                waiting.add(flow.adapter)
        without = (waiting | self._parked.keys()) - self._users.keys()
        needy = sorted((least[a], a) for a in without if self._slots.is_loaded(a))
        leading = sorted(((least[a], a) for a in self._users), reverse=True)
        for (most, adapter), (counter, _) in zip(leading, needy[max(free, 0) :], strict=False):
            if most - counter <= self._adapter_quantum:
                break
            self._park(adapter)
            free += 1
        turn = {adapter for _, adapter in needy[: max(free, 0)]}
        unloaded = [a for a in self._parked if len(turn) < free and not self._slots.is_loaded(a)]
        for adapter in [a for a in self._parked if a in turn] + unloaded:
            self._resume(adapter, batch)
        barred = {adapter for _, adapter in needy if adapter not in turn} | self._parked.keys()
        if self._short:
            # Memory for weights is short: what is ahead ends, and leaves its memory.
            limit = min(least[adapter] for adapter in self._refused) + self._adapter_quantum
            barred |= {adapter for adapter, counter in least.items() if counter > limit}
        return barred

    def _park(self, adapter: int) -> None:
        for sequence in self.running_with(adapter):
            self._slots.unpin(adapter)
            sequence.adapter_slot = BASE
        self._parked[adapter] = self._users.pop(adapter)

    def _resume(self, adapter: int, batch: Batch) -> None:
        for sequence in self.running_with(adapter):
            pinned = self._pin(adapter, batch)
            if pinned is None:  # only the first can fail
                return
            sequence.adapter_slot = pinned
        self._users[adapter] = self._parked.pop(adapter)

    def _pin(self, adapter: int, batch: Batch) -> int | None:
        pinned = self._slots.pin(adapter)
        if pinned is None:
            self._refused.add(adapter)
            return None
        self._refused.discard(adapter)
        if pinned.is_new:
            batch.loads.append((pinned.slot, adapter))
        return pinned.slot

    def _is_parked(self, sequence: Sequence) -> bool:
        return sequence.adapter_slot == BASE and sequence.adapter is not None


def _decrement(counts: Counter[int], key: int | None) -> None:
    assert key is not None
    counts[key] -= 1
    if not counts[key]:
        del counts[key]
