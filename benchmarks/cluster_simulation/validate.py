"""Three real replicas against the simulation, under the same arrivals.

Each replica is the server's engine in a process of its own, with one thread, few slots and host
memory for few of its adapters, so that loads happen. They share the machine with each other and
with whatever else runs on it: what that costs is not for the simulation to foretell. So in each run
the costs of steps and loads are fitted to that run's own, together with the machine's pace in each
window of a few seconds. What the simulation must then find by itself is the rest: where requests
find their adapters, how many are loaded, how long requests wait, TTFT, throughput.

Rounds in turns, each after the adapters were dropped and loaded again; figures are of all rounds
together.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.adapters import random_adapters
from benchmarks.cluster_simulation.cluster import Cluster
from benchmarks.cluster_simulation.costs import fit, pace_of
from benchmarks.cluster_simulation.figures import of_jobs
from benchmarks.cluster_simulation.real import RealReplicas, Work
from benchmarks.cluster_simulation.replica import Job, Limits
from benchmarks.cluster_simulation.routing import POLICIES
from benchmarks.cluster_simulation.workload import jobs
from benchmarks.command import Result, parser, publish
from benchmarks.measure import digits
from benchmarks.plot import Chart
from lorax_serve.config import EngineConfig

RANK = 16
ROUTERS = ("round_robin", "ring_hash")
LENGTH = 256
GIVEN = ("number", "arrival", "adapter", "prompt_tokens", "new_tokens")
JUDGED = ("adapter_loads", "hit_rate", "ttft_ms_p50", "ttft_ms_p99", "output_tokens_per_second")


class Sample(NamedTuple):
    """The jobs of a run, and how many adapters were loaded in it."""

    jobs: list[Job]
    loads: int


def measure(options: argparse.Namespace) -> Result:
    with tempfile.TemporaryDirectory() as place:
        model = Path(place) / "model"
        save_model(model)
        paths = random_adapters(Path(place) / "adapters", model, [RANK] * options.adapters)
        config = EngineConfig(
            model=str(model),
            threads=1,
            max_batch_size=options.slots,
            adapter_slots=options.slots,
            max_adapter_bytes=options.resident * adapter_size(model),
            max_sequence_length=LENGTH,
            prefix_caching=False,
        )
        replicas = RealReplicas(config, dict(enumerate(paths.values())), options.replicas)
        try:
            return compare(options, config, replicas)
        finally:
            replicas.close()


def compare(options: argparse.Namespace, config: EngineConfig, replicas: RealReplicas) -> Result:
    """Rounds of real runs, each simulated."""
    real: dict[str, list[Sample]] = {name: [] for name in ROUTERS}
    simulated: dict[str, list[Sample]] = {name: [] for name in ROUTERS}
    costs = []
    for number in range(options.repeats):
        for name in ROUTERS[:: 1 if number % 2 else -1]:
            work = arrivals(options, number)
            replicas.reset()
            did = replicas.run(POLICIES[name](), work, options.seed + number)
            real[name].append(Sample(work, len(did.loads)))
            pace = pace_of(did.steps, options.window)
            found = fit(did.steps, did.loads, did.wakes, pace)
            costs.append(found.as_json() | {"pace": [digits(f) for f in pace.factors]})
            limits = limits_of(config, replicas.adapter_bytes)
            for draw in range(options.draws):
                seed = 1000 * (options.seed + number) + draw
                cluster = Cluster(
                    POLICIES[name](), limits, found, options.replicas, seed=seed, pace=pace
                )
                simulated[name].append(simulate(cluster, again(work), options))
            print(f"{name}: {_busy(did, options):.0%} busy", file=sys.stderr, flush=True)
    cases = {
        name: {"real": _pooled(real[name]), "simulated": _pooled(simulated[name])}
        for name in ROUTERS
    }
    errors = {
        name: {
            figure: digits(found["simulated"][figure] / found["real"][figure] - 1)
            for figure in JUDGED
        }
        for name, found in cases.items()
    }
    worst = max(abs(error) for some in errors.values() for error in some.values())
    return Result(
        headline={
            "worst_error": worst,
            "within": options.within,
            "believed": worst <= options.within,
        },
        details={
            "errors": errors,
            "figures": cases,
            "rounds": {
                kind: {name: [_pooled([each]) for each in some[name]] for name in ROUTERS}
                for kind, some in (("real", real), ("simulated", simulated))
            },
            "costs": costs,
        },
        chart=Chart(
            f"{options.replicas} replicas, {options.resident} of {options.adapters} adapters each",
            "TTFT, ms",
            {
                f"{name.replace('_', ' ')}, {figure[-3:]}": {
                    kind: found[kind][figure] for kind in ("real", "simulated")
                }
                for name, found in cases.items()
                for figure in ("ttft_ms_p50", "ttft_ms_p99")
            },
        ),
    )


def arrivals(options: argparse.Namespace, number: int) -> list[Job]:
    """The jobs of a round."""
    return jobs(
        int(options.rate * options.seconds),
        options.rate,
        options.adapters,
        exponent=options.exponent,
        prompt_tokens=(16, 48),
        new_tokens=(8, 24),
        seed=options.seed + number,
    )


def again(work: list[Job]) -> list[Job]:
    """The same jobs as they came to their replicas."""
    came = sorted(work, key=lambda job: job.arrival)
    return [Job(*(getattr(job, name) for name in GIVEN)) for job in came]


def simulate(cluster: Cluster, work: list[Job], options: argparse.Namespace) -> Sample:
    """A run that begins as a real one does: with all adapters loaded in their order."""
    for replica in cluster.replicas.values():
        for adapter in range(options.adapters):
            replica.know(adapter)
    cluster.run(work)
    return Sample(work, sum(replica.read for replica in cluster.replicas.values()))


def limits_of(config: EngineConfig, adapter_bytes: int, fetch_seconds: float = 0.0) -> Limits:
    """A simulated replica with the settings of a real one on a CPU."""
    batch = config.batch_limits(on_gpu=False)
    return Limits(
        adapter_bytes,
        config.max_adapter_bytes,
        config.adapter_slots,
        batch.size,
        batch.tokens,
        config.max_prefill_slowdown,
        config.adapter_quantum,
        config.max_waiting,
        max_length=config.max_sequence_length or 4096,
        fetch_seconds=fetch_seconds,
    )


def adapter_size(model: Path) -> int:
    """Bytes of an adapter as the engine counts them."""
    import torch

    from lorax_serve.checkpoint.architectures import read_spec
    from lorax_serve.model.build import choose_dtype
    from lorax_serve.model.sizes import adapter_bytes, form_of, target_modules

    spec = read_spec(model)
    dtype = choose_dtype(EngineConfig(model=str(model)), spec, torch.device("cpu"))
    paths = target_modules(spec, "all-linear")
    return adapter_bytes(spec, RANK, paths, dtype, form_of(spec, dtype, on_gpu=False))


def save_model(directory: Path) -> None:
    """A Llama of 4 M random parameters: steps of milliseconds, so that minutes hold thousands."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=LENGTH,
    )
    model: Any = LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(directory)


def _pooled(samples: list[Sample]) -> dict[str, float]:
    """Of all jobs of several runs; loads and throughput of one in the mean."""
    found = of_jobs([job for sample in samples for job in sample.jobs])
    rates = [of_jobs(sample.jobs)["output_tokens_per_second"] for sample in samples]
    return {
        "adapter_loads": digits(sum(sample.loads for sample in samples) / len(samples)),
        "hit_rate": digits(found["found_device"] + found["found_host"]),
        **found,
        "output_tokens_per_second": digits(sum(rates) / len(rates)),
    }


def _busy(did: Work, options: argparse.Namespace) -> float:
    return sum(step.seconds for step in did.steps) / float(options.seconds * options.replicas)


if __name__ == "__main__":
    flags = parser(__doc__, repeats=3)
    flags.add_argument("--replicas", type=int, default=3)
    flags.add_argument("--adapters", type=int, default=64)
    flags.add_argument("--exponent", type=float, default=1.0)
    flags.add_argument("--slots", type=int, default=8, help="and sequences at once")
    flags.add_argument("--resident", type=int, default=16, help="adapters that memory holds")
    flags.add_argument("--rate", type=float, default=60.0, help="requests a second, of all")
    flags.add_argument("--seconds", type=float, default=30.0, help="of each run")
    flags.add_argument("--window", type=float, default=0.5, help="seconds of one pace")
    flags.add_argument("--draws", type=int, default=5, help="simulations of each run")
    flags.add_argument("--within", type=float, default=0.15)
    given = flags.parse_args()
    given.model = "random, 4 M parameters"  # whatever --model says: the result must not name it
    publish("cluster_validation", given, measure(given))
