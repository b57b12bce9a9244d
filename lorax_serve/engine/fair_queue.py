"""Who is next: virtual token counters. Plain integers.

After "Fairness in Serving Large Language Models" (Sheng et al., OSDI 2024). Sequences of one
adapter (or none) and one priority are a flow. A flow's counter grows with the tokens computed for
it, divided by its weight; the flow with the least counter is next, and in it the first that came.
While two flows have sequences waiting, the services they get, over their weights, differ by no
more than what their running sequences may cost. Nobody starves: every weight is positive.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from lorax_serve.core import MAX_PRIORITY, Sequence

__all__ = ["PROMPT_COST", "SCALE", "TOKEN_COST", "FairQueue", "Flow"]

PROMPT_COST = 1
TOKEN_COST = 2
"""A token generated costs about twice a token of a prompt (section 3.1 of the paper)."""
SCALE = 1 << 16
"""What a prompt token adds to the counter of a flow with weight 1 and priority 0; large, so that
little is lost in dividing by a weight."""


class Flow:
    """The sequences of one adapter and one priority.

    Attributes:
        adapter: version, or None.
        weight: its share against other flows; 4 with an adapter's weight 1 and priority 0.
        counter: service it got over its weight.
        waiting: its sequences that wait, the first to be admitted at the left.
        admitted: how many of its sequences were admitted and have not ended.
    """

    __slots__ = ("adapter", "admitted", "counter", "waiting", "weight")

    def __init__(self, adapter: int | None, weight: int) -> None:
        self.adapter = adapter
        self.weight = weight
        self.counter = 0
        self.waiting: deque[Sequence] = deque()
        self.admitted = 0

    def charge(self, cost: int) -> None:
        """Count service of so many prompt tokens' cost."""
        self.counter += cost * (SCALE << MAX_PRIORITY) // self.weight


def _weight(sequence: Sequence) -> int:
    return sequence.weight << (sequence.priority + MAX_PRIORITY)


class FairQueue:
    """All waiting sequences, by flow."""

    def __init__(self) -> None:
        self._flows: dict[tuple[int | None, int], Flow] = {}
        """By adapter and priority. Kept while its adapter is, or it would be forgiven its debt."""
        self._active: set[Flow] = set()
        """Those with sequences that wait or run: few of those that are kept."""
        self._flow_of: dict[int, Flow] = {}
        """Of waiting sequences, by request."""
        self._level = 0
        """The largest counter with which a flow was served: where to start when there is none."""

    def __len__(self) -> int:
        return len(self._flow_of)

    def flow(self, sequence: Sequence) -> Flow:
        """The flow that a sequence belongs to."""
        key = (sequence.adapter, sequence.priority)
        flow = self._flows.get(key)
        if flow is None:
            flow = self._flows[key] = Flow(sequence.adapter, _weight(sequence))
        return flow

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. A flow that was idle gets no credit for that."""
        flow = self.flow(sequence)
        flow.weight = _weight(sequence)  # the adapter's may have changed
        if not (flow.waiting or flow.admitted):
            least = min((other.counter for other in self._active), default=self._level)
            flow.counter = max(flow.counter, least)
        self._active.add(flow)
        flow.waiting.append(sequence)
        self._flow_of[sequence.request_id] = flow

    def put_back(self, sequence: Sequence) -> None:
        """Queue a preempted sequence: it is its flow's next."""
        flow = self.flow(sequence)
        self._active.add(flow)
        flow.waiting.appendleft(sequence)
        self._flow_of[sequence.request_id] = flow

    def pop(self, flow: Flow) -> Sequence:
        """Take out the flow's next sequence."""
        sequence = flow.waiting.popleft()
        del self._flow_of[sequence.request_id]
        flow.admitted += 1
        return sequence

    def ended(self, sequence: Sequence) -> None:
        """A sequence that was admitted runs no more; if it was preempted, it is ``put_back``."""
        flow = self.flow(sequence)
        flow.admitted -= 1
        self._settle(flow)

    def withdraw(self, request_id: int) -> bool:
        """Take a sequence out; whether there was one."""
        flow = self._flow_of.pop(request_id, None)
        if flow is None:
            return False
        flow.waiting = deque(each for each in flow.waiting if each.request_id != request_id)
        self._settle(flow)
        return True

    def backlogged(self) -> Iterator[Flow]:
        """The flows that have sequences waiting."""
        if not self._flow_of:
            return iter(())
        return (flow for flow in self._flows.values() if flow.waiting)

    def charge_prompt(self, sequence: Sequence, length: int) -> None:
        """A chunk of a sequence is computed. What was charged before a preemption is free now."""
        end = sequence.computed + length
        flow = self.flow(sequence)
        self._level = max(self._level, flow.counter)
        new = end - max(sequence.computed, sequence.charged)
        if new > 0:
            flow.charge(new * PROMPT_COST)
            sequence.charged = end

    def charge_token(self, sequence: Sequence) -> None:
        """A decoding sequence is computed one token further."""
        if sequence.computed >= sequence.charged:
            self.flow(sequence).charge(TOKEN_COST)
            sequence.charged = sequence.computed + 1

    def drop_adapter(self, adapter: int) -> None:
        """Forget an adapter's flows."""
        wanted = any(flow.adapter == adapter for flow in self.backlogged())
        assert not wanted, f"version {adapter} is wanted"
        self._flows = {key: flow for key, flow in self._flows.items() if key[0] != adapter}

    def problems(self) -> list[str]:
        """What is wrong in the accounting."""
        found = []
        waiting = {s.request_id: flow for flow in self._flows.values() for s in flow.waiting}
        if waiting != self._flow_of:
            found.append(f"flows hold {sorted(waiting)}, not {sorted(self._flow_of)}")
        if self._active != {f for f in self._flows.values() if f.waiting or f.admitted}:
            found.append("other flows are active than have sequences")
        for key, flow in self._flows.items():
            if any((s.adapter, s.priority) != key for s in flow.waiting):
                found.append(f"flow {key} holds a sequence of another")
            if flow.admitted < 0:
                found.append(f"flow {key} has {flow.admitted} admitted sequences")
            if flow.weight < 1:
                found.append(f"flow {key} has weight {flow.weight}: it would starve")
        return found

    def _settle(self, flow: Flow) -> None:
        if not (flow.waiting or flow.admitted):
            self._active.discard(flow)
