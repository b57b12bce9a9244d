"""The engine's part in a step, without a model: it keeps what a KV cache would hold."""

from __future__ import annotations

from collections import defaultdict

from lorax_serve.core import BASE, Batch, CacheKey, SamplingParams, Sequence
from lorax_serve.engine.adapter_slots import AdapterSlots
from lorax_serve.engine.kv_rows import KVRows, blocks_of
from lorax_serve.engine.scheduler import Scheduler


def sequence(
    request_id: int,
    prompt: int | list[int] = 1,
    new: int = 1,
    adapter: int | None = None,
    priority: int = 0,
) -> Sequence:
    # Prompts differ, so that nothing is found in the prefix cache that a test did not put there.
    tokens = [request_id * 1000 + n for n in range(prompt)] if isinstance(prompt, int) else prompt
    return Sequence(
        request_id=request_id,
        tokens=list(tokens),
        prompt_length=len(tokens),
        adapter=adapter,
        sampling=SamplingParams(),
        max_new_tokens=new,
        min_new_tokens=0,
        eos_token_ids=frozenset(),
        cache_key=None if adapter is None else CacheKey(f"digest of {adapter}"),
        priority=priority,
        arrived=request_id,
    )


def next_token(tokens: list[int]) -> int:
    """What the simulated model says next: a pure function, as greedy decoding is."""
    return hash(tuple(tokens)) % 97


def cell(chosen: Sequence, position: int) -> int:
    """What a KV row holds at a position: it depends on the adapter and all tokens up to there."""
    return hash((chosen.cache_key, *chosen.tokens[: position + 1]))


class Simulation:
    """A scheduler, the engine's part in a step, and checks of every batch.

    Attributes:
        admitted: requests in the order of their first admission.
        done: requests in the order of their end.
        served: cost of what was computed, by flow.
        swaps: how often an adapter was brought into a slot.
    """

    def __init__(
        self,
        rows: int,
        budget: int,
        slots: int,
        *,
        spare_rows: int = 0,
        blocks: int = 10_000,
        beside: int = 10_000,
        quantum: int = 64,
        caching: bool = True,
    ) -> None:
        self.rows, self.budget, self.slots, self.blocks = rows, budget, slots, blocks
        self.kv = KVRows(rows + spare_rows, blocks, prefix_caching=caching)
        self.scheduler = Scheduler(
            rows,
            budget,
            AdapterSlots(slots),
            self.kv,
            prompt_tokens_beside=lambda decodes: beside,
            adapter_quantum=quantum,
        )
        self.cells: list[list[int]] = [[] for _ in range(rows + spare_rows)]
        self.waiting: dict[int, Sequence] = {}
        self.running: dict[int, Sequence] = {}
        self.device: dict[int, int] = {}
        """Slot to version, as the runner would have it."""
        self.admitted: list[int] = []
        self.done: list[int] = []
        self.served: dict[tuple[int | None, int], int] = defaultdict(int)
        self.swaps = 0
        self._ids = 0

    def add(
        self,
        prompt: int | list[int] = 1,
        new: int = 1,
        adapter: int | None = None,
        priority: int = 0,
    ) -> Sequence:
        self._ids += 1
        new_one = sequence(self._ids, prompt, new, adapter, priority)
        self.scheduler.add(new_one)
        self.waiting[self._ids] = new_one
        return new_one

    def step(self) -> Batch:
        before = dict(self.running)
        preemptions = self.scheduler.preemptions
        batch = self.scheduler.schedule()
        for lost in [s for s in before.values() if s.kv_slot < 0]:
            self.waiting[lost.request_id] = self.running.pop(lost.request_id)
            preemptions += 1
        assert preemptions == self.scheduler.preemptions
        for slot, version in batch.loads:
            others = [s for s in self.running.values() if s.adapter != version]
            assert all(s.adapter_slot != slot for s in others), "a pin was ignored"
            self.device[slot] = version
            self.swaps += 1
        for chosen in batch.sequences:
            if chosen.request_id in self.waiting:
                self.running[chosen.request_id] = self.waiting.pop(chosen.request_id)
                if chosen.request_id not in self.admitted:
                    self.admitted.append(chosen.request_id)
        self.move(batch)
        self.check(batch)
        for chosen, length in [*((s, 1) for s in batch.decodes), *batch.prefills]:
            self.compute(chosen, length)
        for chosen in batch.decodes:
            self.served[chosen.adapter, chosen.priority] += 2
        for chosen, length in batch.prefills:
            self.served[chosen.adapter, chosen.priority] += length
        for chosen in batch.sequences:
            if chosen.remaining == 0:
                chosen.tokens.append(next_token(chosen.tokens))
                if chosen.generated >= chosen.max_new_tokens:
                    self.end(chosen)
        return batch

    def move(self, batch: Batch) -> None:
        """As ``KVCache`` does it."""
        for source, destination, length in batch.copies:
            if source == destination:
                del self.cells[source][length:]
            else:
                assert len(self.cells[source]) >= length
                self.cells[destination][:length] = self.cells[source][:length]

    def compute(self, chosen: Sequence, length: int) -> None:
        row = self.cells[chosen.kv_slot]
        for position in range(chosen.computed, chosen.computed + length):
            row[position : position + 1] = [cell(chosen, position)]
        chosen.computed += length

    def check(self, batch: Batch) -> None:
        ids = [chosen.request_id for chosen in batch.sequences]
        assert len(ids) == len(set(ids)), "a sequence is in the batch twice"
        assert set(ids) <= self.running.keys()
        assert all(chosen.remaining == 1 for chosen in batch.decodes)
        assert all(0 < length <= chosen.remaining for chosen, length in batch.prefills)
        assert sum(length for _, length in batch.prefills) <= self.budget
        parked = {
            i for i, s in self.running.items() if s.adapter is not None and s.adapter_slot == BASE
        }
        assert not parked & set(ids)
        decoding = {i for i, s in self.running.items() if s.remaining == 1} - parked
        assert decoding <= set(ids), "a decode was left out"
        assert batch or not (self.running or self.waiting), "nothing to do, but work is left"
        for s in self.running.values():
            held = self.cells[s.kv_slot][: s.computed]
            assert held == [cell(s, n) for n in range(s.computed)], "not what was computed for it"

    def end(self, chosen: Sequence) -> None:
        self.scheduler.finish(chosen)
        del self.running[chosen.request_id]
        self.done.append(chosen.request_id)
        assert (chosen.kv_slot, chosen.adapter_slot) == (-1, BASE)
        for n in range(chosen.prompt_length, len(chosen.tokens)):
            assert chosen.tokens[n] == next_token(chosen.tokens[:n]), "a token was lost or repeated"

    def abort(self, request_id: int) -> None:
        """As the engine does it."""
        found = self.scheduler.find(request_id)
        if found is not None:
            assert found is self.running[request_id]
            self.end(found)
        else:
            assert self.scheduler.withdraw(request_id) == (request_id in self.waiting)
            self.waiting.pop(request_id, None)

    def drop(self, version: int) -> None:
        """As the engine does when an adapter's last request has ended."""
        slot = self.scheduler.drop_adapter(version)
        held = {v: s for s, v in self.device.items()}
        assert slot == held.get(version)
        if slot is not None:
            del self.device[slot]

    def run(self, steps: int = 100_000) -> int:
        """Steps until all is done, at most ``steps``; how many."""
        for step in range(steps):
            if not (self.running or self.waiting):
                return step
            self.step()
            self.check_state()
        return steps

    def check_state(self) -> None:
        scheduler = self.scheduler
        assert scheduler.problems() == []
        assert scheduler.running == len(self.running) <= self.rows
        assert scheduler.waiting == len(self.waiting)
        pinned = {s.adapter for s in self.running.values() if s.adapter_slot != BASE}
        assert len(pinned) <= self.slots
        assert scheduler.kv_tokens == sum(s.computed for s in self.running.values())
        rows = [s.kv_slot for s in self.running.values()]
        assert len(rows) == len(set(rows))
        for s in self.running.values():
            if s.adapter is None:
                assert s.adapter_slot == BASE
            elif s.adapter_slot != BASE:
                assert self.device[s.adapter_slot] == s.adapter, "it runs with another's weights"
        by_flow = defaultdict(list)
        everyone = {**self.running, **self.waiting}
        for request_id in self.admitted:
            if request_id in everyone:
                chosen = everyone[request_id]
                by_flow[chosen.adapter, chosen.priority].append(request_id)
        for flow, ids in by_flow.items():
            assert ids == sorted(ids), f"flow {flow} is not served in order of arrival"
        self.check_memory()

    def check_memory(self) -> None:
        """Between steps, what was just released is not given back yet."""
        taken = sum(blocks_of(len(row)) for row in self.cells)
        released = len(self.kv._copies)
        assert released or taken <= self.blocks, "more memory is touched than there is"
