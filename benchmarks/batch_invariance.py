"""What ``--batch-invariant`` costs, and how often an answer depends on others without it.

Cost: two engines, one of each mode, take turns at the same requests, under adapters and none, in a
closed loop. ``mixed``: the headline's shape; ``decode``: short prompts, long answers; ``prefill``:
the reverse; ``prefix``: prompts that begin as the last one under the same adapter did. A ratio is
the median of the rounds' own ratios.

Divergence: conversations of two turns, first alone and without prefix cache, then ``--passes``
times in groups of random sizes, at random times, with it. How many answers are other ones? In the
invariant mode, one is an error.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.adapters import adapters_cache, random_adapters
from benchmarks.command import Result, parser, run
from benchmarks.divergence import Divergence, among_others, answered_alone, compare, openings
from benchmarks.measure import Run, Turn, alternate, digits, medians
from benchmarks.ours import OfflineEngine
from benchmarks.plot import Chart
from benchmarks.workloads import Request, fixed_shape
from lorax_serve.checkpoint.source import resolve_model
from lorax_serve.config import EngineConfig

RANK = 16
MODES: dict[str, dict[str, Any]] = {
    "bfloat16": {"dtype": "bfloat16", "batch_invariant": False},
    "bfloat16_invariant": {"dtype": "bfloat16", "batch_invariant": True},
    "float32": {"dtype": "float32", "batch_invariant": False},
}
COMPARED = ("bfloat16", "bfloat16_invariant")
"""By their cost."""
TOTAL = "total_tokens_per_second"

Figures = dict[str, float]


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a case's requests: ``each`` of every adapter, the first ``shared`` tokens the same."""

    prompt_tokens: int
    new_tokens: int
    shared: int = 0
    each: int = 3

    def requests(self, names: Sequence[str | None], *, vocab_size: int, seed: int) -> list[Request]:
        """The adapters take turns."""
        work = fixed_shape(
            self.each * len(names),
            self.prompt_tokens,
            self.new_tokens,
            vocab_size=vocab_size,
            seed=seed,
            adapters=names,
        )
        begin = {request.adapter: request.prompt[: self.shared] for request in work}
        return [
            replace(request, prompt=begin[request.adapter] + request.prompt[self.shared :])
            for request in work
        ]


CASES = {
    "mixed": Shape(128, 64),
    "decode": Shape(16, 128),
    "prefill": Shape(1024, 16, each=1),
    "prefix": Shape(544, 32, shared=512),
}


async def measure(options: argparse.Namespace) -> Result:
    model = resolve_model(options.model)
    adapters = random_adapters(adapters_cache(model), model, [RANK] * options.adapters)
    rounds = await cost(options, adapters)
    figures = {
        case: {mode: medians(some) for mode, some in by_mode.items()}
        for case, by_mode in rounds.items()
    }
    ratios = {case: ratio(*by_mode.values()) for case, by_mode in rounds.items()}
    divergence = await diverging(options, adapters)
    return Result(
        headline={
            "invariant_over_default": {case: some[TOTAL] for case, some in ratios.items()},
            "other_answers": {
                mode: {kind: digits(found.rate) for kind, found in some.items()}
                for mode, some in divergence.items()
            },
        },
        details={
            "cases": {case: asdict(shape) for case, shape in CASES.items()},
            "figures": figures,
            "ratios": ratios,
            "divergence": {
                mode: {kind: asdict(found) for kind, found in some.items()}
                for mode, some in divergence.items()
            },
        },
        chart=Chart(
            "Batch invariance",
            "tokens per second, prompts included",
            {
                case: {
                    label: by_mode[mode][TOTAL]
                    for label, mode in zip(("default", "invariant"), COMPARED, strict=True)
                }
                for case, by_mode in figures.items()
            },
        ),
    )


async def cost(
    options: argparse.Namespace, adapters: Mapping[str, Path]
) -> dict[str, dict[str, list[Figures]]]:
    """The figures of every round, by case and mode."""
    names = [None, *adapters]
    async with contextlib.AsyncExitStack() as stack:
        engines = {}
        for mode in COMPARED:
            engine = await OfflineEngine.start(config(options, mode), adapters)
            engines[mode] = await stack.enter_async_context(engine)

        def turn(engine: OfflineEngine, case: str) -> Turn:
            def requests(number: int) -> list[Request]:
                # No prompt comes twice: the prefix cache helps where it is to.
                seed = options.seed + list(CASES).index(case) + len(CASES) * (number + 1)
                return CASES[case].requests(names, vocab_size=engine.vocab_size, seed=seed)

            return Turn(engine, requests, options.in_flight)

        found = {}
        for case in CASES:
            turns = {mode: turn(engine, case) for mode, engine in engines.items()}
            runs = await alternate(turns, options.repeats)
            found[case] = {mode: [figures_of(each) for each in some] for mode, some in runs.items()}
    return found


def figures_of(run: Run) -> Figures:
    """A run's, and the rate of all tokens, prompts included."""
    tokens = sum(len(trace.request.prompt) + len(trace.tokens) for trace in run.traces)
    return {TOTAL: tokens / run.seconds, **run.figures()}


def ratio(default: Sequence[Figures], invariant: Sequence[Figures]) -> Figures:
    """Of each figure, the median over rounds."""
    pairs = zip(default, invariant, strict=True)
    return medians({name: other[name] / one[name] for name in one} for one, other in pairs)


async def diverging(
    options: argparse.Namespace, adapters: Mapping[str, Path]
) -> dict[str, dict[str, Divergence]]:
    """By mode, then by turn and kind of request.

    Raises:
        RuntimeError: an answer is another one in an invariant mode.
    """

    # What is said does not depend on the number of threads, but small steps of several threads
    # mostly wait for each other if the machine has other work.
    def one_thread(mode: str, *, prefix_caching: bool) -> EngineConfig:
        return replace(config(options, mode), threads=1, prefix_caching=prefix_caching)

    async with await OfflineEngine.start(config(options, "bfloat16_invariant")) as engine:
        first = await openings(
            engine,
            options.conversations,
            (8, options.longest),
            options.new_tokens,
            [None, *adapters],
            seed=options.seed,
        )
    found = {}
    for mode, settings in MODES.items():
        uncached = one_thread(mode, prefix_caching=False)
        async with await OfflineEngine.start(uncached, adapters) as engine:
            conversations = await answered_alone(engine, first)
        cached = one_thread(mode, prefix_caching=True)
        async with await OfflineEngine.start(cached, adapters) as engine:
            again = [
                await among_others(
                    engine,
                    conversations,
                    options.together,
                    options.within,
                    seed=options.seed + number,
                )
                for number in range(options.passes)
            ]
        found[mode] = compare(conversations, again)
        if settings["batch_invariant"] and any(some.different for some in found[mode].values()):
            raise RuntimeError(f"answers depend on others in the invariant mode: {found[mode]}")
    return found


def config(options: argparse.Namespace, mode: str) -> EngineConfig:
    return EngineConfig(model=options.model, kernels="compiled", **MODES[mode])


if __name__ == "__main__":
    flags = parser(__doc__)
    flags.add_argument("--adapters", type=int, default=8)
    flags.add_argument("--in-flight", type=int, default=8)
    flags.add_argument("--conversations", type=int, default=72)
    flags.add_argument("--longest", type=int, default=320, help="prompt of a first turn")
    flags.add_argument("--new-tokens", type=int, default=64, help="of an answer")
    flags.add_argument("--together", type=int, default=16, help="conversations at once, at most")
    flags.add_argument("--within", type=float, default=1.0, help="seconds in which they come")
    flags.add_argument("--passes", type=int, default=2)
    run("batch_invariance", flags, measure)
