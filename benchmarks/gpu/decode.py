"""Steps that decode: batches of several sizes, with no, one, some and all-distinct adapters."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.gpu.bench import Bench, advance, say
from benchmarks.measure import digits
from benchmarks.peers.worker import TEMPERATURE, TOP_P
from lorax_serve.core import BASE, Batch, SamplingParams
from lorax_serve.core import Sequence as Request

__all__ = ["find", "measure", "step_ms"]

_WARM_UP = 3


def measure(bench: Bench) -> dict[str, Any]:
    """Milliseconds of a step, from the host's call to the host's tokens, beside its floor.

    The prompts are computed once. Each case decodes some steps and is then wound back, so that all
    start at the same context.
    """
    sizes = bench.sizes
    rows = [bench.request(row, sizes.context - 1) for row in range(max(sizes.batches))]
    bench.prefill(rows)
    cases: list[dict[str, Any]] = []
    left_out: list[dict[str, int]] = []
    for rank in sizes.ranks:
        most = bench.most_adapters(rank)
        wanted = [(batch, n) for batch in sizes.batches for n in _counts(batch, sizes.distinct)]
        left_out += [{"batch": b, "rank": rank, "distinct": n} for b, n in wanted if n > most]
        bench.fill_slots(rank, min(most, max(n for _, n in wanted)))
        for batch in sizes.batches:
            counts = [0, *(n for at, n in wanted if at == batch and n <= most)]
            cases += _compare(bench, rows[:batch], rank, counts)
            say(f"decode: batch {batch}, rank {rank} done")
    bench.clear_slots()
    result = {
        "context": sizes.context,
        "cases": cases,
        "left_out_for_memory": left_out,
        "base_tax": _base_tax(bench, rows[: sizes.peer_batch]),
        "sampled": _sampled(bench, rows[: sizes.peer_batch]),
    }
    bench.release()
    return result


def find(decode: dict[str, Any], batch: int, rank: int, distinct: int) -> dict[str, Any] | None:
    """The case of these sizes in a result of ``measure``, if it was run."""
    for case in decode["cases"]:
        if (case["batch"], case["rank"], case["distinct"]) == (batch, rank, distinct):
            return dict(case)
    return None


def step_ms(bench: Bench, rows: Sequence[Request], steps: int) -> list[float]:
    """Milliseconds of each of some steps, after a few that are not counted; then winds back."""
    batch = Batch(decodes=list(rows))
    context = len(rows[0].tokens)
    for _ in range(_WARM_UP):
        advance(bench.runner, batch)
    times = [1e3 * bench.seconds(lambda: advance(bench.runner, batch)) for _ in range(steps)]
    for row in rows:
        del row.tokens[context:]
        row.computed = context - 1
    return times


def _counts(batch: int, distinct: Sequence[int]) -> Iterator[int]:
    yield from sorted({*(n for n in distinct if n <= batch), batch})


def _compare(
    bench: Bench, rows: Sequence[Request], rank: int, counts: Sequence[int]
) -> list[dict[str, Any]]:
    """The cases take turns; rows have adapters by turns too."""
    times: dict[int, list[float]] = {count: [] for count in counts}
    for _ in range(bench.sizes.rounds):
        for count in counts:
            for place, row in enumerate(rows):
                row.adapter_slot = place % count if count else BASE
            times[count] += step_ms(bench, rows, bench.sizes.steps)
    for row in rows:
        row.adapter_slot = BASE
    base = statistics.median(times[0])
    found = []
    for count, some in times.items():
        ms = statistics.median(some)
        floor = bench.floor(len(rows), bench.sizes.context, count * bench.adapter_bytes(rank))
        found.append(
            {
                "batch": len(rows),
                "rank": rank,
                "distinct": count,
                "step_ms": digits(ms),
                "floor_ms": digits(floor.ms),
                "over_floor": digits(ms / floor.ms),
                "over_base": digits(ms / base),
                "tb_per_s": digits(floor.bytes / ms / 1e9),
            }
        )
    return found


def _base_tax(bench: Bench, rows: Sequence[Request]) -> dict[str, float]:
    """The same base rows with all slots empty and with all of them full, in turns."""
    rank = bench.sizes.ranks[0]
    times: dict[bool, list[float]] = {False: [], True: []}
    for number in range(2 * bench.sizes.rounds):
        full = number % 4 in (1, 2)
        bench.fill_slots(rank, bench.most_adapters(rank) if full else 0)
        times[full] += step_ms(bench, rows, bench.sizes.steps)
    bench.clear_slots()
    without, resident = (statistics.median(times[full]) for full in (False, True))
    return {
        "batch": len(rows),
        "adapters": bench.most_adapters(rank),
        "step_ms_without": digits(without),
        "step_ms_resident": digits(resident),
        "resident_over_without": digits(resident / without),
    }


def _sampled(bench: Bench, rows: Sequence[Request]) -> dict[str, float]:
    """What drawing from top-p costs beside taking the most probable token."""
    greedy = rows[0].sampling
    times: dict[str, float] = {}
    for name, temperature in (("greedy", 0.0), ("top_p", TEMPERATURE)):
        for row in rows:
            row.sampling = (
                SamplingParams(temperature=temperature, top_p=TOP_P, seed=row.request_id)
                if temperature
                else greedy
            )
        times[name] = statistics.median(step_ms(bench, rows, bench.sizes.steps))
    for row in rows:
        row.sampling = greedy
    return {
        "batch": len(rows),
        **{f"step_ms_{name}": digits(ms) for name, ms in times.items()},
        "top_p_over_greedy": digits(times["top_p"] / times["greedy"]),
    }
