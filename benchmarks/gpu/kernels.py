"""Every call of ``gpu.ops`` at the model's sizes: microseconds, and the bytes it cannot avoid."""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.gpu.arena import plan_of, random_arena
from benchmarks.gpu.bench import Bench, say
from benchmarks.gpu.shapes import BANDWIDTH
from benchmarks.measure import digits
from lorax_serve.gpu import ops as gpu_ops
from lorax_serve.gpu.lora import SiteShape
from lorax_serve.gpu.pages import PAGE, LayerPages, Rope
from lorax_serve.model.decoders.base_model import rope_tables

__all__ = ["measure"]

# What a case reads goes through this many bytes before it comes again: four times an H100's cache.
_ROTATED = 200 << 20
_MOST_COPIES = 32
_WARM_UP = 2


@dataclass(frozen=True, slots=True)
class Case:
    """A call to time.

    Attributes:
        name: of the call, and of the site for LoRA and linears.
        rows: of the step; ``distinct`` adapters of ``rank`` where there are any.
        nbytes: what the call must read and write.
        copies: how many sets of arguments there are.
        run: does it with one set.
    """

    name: str
    rows: int
    nbytes: int
    copies: int
    run: Callable[[int], object]
    distinct: int = 0
    rank: int = 0


def measure(bench: Bench) -> dict[str, Any]:
    """On a GPU the calls are captured in a CUDA graph, so that the host's time is not in them; on a
    CPU the references in torch run instead.

    ``share`` is of the floor alone, bytes at ``BANDWIDTH``; ``share_of_roof`` takes into account
    that even an empty kernel takes ``launch_us``.
    """
    on_gpu = bench.device.type == "cuda"
    ops = gpu_ops.load(bench.device, triton=on_gpu)
    nothing = torch.zeros(1, device=bench.device)
    launch = _microseconds(bench, Case("nothing", 1, 4, 1, lambda _: nothing.zero_()))
    rows = []
    for case in _cases(bench, ops):
        row: dict[str, Any] = {
            "name": case.name,
            "rows": case.rows,
            "distinct": case.distinct,
            "rank": case.rank,
            "bytes": case.nbytes,
        }
        try:
            us = _microseconds(bench, case)
        except Exception as error:  # one kernel's defect must not cost the others their figures
            traceback.print_exc()
            row["error"] = f"{type(error).__name__}: {error}"
        else:
            floor = 1e6 * case.nbytes / BANDWIDTH
            row |= {
                "us": digits(us),
                "floor_us": digits(floor),
                "tb_per_s": digits(case.nbytes / us / 1e6),
                "share": digits(floor / us),
                "share_of_roof": digits((launch + floor) / us),
            }
        rows.append(row)
    say(f"kernels: {len(rows)} cases done")
    return {
        "kind": "triton" if on_gpu else "torch",
        "context": bench.sizes.context,
        "bandwidth_tb_per_s": BANDWIDTH / 1e12,
        "launch_us": digits(launch),
        "cases": rows,
    }


def _microseconds(bench: Bench, case: Case) -> float:
    """Of one call, over all sets of arguments in turn."""
    sets, repeats = range(case.copies), bench.sizes.kernel_repeats
    for _ in range(_WARM_UP):
        for each in sets:
            case.run(each)
    if bench.device.type != "cuda":
        started = time.perf_counter()
        for _ in range(repeats):
            for each in sets:
                case.run(each)
        return 1e6 * (time.perf_counter() - started) / (repeats * case.copies)
    torch.cuda.synchronize()
    # Enough calls in a graph that starting it does not count.
    calls = list(sets) * max(1, _MOST_COPIES // case.copies)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for each in calls:
            case.run(each)
    graph.replay()
    event: Any = torch.cuda.Event
    start, end = (event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        graph.replay()
    end.record()
    end.synchronize()
    ms: float = start.elapsed_time(end)
    return 1e3 * ms / (repeats * len(calls))


def _cases(bench: Bench, ops: gpu_ops.Ops) -> Iterator[Case]:
    for rows in bench.sizes.kernel_rows:
        yield from _elementwise(bench, ops, rows)
        yield _rotate(bench, ops, rows)
        yield _attention(bench, ops, rows)
        yield from _draws(bench, ops, rows)
        yield from _linears(bench, rows)
    yield from _lora(bench, ops)


def _random(bench: Bench, *size: int) -> torch.Tensor:
    return torch.empty(size, dtype=bench.dtype, device=bench.device).normal_()


def _copies(nbytes: int) -> int:
    return min(_MOST_COPIES, max(1, math.ceil(_ROTATED / max(1, nbytes))))


def _elementwise(bench: Bench, ops: gpu_ops.Ops, rows: int) -> Iterator[Case]:
    spec, item = bench.llama.spec, bench.dtype.itemsize
    size, inner, eps = spec.hidden_size, spec.intermediate_size, spec.norm_eps
    weight = _random(bench, size)
    row = rows * size * item
    copies = _copies(4 * row)
    xs = [_random(bench, rows, size) for _ in range(copies)]
    ys = [_random(bench, rows, size) for _ in range(copies)]
    yield Case(
        "rms_norm",
        rows,
        2 * row + weight.nbytes,
        copies,
        lambda i: ops.rms_norm(xs[i], weight, eps),
    )
    yield Case(
        "add_rms_norm",
        rows,
        4 * row + weight.nbytes,
        copies,
        lambda i: ops.add_rms_norm(xs[i], ys[i], weight, eps),
    )
    nbytes = 3 * rows * inner * item
    gates = [_random(bench, rows, 2 * inner) for _ in range(_copies(nbytes))]
    yield Case("silu_mul", rows, nbytes, len(gates), lambda i: ops.silu_mul(gates[i]))


def _pages(bench: Bench, rows: int) -> LayerPages:
    """One layer's pages, each row's scattered as in a cache that has been in use for a while."""
    spec = bench.llama.spec
    each = math.ceil(bench.sizes.context / PAGE)
    size = (rows * each, spec.num_kv_heads, PAGE, spec.head_dim)
    table = torch.randperm(rows * each, dtype=torch.int32).view(rows, each)
    return LayerPages(_random(bench, *size), _random(bench, *size), table.to(bench.device))


def _places(bench: Bench, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions at the end of the context, and KV slots: int32 ``[rows]``."""
    kind: Any = {"dtype": torch.int32, "device": bench.device}
    return torch.full((rows,), bench.sizes.context - 1, **kind), torch.arange(rows, **kind)


def _rotate(bench: Bench, ops: gpu_ops.Ops, rows: int) -> Case:
    spec, item = bench.llama.spec, bench.dtype.itemsize
    heads = spec.num_heads + 2 * spec.num_kv_heads
    nbytes = 2 * rows * heads * spec.head_dim * item + rows * spec.head_dim * 4
    copies = min(4, _copies(nbytes))  # the pages take room
    qkvs = [_random(bench, rows, heads, spec.head_dim) for _ in range(copies)]
    pages = [_pages(bench, rows) for _ in range(copies)]
    cos, sin = (table[: bench.sizes.max_length].to(bench.device) for table in rope_tables(spec))
    rope, (positions, slots) = Rope(cos, sin), _places(bench, rows)
    return Case(
        "rotate_and_store",
        rows,
        nbytes,
        copies,
        lambda i: ops.rotate_and_store(qkvs[i], positions, slots, pages[i], rope),
    )


def _attention(bench: Bench, ops: gpu_ops.Ops, rows: int) -> Case:
    spec, item = bench.llama.spec, bench.dtype.itemsize
    heads, dim = spec.num_heads, spec.head_dim
    cached = 2 * rows * bench.sizes.context * spec.num_kv_heads * dim * item
    copies = _copies(cached)
    qkvs = [_random(bench, rows, heads + 2 * spec.num_kv_heads, dim) for _ in range(copies)]
    pages = [_pages(bench, rows) for _ in range(copies)]
    positions, slots = _places(bench, rows)
    return Case(
        "decode_attention",
        rows,
        cached + 2 * rows * heads * dim * item,
        copies,
        lambda i: ops.decode_attention(qkvs[i][:, :heads], positions, slots, pages[i], dim**-0.5),
    )


def _draws(bench: Bench, ops: gpu_ops.Ops, rows: int) -> Iterator[Case]:
    vocab = bench.llama.spec.vocab_size
    nbytes = rows * vocab * 4
    logits = [torch.randn(rows, vocab, device=bench.device) for _ in range(min(8, _copies(nbytes)))]

    def full(value: float, dtype: torch.dtype) -> torch.Tensor:
        return torch.full((rows,), value, dtype=dtype, device=bench.device)

    seeds = torch.arange(rows, dtype=torch.int64, device=bench.device)
    draws = full(7, torch.int32)
    for name, temperature, top_k, top_p in (
        ("draw greedy", 0.0, 0, 1.0),
        ("draw plain", 1.0, 0, 1.0),
        ("draw top-p", 0.8, 0, 0.8),
    ):
        heat, most, mass = (
            full(temperature, torch.float32),
            full(top_k, torch.int32),
            full(top_p, torch.float32),
        )

        def run(i: int, heat: Any = heat, most: Any = most, mass: Any = mass) -> object:
            return ops.draw(logits[i], heat, most, mass, seeds, draws)

        yield Case(name, rows, nbytes, len(logits), run)


def _linears(bench: Bench, rows: int) -> Iterator[Case]:
    """torch's own matrix products, which are most of a step: what the others stand beside."""
    item = bench.dtype.itemsize
    layers = bench.llama.layers
    for name in ("qkv", "o", "gate_up", "down"):
        weights = [getattr(layer, name).weight for layer in layers]
        out, inner = weights[0].shape
        x = _random(bench, rows, inner)
        yield Case(
            f"linear {name}",
            rows,
            out * inner * item + rows * (out + inner) * item,
            len(weights),
            lambda i, x=x, weights=weights: F.linear(x, weights[i]),  # type: ignore[misc]
        )


def _lora(bench: Bench, ops: gpu_ops.Ops) -> Iterator[Case]:
    spec = bench.llama.spec
    sites = [
        SiteShape(index, site.in_features, tuple(part.length for part in site.slices))
        for index, site in enumerate(spec.sites())
    ]
    most_rows = max(bench.sizes.kernel_rows)
    first, *others = bench.sizes.ranks
    some = min(8, most_rows)
    middle = min(32, most_rows)
    wanted = {
        first: [(1, 1), (middle, 1), (middle, some), (middle, middle), (most_rows, some)],
        **{rank: [(middle, some)] for rank in others},
    }
    for rank, batches in wanted.items():
        count = max(distinct for _, distinct in batches)
        arena, starts = random_arena(sites, rank, count, bench.dtype, bench.device)
        for number, name in enumerate(("qkv", "o", "gate_up", "down")):
            own = sites[number::4]
            for rows, distinct in dict.fromkeys(batches):
                # Each site's width is compiled for itself: two of them everywhere are enough.
                if name in ("qkv", "down") or (rows, distinct) == (middle, some):
                    yield from _lora_pair(
                        bench, ops, arena, starts[:distinct], name, own, rows, rank
                    )


def _lora_pair(
    bench: Bench,
    ops: gpu_ops.Ops,
    arena: torch.Tensor,
    starts: list[int],
    name: str,
    sites: list[SiteShape],
    rows: int,
    rank: int,
) -> Iterator[Case]:
    """Shrink and expand of one kind of site, a layer after the other."""
    item, site = bench.dtype.itemsize, sites[0]
    plan = plan_of(rows, starts, rank, bench.device)
    x = _random(bench, rows, site.in_features)
    ys = [_random(bench, rows, sum(site.widths)) for _ in sites]
    distinct, slices, out = len(starts), len(site.widths), sum(site.widths)
    between = rows * slices * rank * 4
    kind: Any = {"distinct": distinct, "rank": rank}
    yield Case(
        f"lora_shrink {name}",
        rows,
        item * site.in_features * (distinct * rank * slices + rows) + between,
        len(sites),
        lambda i: ops.lora_shrink(x, arena, plan, sites[i]),
        **kind,
    )
    hs: dict[int, torch.Tensor] = {}

    def expand(i: int) -> None:
        if i not in hs:  # the first time is a warm-up
            hs[i] = ops.lora_shrink(x, arena, plan, sites[i])
        ops.lora_expand(hs[i], ys[i], arena, plan, sites[i], None)

    yield Case(
        f"lora_expand {name}",
        rows,
        item * out * (distinct * rank + 2 * rows) + between,
        len(sites),
        expand,
        **kind,
    )
