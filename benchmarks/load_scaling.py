"""Does loading an adapter cost more when a thousand are loaded than when ten are?

Two servers, ``lorax-serve`` over gRPC, take turns: one has few adapters, one has many; each loads
one more, and so on. ``state``: with a state directory. ``in_place``: without one. ``evicting``:
with one, and with host memory for ``--resident`` adapters, so that each load sends another one to
disk. Also what else could grow: listing them, a restart, a pass of the watch over a source in which
nothing has changed, and memory.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.adapters import adapter_bytes, random_adapters
from benchmarks.command import Result, parser, run
from benchmarks.measure import digits, medians
from benchmarks.ours import GrpcServer
from benchmarks.plot import Chart
from lorax_serve.checkpoint.source import cache_dir, resolve_model
from lorax_serve.config import EngineConfig
from lorax_serve.core import AdapterInfo
from lorax_serve.registry.library import Library
from lorax_serve.registry.reconciler import Reconciler
from lorax_serve.registry.registry import AdapterRegistry
from lorax_serve.sources import FetchLimits, open_source

CASES = {
    "state": "with --state",
    "in_place": "without --state",
    "evicting": "with --state, evicting",
}
SOURCE = "source"
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj")


class Side:
    """A server, and the adapters that it is to load one after the other.

    Attributes:
        loads: milliseconds of each load so far.
        cpu: milliseconds of processor time of all loads but the first ones.
    """

    def __init__(self, server: GrpcServer, adapters: Sequence[str], below: bool) -> None:
        self.server = server
        self.loads: list[float] = []
        self.cpu = 0.0
        # The path of each in what the server loads from.
        self._next = iter([(name, f"{SOURCE}/{name}" if below else name) for name in adapters])

    async def load(self, count: int) -> float:
        """Load so many more; returns the milliseconds that the last one took."""
        for name, path in itertools.islice(self._next, count):
            started = time.perf_counter()
            await self.server.client.load_adapter(name, path)
            self.loads.append(1e3 * (time.perf_counter() - started))
        return self.loads[-1]

    async def load_alone(self) -> float:
        """Load one more while the other server is paused; returns its milliseconds."""
        before = self.server.cpu_seconds
        taken = await self.load(1)
        self.cpu += 1e3 * (self.server.cpu_seconds - before)
        return taken

    async def list(self) -> float:
        """Milliseconds of listing what is loaded."""
        started = time.perf_counter()
        found = await self.server.client.list_adapters()
        if len(found) != len(self.loads):
            raise RuntimeError(f"{len(found)} adapters are listed, not {len(self.loads)}")
        return 1e3 * (time.perf_counter() - started)


async def measure(options: argparse.Namespace) -> Result:
    model = resolve_model(options.model)
    size = adapter_bytes(model, options.rank, LINEARS)
    # On the disk where servers keep their state, not on one in memory.
    with tempfile.TemporaryDirectory(dir=cache_dir()) as disk:
        root = Path(disk)
        ranks = [options.rank] * options.many
        adapters = list(random_adapters(root / SOURCE, model, ranks, linears=LINEARS))
        cases = {}
        for name in options.cases:
            room = options.resident if name == "evicting" else 2 * options.many
            config = EngineConfig(model=options.model, max_adapter_bytes=int(1.02 * room * size))
            with tempfile.TemporaryDirectory(dir=disk) as place:
                states = None if name == "in_place" else Path(place)
                cases[name] = await one_case(config, root, states, adapters, options)
    ratios = {
        f"{what}_ratio_{name}": case["figures"][f"{what}_ratio"]
        for name, case in cases.items()
        for what in ("load", "cpu")
    }
    return Result(
        headline={**ratios, "adapters": [options.few, options.many]},
        details={"cases": cases, "adapter_bytes": size},
        chart=Chart(
            "Loading one more adapter",
            "milliseconds",
            {
                CASES[name]: {
                    f"beside {options.few}": case["figures"]["load_ms_few"],
                    f"beside {options.many}": case["figures"]["load_ms_many"],
                }
                for name, case in cases.items()
            },
        ),
    )


async def one_case(
    config: EngineConfig,
    root: Path,
    states: Path | None,
    adapters: Sequence[str],
    options: argparse.Namespace,
) -> dict[str, Any]:
    """All figures of one case.

    Args:
        config: of the engine.
        root: has the source, and nothing else right below it that a start would load.
        states: where the servers keep their state; None: they keep none.
        adapters: their names.
    """

    async def start(name: str) -> GrpcServer:
        if states is None:
            return await GrpcServer.start(config, root)
        return await GrpcServer.start(config, root / SOURCE, states / name, on_demand=True)

    async with await start("few") as server, await start("many") as other:
        few, many = (Side(each, adapters, states is None) for each in (server, other))
        figures = await in_turns(few, many, options)
        memory = {"few": server.memory_bytes, "many": other.memory_bytes}
    hundreds = [many.loads[at : at + 100] for at in range(0, len(many.loads), 100)]
    found: dict[str, Any] = {
        "figures": figures,
        "load_ms_by_hundred": [digits(statistics.median(some)) for some in hundreds],
        "memory_bytes": {
            name: dict(zip(("server", "engine"), each, strict=True))
            for name, each in memory.items()
        },
    }
    if states is not None:
        async with await start("empty") as server, await start("many") as other:
            found["start_seconds"] = {
                "empty": digits(server.start_seconds),
                "many": digits(other.start_seconds),
            }
        found["pass_ms"] = digits(await watch_pass(root / SOURCE, states / "many", options.repeats))
    return found


async def in_turns(few: Side, many: Side, options: argparse.Namespace) -> dict[str, float]:
    """Fill both servers up; then they load one more each, by turns; in the end they list them."""
    loads = options.repeats * options.loads
    await few.load(options.few - 1)
    await many.load(options.many - loads)
    sides = {"few": few, "many": many}
    for side in sides.values():
        side.server.pause()

    async def turns(
        number: int, what: str, work: Callable[[Side], Awaitable[float]]
    ) -> dict[str, float]:
        figures = {}
        for name, side in list(sides.items())[:: -1 if number % 2 else 1]:
            side.server.resume()
            figures[f"{what}_ms_{name}"] = await work(side)
            side.server.pause()
        return figures

    # Listing a thousand would leave a server's caches to its next load in another state.
    found = medians([await turns(number, "load", Side.load_alone) for number in range(loads)])
    found |= medians([await turns(number, "list", Side.list) for number in range(options.loads)])
    for side in sides.values():
        side.server.resume()
    # A process's clock ticks in steps of several milliseconds: their sum is right, each is not.
    found |= {f"cpu_ms_{name}": digits(side.cpu / loads) for name, side in sides.items()}
    found |= {
        f"{what}_ratio": digits(found[f"{what}_ms_many"] / found[f"{what}_ms_few"])
        for what in ("load", "cpu")
    }
    return found


class NoEngine:
    """Takes every adapter at once: what a pass of the watch finds unchanged never gets to it."""

    async def load_adapter(self, version: int, path: str) -> AdapterInfo:
        return AdapterInfo(Path(path).name, 1, 1, 1)


async def watch_pass(source: Path, state: Path, repeats: int) -> float:
    """Median milliseconds of a pass of the watch over a source that has not changed."""
    library = Library(state, open_source(str(source)), FetchLimits(1 << 30, 60.0), history=4)
    try:
        engine: Any = NoEngine()  # asked for nothing else
        registry = AdapterRegistry(engine, library, history=4)
        reconciler = Reconciler(registry, library, from_source=True)
        await reconciler.run_once()  # which restores them
        times = []
        for _ in range(repeats):
            started = time.perf_counter()
            await reconciler.run_once()
            times.append(1e3 * (time.perf_counter() - started))
        if reconciler.failures:
            raise RuntimeError(f"not all adapters are there: {reconciler.failures}")
    finally:
        library.close()
    return statistics.median(times)


if __name__ == "__main__":
    flags = parser(__doc__)
    flags.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    flags.add_argument("--few", type=int, default=10, help="the first load of few is the N-th")
    flags.add_argument("--many", type=int, default=1000, help="the last load of many is the N-th")
    flags.add_argument("--loads", type=int, default=40, help="of each server in each round")
    flags.add_argument("--rank", type=int, default=8)
    flags.add_argument("--resident", type=int, default=8, help="that memory holds when evicting")
    run("load_scaling", flags, measure)
