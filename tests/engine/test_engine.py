"""A real engine in this process: prefix cache and preemption change nothing of what is said."""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from lorax_serve.config import EngineConfig
from lorax_serve.core import SamplingParams, StopReason, TokenOutput
from lorax_serve.engine.adapter_loader import AdapterLoader
from lorax_serve.engine.engine import Engine
from lorax_serve.engine.messages import Abort, LoadAdapter, Reply, Submit
from lorax_serve.errors import InvalidRequest
from lorax_serve.model.runner import ModelRunner
from tests.helpers import each_kernels


class Local:
    """An engine without its process."""

    def __init__(self, model: Path, **settings: Any) -> None:
        config = EngineConfig(
            **{"model": str(model), "dtype": "float32", "max_batch_size": 4, **settings}
        )
        self.inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.runner = ModelRunner(config)
        loader = AdapterLoader(
            self.runner.modules,
            self.runner.fold,
            self.runner.without_copies,
            self.inbox.put,
            probe=config.probe,
            fingerprint=self.runner.fingerprint,
        )
        self.engine = Engine(config, self.runner, loader)
        self.outputs: dict[int, list[TokenOutput]] = {}

    def load(self, version: int, path: Path) -> None:
        self.engine.handle(LoadAdapter(version, version, str(path)))
        self.engine.handle(self.inbox.get(timeout=60))
        (reply,) = self.report()
        assert reply.error is None

    def submit(
        self,
        request_id: int,
        tokens: Sequence[int],
        adapter: int | None = None,
        new: int = 8,
        **sampling: Any,
    ) -> None:
        self.outputs[request_id] = []
        params = SamplingParams(**sampling)
        self.engine.handle(Submit(request_id, tuple(tokens), adapter, params, new, 0, frozenset()))

    def report(self) -> list[Reply]:
        report = self.engine.take_report()
        self.stats = report.stats
        for output in report.tokens:
            self.outputs[output.request_id].append(output)
        return report.replies

    def step(self) -> None:
        self.engine.step()
        self.report()
        assert self.engine.check_integrity() == ()

    def run(self) -> dict[int, list[int | None]]:
        """To the end of all requests; their tokens."""
        while self.engine.busy:
            self.step()
        for outputs in self.outputs.values():
            ends = [o.stop_reason is not StopReason.NOT_FINISHED for o in outputs]
            assert ends == [False] * (len(ends) - 1) + [True], "not exactly one end"
        return {key: [o.token_id for o in outputs] for key, outputs in self.outputs.items()}


def prompt(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 128, (length,), generator=generator).tolist()


def make_two(make_adapter: Callable[..., Path]) -> list[Path]:
    return [
        make_adapter("a", 1, r=4, target_modules="all-linear"),
        make_adapter("b", 2, r=8, target_modules=["q_proj", "k_proj", "v_proj"]),
    ]


def conversation(local: Local) -> dict[int, list[int | None]]:
    """Requests that share prefixes under two adapters and none, in waves."""
    shared = prompt(100, 0)
    for wave in range(3):
        for n, adapter in enumerate((None, 1, 2)):
            key = wave * 10 + n
            tail = prompt(5 + wave, key + 1)
            local.submit(key, shared + tail, adapter, new=6 + n, temperature=n / 2, seed=key)
        if wave == 1:
            local.step()  # the next wave finds the rows of running sequences
        else:
            local.run()
    return local.run()


@each_kernels
def test_a_cached_prefix_changes_no_token(
    tiny_model: Path, make_adapter: Callable[..., Path], kernels: str
) -> None:
    directories = make_two(make_adapter)
    said = []
    for caching in (True, False):
        # Plain torch has as many rows as sequences may run; all prefixes shall find a place.
        local = Local(tiny_model, prefix_caching=caching, kernels=kernels, max_batch_size=8)
        for version, directory in enumerate(directories, start=1):
            local.load(version, directory)
        said.append(conversation(local))
        hits = 100 * 6 if caching else 0
        assert hits <= local.stats.prefix_cache_hits <= hits * 1.1
        assert local.stats.prefix_cache_queries == 3 * (105 + 106 + 107)
        assert (local.stats.kv_cached_tokens > 0) == caching
    assert said[0] == said[1]


@each_kernels
@pytest.mark.parametrize("caching", [True, False])
def test_preemption_loses_and_repeats_no_token(
    tiny_model: Path, make_adapter: Callable[..., Path], caching: bool, kernels: str
) -> None:
    directories = make_two(make_adapter)
    said = []
    for tokens in (None, 128):
        local = Local(
            tiny_model,
            prefix_caching=caching,
            kv_cache_tokens=tokens,
            max_sequence_length=128,
            kernels=kernels,
        )
        for version, directory in enumerate(directories, start=1):
            local.load(version, directory)
        for n in range(8):
            adapter = (None, 1, 2)[n % 3]
            sampling = {"temperature": 0.8, "seed": n} if n % 2 else {}
            local.submit(n, prompt(10 + n, n), adapter, new=60, logprobs=0, **sampling)
        said.append(local.run())
        assert (local.stats.preemptions > 0) == (tokens is not None)
    assert said[0] == said[1]
    assert all(len(tokens) == 60 for tokens in said[0].values())


def test_adapters_that_take_turns_lose_nothing(
    tiny_model: Path, make_adapter: Callable[..., Path]
) -> None:
    directories = make_two(make_adapter)
    said = []
    for slots in (2, 1):
        local = Local(tiny_model, adapter_slots=slots, adapter_quantum=10)
        for version, directory in enumerate(directories, start=1):
            local.load(version, directory)
        for n in range(6):
            local.submit(n, prompt(10 + n, n), 1 + n % 2, new=20)
        said.append(local.run())
    assert local.stats.adapters.device_evictions > 4
    assert said[0] == said[1]


def test_a_reloaded_adapter_never_hits_what_its_old_content_computed(
    tiny_model: Path, make_adapter: Callable[..., Path]
) -> None:
    old, new = make_two(make_adapter)
    tokens = prompt(90, 0)
    local = Local(tiny_model)
    local.load(1, old)
    local.submit(1, tokens, 1)
    local.run()
    local.load(2, new)
    local.submit(2, tokens, 2)
    local.submit(3, tokens)
    local.run()
    assert local.stats.prefix_cache_hits == 0
    local.load(3, old)  # the same content under another version
    local.submit(4, tokens, 3)
    said = local.run()
    assert local.stats.prefix_cache_hits == 89
    assert said[4] == said[1]
    assert said[2] != said[1]


def test_a_failed_step_leaves_no_prefix_behind(tiny_model: Path) -> None:
    local = Local(tiny_model)
    tokens = prompt(90, 0)
    local.submit(1, tokens)
    local.run()
    cache = local.runner._steps.cache  # type: ignore[union-attr]

    def fails(copies: object) -> None:
        raise RuntimeError("no memory")

    copy, cache.copy = cache.copy, fails  # type: ignore[method-assign]
    local.submit(2, tokens)
    local.step()
    assert local.outputs[2][0].stop_reason is StopReason.ERROR
    assert local.stats.kv_cached_tokens == 0
    cache.copy = copy  # type: ignore[method-assign]
    local.submit(3, tokens)
    said = local.run()
    assert said[3] == said[1]


def test_an_aborted_request_serves_others_if_it_gave_a_token(tiny_model: Path) -> None:
    local = Local(tiny_model, max_batch_tokens=40)
    tokens = prompt(90, 0)
    for request_id, steps in ((1, 2), (2, 5)):
        local.submit(request_id, tokens, new=50)
        for _ in range(steps):
            local.step()
        local.engine.handle(Abort(request_id))
        assert (local.engine._rows.cached_tokens > 0) == (request_id == 2)
    del local.outputs[1], local.outputs[2]
    local.submit(3, tokens)
    local.run()
    assert local.stats.prefix_cache_hits == 89


def test_one_sequence_must_fit(tiny_model: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"kv_cache_tokens 255 is less .* 256"):
        Local(tiny_model, kv_cache_tokens=255)
