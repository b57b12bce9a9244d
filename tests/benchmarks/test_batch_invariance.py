"""How answers alone and among others are compared, on a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.adapters import random_adapters
from benchmarks.batch_invariance import Shape, ratio
from benchmarks.divergence import (
    Conversation,
    Divergence,
    among_others,
    answered_alone,
    compare,
    openings,
    same_before,
)
from benchmarks.ours import OfflineEngine
from benchmarks.workloads import Request
from lorax_serve.config import EngineConfig
from tests.helpers import TINY_LLAMA, save_tiny_model

NAMES = (None, "a", "b")


async def test_conversations_are_answered_alone_and_again_among_others(tmp_path: Path) -> None:
    model = tmp_path / "model"
    save_tiny_model(model, TINY_LLAMA)
    adapters = random_adapters(tmp_path / "adapters", model, [4, 8])
    config = EngineConfig(model=str(model), dtype="float32", kernels="torch", threads=1)
    async with await OfflineEngine.start(config, adapters) as engine:
        names = [None, *adapters]
        first = await openings(engine, 6, (8, 60), 7, names, seed=0)
        conversations = await answered_alone(engine, first)
        again = [await among_others(engine, conversations, 3, 0.05, seed=n) for n in range(2)]
        assert engine.stats.prefix_cache_hits > 0
    assert [request.adapter for request in first] == [*names, *names]
    assert [request.greedy for request in first] == [True] * 3 + [False] * 3
    assert all(8 <= len(request.prompt) <= 60 for request in first)
    for conversation in conversations:
        one, two = conversation.turns
        said = (*one.prompt, *conversation.answers[0])
        assert two.prompt[: len(said)] == said
        assert [len(answer) for answer in conversation.answers] == [7, 7]
    found = compare(conversations, again)
    assert {kind: some.answers for kind, some in found.items()} == {
        f"{turn}_{kind}": 6
        for turn in ("first_turn", "second_turn")
        for kind in ("greedy", "drawn")
    }
    # In float32 nothing depends on others: each answer is compared with its own.
    assert [some.different for some in found.values()] == [0] * 4


def test_divergence_counts_answers_and_the_tokens_before_the_first_other_one() -> None:
    turns = (Request((1,), 3, greedy=True), Request((1, 2), 3, greedy=True))
    conversations = [Conversation(turns, ([1, 2, 3], [4, 5, 6]))] * 2
    again = [
        [([1, 2, 3], [4, 5, 9]), ([1, 2, 3], [0, 5, 6])],
        [([1, 2, 3], [4, 5, 6]), ([1, 9, 3], [4, 5, 6])],
    ]
    found = compare(conversations, again)
    assert found == {
        "first_turn_greedy": Divergence(4, 1, 1),
        "second_turn_greedy": Divergence(4, 2, 1.0),
    }
    assert found["second_turn_greedy"].rate == 0.5
    assert same_before([1, 2], [1, 2]) is None


def test_prompts_begin_alike_under_the_same_adapter_only() -> None:
    work = Shape(20, 4, shared=12, each=3).requests(NAMES, vocab_size=500, seed=0)
    assert [request.adapter for request in work] == [*NAMES] * 3
    assert {len(request.prompt) for request in work} == {20}
    assert len({request.prompt for request in work}) == 9
    begins = {(request.adapter, request.prompt[:12]) for request in work}
    assert len(begins) == len({begin for _, begin in begins}) == 3


def test_a_ratio_is_the_median_of_the_rounds() -> None:
    default = [{"rate": 10.0}, {"rate": 20.0}, {"rate": 1.0}]
    invariant = [{"rate": 9.0}, {"rate": 10.0}, {"rate": 3.0}]
    assert ratio(default, invariant) == {"rate": pytest.approx(0.9)}
