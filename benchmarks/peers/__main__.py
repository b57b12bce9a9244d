"""Output tokens per second of lorax and of peers, side by side: ``make bench-peers``.

Fixed shape: all requests at once, random token ids as prompts (new ones in every round, so that no
prefix cache helps anyone), temperature 0.8 and top_p 0.8, end of text ignored, adapters of rank 16
on all linear modules. Weights are bfloat16. The peers compute in it too, but for CPUs that have no
instructions for it: there float32 is several times as fast for them, so they get that
(``--peer-dtype``). Within a round each system has its turn while the others are stopped. Before the
rounds of a case each system is prepared for it, and runs it once to warm up.

The last line on stdout is the table as JSON: the medians, null for what could not be measured.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks.adapters import adapters_cache, random_adapters
from benchmarks.command import Result, parser, publish
from benchmarks.measure import digits
from benchmarks.peers.cases import CASES, Case
from benchmarks.peers.child import Child, PeerFailed
from benchmarks.peers.setup_vllm import VLLM_PYTHON, set_up
from benchmarks.plot import Chart
from benchmarks.record import has_bfloat16
from lorax_serve.checkpoint.architectures import read_spec
from lorax_serve.checkpoint.source import resolve_model

SYSTEMS = {
    "ours": (sys.executable, "benchmarks.peers.ours_worker"),
    "peft": (sys.executable, "benchmarks.peers.peft_worker"),
    "vllm": (str(VLLM_PYTHON), "benchmarks.peers.vllm_worker"),
}
LABELS = {"ours": "lorax", "peft": "transformers + PEFT", "vllm": "vLLM CPU"}

# The cases of one group are prepared together and take turns; a group is for some systems.
GROUPS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("base",), tuple(SYSTEMS)),
    (("lora8",), tuple(SYSTEMS)),
    (("lora32",), tuple(SYSTEMS)),
    (("lora1", "mixed_ranks", "mean_rank"), ("ours",)),
)
DTYPES = ("bfloat16", "float32")
HEADLINE = {"base": "base model", "lora8": "8 adapters", "lora32": "32 adapters, 32 requests"}


class Comparison:
    """The systems that take part, and what was measured so far.

    Attributes:
        rates: output tokens per second by system and case, one for each round.
        failed: why systems dropped out.
        versions: of the systems' packages.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.rates: dict[str, dict[str, list[float]]] = {name: {} for name in options.systems}
        self.failed: dict[str, str] = {}
        self.options = options
        self._model = resolve_model(options.model)
        self._vocab_size = read_spec(self._model).vocab_size
        self._children: dict[str, Child] = {}
        for name in options.systems:
            with self._may_fail(name):
                self._children[name] = _start(name)

    @property
    def versions(self) -> dict[str, dict[str, str]]:
        return {name: child.versions for name, child in self._children.items()}

    def measure(self, cases: Sequence[Case], systems: Sequence[str]) -> None:
        """Prepare the systems for the cases, warm them up, then run ``repeats`` rounds."""
        batch = max(case.count(self.options) for case in cases)
        adapters: dict[str, Path] = {}
        for case in cases:
            adapters |= self._adapters(case)
        for name in self._alive(systems):
            with self._may_fail(name):
                dtype = "auto" if name == "ours" else self.options.peer_dtype
                seconds = self._children[name].prepare(self._model, adapters, batch, dtype)
                _say(f"{name}: prepared in {seconds:.1f} s")
                for case in cases:
                    self._run(name, case, -1)
        for number in range(self.options.repeats):
            for name in self._alive(systems):
                for case in cases:
                    with self._may_fail(name):
                        rate = self._run(name, case, number)
                        self.rates[name].setdefault(case.name, []).append(rate)
                        _say(f"{name} {case.name}: {rate:.1f} output tok/s")

    def close(self) -> None:
        """End all workers."""
        for child in self._children.values():
            child.close()

    def _run(self, name: str, case: Case, number: int) -> float:
        adapters = list(self._adapters(case))
        requests = case.workload(self.options, self._vocab_size, adapters, number)
        return sum(r.new_tokens for r in requests) / self._children[name].run(requests)

    def _adapters(self, case: Case) -> dict[str, Path]:
        return random_adapters(adapters_cache(self._model), self._model, case.ranks)

    def _alive(self, systems: Sequence[str]) -> list[str]:
        return [name for name in systems if name in self._children and name not in self.failed]

    @contextmanager
    def _may_fail(self, name: str) -> Iterator[None]:
        try:
            yield
        except (PeerFailed, OSError, subprocess.CalledProcessError) as error:
            self.failed.setdefault(name, str(error))
            _say(f"{name} CANNOT BE MEASURED: {error}")


def _start(name: str) -> Child:
    if name == "vllm":
        set_up()
    return Child(*SYSTEMS[name])


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--systems", type=_systems, default=list(SYSTEMS), help="by commas")
    flags.add_argument(
        "--peer-dtype", choices=DTYPES, default=DTYPES[0] if has_bfloat16() else DTYPES[1]
    )
    Case.add_flags(flags)
    options = flags.parse_args()
    comparison = Comparison(options)
    try:
        for names, systems in GROUPS:
            comparison.measure([CASES[name] for name in names], systems)
    finally:
        comparison.close()
    publish("peers", options, result(comparison))
    sys.exit("ours" in comparison.failed)


def _systems(text: str) -> list[str]:
    names = text.split(",")
    unknown = set(names) - set(SYSTEMS)
    if unknown:
        raise argparse.ArgumentTypeError(f"there are {', '.join(SYSTEMS)}, not {unknown.pop()}")
    return names


def result(comparison: Comparison) -> Result:
    """Medians of the rounds, as a table, a chart, and ratios of ours to each peer."""

    def median(system: str, case: str) -> float | None:
        rates = comparison.rates.get(system, {}).get(case)
        return digits(statistics.median(rates)) if rates else None

    def ratio(above: float | None, below: float | None) -> float | None:
        return digits(above / below) if above and below else None

    ours = {case: median("ours", case) for case in CASES}
    return Result(
        headline={f"{s}_{case}": median(s, case) for s in SYSTEMS for case in HEADLINE},
        details={
            "unit": "output tokens per second",
            "ours": ours,
            "times_peft": {case: ratio(ours[case], median("peft", case)) for case in HEADLINE},
            "times_vllm": {case: ratio(ours[case], median("vllm", case)) for case in HEADLINE},
            "lora8_over_base": {s: ratio(median(s, "lora8"), median(s, "base")) for s in SYSTEMS},
            "mixed_over_mean_rank": ratio(ours["mixed_ranks"], ours["mean_rank"]),
            "failed": comparison.failed,
            "rounds": comparison.rates,
        },
        chart=Chart(
            f"{comparison.options.requests} requests at once, each system in turn",
            "output tokens per second",
            {
                title: {label: median(s, case) for s, label in LABELS.items()}
                for case, title in HEADLINE.items()
            },
        ),
        versions=comparison.versions,
    )


if __name__ == "__main__":
    main()
