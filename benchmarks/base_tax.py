"""What resident adapters cost traffic that uses none: two engines, one of them with adapters.

The engines are in this process and take turns step by step, in alternating order, each step
decoding a token for every request: a tax of 2 % is less than what a shared machine's speed changes
from one second to the next. What the adapters could slow is all inside of a step.
"""

from __future__ import annotations

import argparse
import os
import queue
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.adapters import adapters_cache, random_adapters
from benchmarks.command import Result, parser, run
from benchmarks.measure import digits
from benchmarks.peers.worker import TEMPERATURE, TOP_P
from benchmarks.plot import Chart
from benchmarks.workloads import fixed_shape
from lorax_serve.checkpoint.source import resolve_model
from lorax_serve.config import EngineConfig
from lorax_serve.core import SamplingParams
from lorax_serve.engine.adapter_loader import AdapterLoader
from lorax_serve.engine.engine import Engine
from lorax_serve.engine.messages import LoadAdapter, Submit
from lorax_serve.model.runner import ModelRunner

RANK = 16


class Local:
    """An engine in this process, with each of the adapters in a slot."""

    def __init__(self, config: EngineConfig, adapters: Sequence[Path]) -> None:
        runner = ModelRunner(config)
        loaded: queue.SimpleQueue[object] = queue.SimpleQueue()
        loader = AdapterLoader(
            runner.modules,
            runner.fold,
            runner.without_copies,
            loaded.put,
            probe="off",
            fingerprint=runner.fingerprint,
        )
        self.engine = Engine(config, runner, loader)
        self.vocab_size = runner.info.vocab_size
        self._ids = 0
        for version, path in enumerate(adapters, 1):
            self.engine.handle(LoadAdapter(version, version, str(path)))
            self.engine.handle(loaded.get())  # type: ignore[arg-type]
            self.submit((1, 2, 3), 1, adapter=version)
        self.finish()

    def submit(self, prompt: Sequence[int], new_tokens: int, adapter: int | None = None) -> None:
        self._ids += 1
        sampling = SamplingParams(temperature=TEMPERATURE, top_p=TOP_P, seed=self._ids)
        self.engine.handle(
            Submit(self._ids, tuple(prompt), adapter, sampling, new_tokens, 0, frozenset())
        )

    def step(self) -> float:
        """Seconds of a step."""
        started = time.perf_counter()
        self.engine.step()
        return time.perf_counter() - started

    def until_decoding(self, requests: int) -> None:
        """Step until all of them decode."""
        while True:
            self.step()
            stats = self.engine.take_report().stats
            if stats.batch_tokens == stats.running == requests:
                return

    def finish(self) -> None:
        while self.engine.busy:
            self.step()
            self.engine.take_report()


async def measure(options: argparse.Namespace) -> Result:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = resolve_model(options.model)
    adapters = random_adapters(adapters_cache(model), model, [RANK] * options.adapters)
    config = EngineConfig(model=options.model)
    without, resident = Local(config, ()), Local(config, list(adapters.values()))
    seconds: dict[str, list[float]] = {"without": [], "resident": []}
    ratios = []
    for number in range(options.repeats):
        shape = {"vocab_size": without.vocab_size, "seed": options.seed + number}
        for request in fixed_shape(
            options.requests, options.prompt_tokens, options.steps + options.requests, **shape
        ):
            for engine in (without, resident):
                engine.submit(request.prompt, request.new_tokens)
        for engine in (without, resident):
            engine.until_decoding(options.requests)
        for pair in range(options.steps):
            if pair % 2:
                one, other = without.step(), resident.step()
            else:
                other, one = resident.step(), without.step()
            seconds["without"].append(one)
            seconds["resident"].append(other)
            ratios.append(one / other)
        for engine in (without, resident):
            engine.finish()
    ms = {name: digits(1e3 * statistics.median(some)) for name, some in seconds.items()}
    in_slots = resident.engine.take_report().stats.adapters.device
    return Result(
        headline={
            "step_ms_without": ms["without"],
            "step_ms_resident": ms["resident"],
            "resident_over_without": digits(statistics.median(ratios)),
            "standard_error": digits(statistics.stdev(ratios) / len(ratios) ** 0.5),
        },
        details={"pairs_of_steps": len(ratios), "adapters_in_slots": in_slots},
        chart=Chart(
            "Requests for the base model only",
            "a step, ms",
            {
                "no adapter loaded": {"lorax": ms["without"]},
                f"{in_slots} adapters resident": {"lorax": ms["resident"]},
            },
        ),
    )


if __name__ == "__main__":
    flags = parser(__doc__)
    flags.add_argument("--adapters", type=int, default=32)
    flags.add_argument("--requests", type=int, default=16)
    flags.add_argument("--prompt-tokens", type=int, default=32)
    flags.add_argument("--steps", type=int, default=100, help="in a round")
    run("base_tax", flags, measure)
