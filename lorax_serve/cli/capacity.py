"""How many adapters, sequences and tokens a second a replica has, and how many replicas it takes.

Plain numbers. Memory is laid out as the engine does it (``model.build``); time is the roofline's:
what must be read from memory or multiplied at the least. So rates are ceilings and replicas floors,
unless tokens a second were measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from lorax_serve.checkpoint.spec import DecoderSpec
from lorax_serve.cli.devices import Device
from lorax_serve.config import EngineConfig
from lorax_serve.engine.kv_rows import BLOCK
from lorax_serve.errors import InvalidRequest
from lorax_serve.model.build import ACTIVATIONS_SHARE, DEFAULT_MAX_LENGTH, DEVICE_ADAPTERS_SHARE
from lorax_serve.model.sizes import (
    adapter_bytes,
    form_of,
    kv_bytes_per_token,
    multiplied_parameters,
    target_modules,
    weight_bytes,
)

__all__ = ["Capacity", "Demand", "Figure", "Memory", "plan"]

_PROCESSES_BYTES = 1 << 30
"""Of host memory for the server's two processes without weights, cache and adapters: 0.6 GiB were
measured on the embedded model."""
_PROBED = 5 / 4
"""The device's adapters have a quarter more memory, for one that is probed (``model.build``)."""


class Figure(NamedTuple):
    """A number and where it comes from.

    ``kind``: exact (counted as the server does), given, measured, data sheet, assumed; a floor (not
    less than that), or a ceiling (not more).
    """

    value: float
    unit: str
    kind: str
    what: str


@dataclass(frozen=True, slots=True)
class Demand:
    """What is asked of all replicas.

    Attributes:
        adapters: how many there are.
        rank: of each, on all ``targets``.
        targets: as PEFT's ``target_modules``.
        rps: requests a second.
        prompt_tokens, new_tokens: of a request, in the mean.
        headroom: the share of a replica's most that it is to be used to.
    """

    adapters: int
    rank: int
    targets: str | tuple[str, ...]
    rps: float
    prompt_tokens: int
    new_tokens: int
    headroom: float

    def __post_init__(self) -> None:
        for name in ("adapters", "rank", "prompt_tokens", "new_tokens"):
            if getattr(self, name) < 1:
                raise InvalidRequest(f"{name} must be at least 1, found {getattr(self, name)}")
        if not 0 < self.rps < math.inf:
            raise InvalidRequest(f"rps must be a number more than 0, found {self.rps:g}")
        if not 0 < self.headroom <= 1:
            raise InvalidRequest(
                f"headroom must be more than 0 and at most 1, found {self.headroom:g}"
            )


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes that a replica has beside its device's: None is not known.

    On a CPU the host's memory is the device's.
    """

    host: int | None
    disk: int | None


@dataclass(frozen=True, slots=True)
class Capacity:
    """What was found: figures by name, flags of lorax-serve, and what to know about them."""

    figures: dict[str, Figure]
    flags: dict[str, int]
    replicas: int
    notes: list[str]

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "figures": {name: figure._asdict() for name, figure in self.figures.items()},
            "flags": self.flags,
            "replicas": self.replicas,
            "helm": {"replicas": self.replicas, "settings": self.flags},
            "notes": self.notes,
        }


def plan(
    spec: DecoderSpec,
    dtype: torch.dtype,
    demand: Demand,
    device: Device,
    memory: Memory,
    *,
    batch_size: int | None = None,
    slots: int | None = None,
    tokens_per_second: float | None = None,
    replicas: int | None = None,
) -> Capacity:
    """Size a deployment.

    Args:
        spec: of the base model.
        dtype: the compute type.
        demand: what is asked.
        device: of a replica.
        memory: of a replica, beside that.
        batch_size, slots: the flags of lorax-serve; default: those that fit.
        tokens_per_second: what a replica was measured to generate under such a load; None: the
            roofline's ceiling.
        replicas: how many there are; default: as many as it takes.

    Raises:
        InvalidRequest: something does not fit at all; the message says what to change.
        AdapterRejected: the targets select nothing.
    """
    form = form_of(spec, dtype, on_gpu=device.on_gpu)
    paths = target_modules(spec, demand.targets)
    one = adapter_bytes(spec, demand.rank, paths, dtype, form)
    weights = weight_bytes(spec, dtype, form)
    per_token = kv_bytes_per_token(spec, dtype)
    length = demand.prompt_tokens + demand.new_tokens
    limit = min(spec.max_positions, DEFAULT_MAX_LENGTH)
    if length > spec.max_positions:
        raise InvalidRequest(
            f"prompt_tokens + new_tokens is {length}: this model's limit is {spec.max_positions}"
        )
    limit = max(limit, length)

    batch = batch_size or EngineConfig().batch_limits(device.on_gpu).size
    kv_most, device_room, host_room = _memory(device, memory, weights, per_token, batch * limit)
    if kv_most < limit:
        raise InvalidRequest(
            f"the {device.name}'s {device.memory:,} bytes of memory do not hold the weights "
            f"({weights:,} bytes) and the keys and values of one sequence of {limit} tokens "
            f"({limit * per_token:,} bytes): take a larger device, or a smaller model"
        )
    at_once = min(batch, max(1, kv_most // _blocks(length)))
    fit_device, fit_host = device_room // one, host_room // one
    if not fit_host or not fit_device:
        where, room = ("device", device_room) if not fit_device else ("host", host_room)
        raise InvalidRequest(
            f"{where} memory has {room:,} bytes left for adapters, and one takes {one:,}: take "
            "more memory, a smaller rank or fewer targets"
        )
    usable = min(fit_device, demand.adapters)
    slots = slots or min(usable, max(EngineConfig().adapter_slots, at_once))
    distinct = min(slots, at_once, demand.adapters)

    linears, head = multiplied_parameters(spec)
    read = dtype.itemsize * (linears + head) + distinct * one
    read += at_once * (demand.prompt_tokens + demand.new_tokens // 2) * per_token
    products = 2 * at_once * (linears + head)
    step = max(read / device.bandwidth, products / device.flops)
    prompt = max(
        2 * demand.prompt_tokens * linears / device.flops,
        # Prompts that are computed together share one reading of the weights.
        dtype.itemsize * linears / device.bandwidth / at_once,
    )
    ceiling = at_once * demand.new_tokens / (at_once * prompt + demand.new_tokens * step)
    rate = tokens_per_second or ceiling
    needed = math.ceil(demand.rps * demand.new_tokens / (rate * demand.headroom))
    count = replicas or needed

    rates = "measured" if tokens_per_second else "ceiling"
    sheet = "measured" if device.measured else "data sheet"
    figures = {
        "weights": Figure(weights, "bytes", "floor", "of linears and embeddings"),
        "kv_per_token": Figure(per_token, "bytes", "exact", "keys and values"),
        "kv_per_sequence": Figure(length * per_token, "bytes", "exact", "prompt and answer"),
        "adapter": Figure(one, "bytes", "exact", f"rank {demand.rank}, {len(paths)} modules"),
        "device_adapters": Figure(fit_device, "adapters", "floor", "fit in device memory"),
        "host_adapters": Figure(fit_host, "adapters", "floor", "fit in host memory"),
        "all_adapters": Figure(demand.adapters * one, "bytes", "exact", "of all adapters"),
        "sequences": Figure(at_once, "sequences", "exact", "run at once on a replica"),
        "bandwidth": Figure(device.bandwidth, "bytes/s", sheet, device.name),
        "flops": Figure(device.flops, "operations/s", sheet, device.name),
        "step": Figure(step, "s", "floor", f"{at_once} sequences, {distinct} adapters"),
        "prompt": Figure(prompt, "s", "floor", f"a prompt of {demand.prompt_tokens} tokens"),
        "roofline": Figure(ceiling, "tokens/s", "ceiling", "generated by a replica"),
        "tokens_per_second": Figure(rate, "tokens/s", rates, "reckoned with"),
        "requests_per_second": Figure(rate / demand.new_tokens, "requests/s", rates, "a replica"),
        "replicas": Figure(
            needed,
            "replicas",
            "measured" if tokens_per_second else "floor",
            f"for {demand.rps:g} requests/s at {demand.headroom:.0%} of their most",
        ),
        "load": Figure(
            demand.rps * demand.new_tokens / (rate * count),
            "of its most",
            "measured" if tokens_per_second else "floor",
            f"each of {count} replicas",
        ),
    }
    if memory.disk is not None:
        figures["disk_adapters"] = Figure(memory.disk // one, "adapters", "floor", "fit on disk")
    budget = min(host_room, math.ceil(demand.adapters * one))
    flags = {
        "max-batch-size": at_once,
        "kv-cache-tokens": min(kv_most, max(limit, at_once * _blocks(length))),
        "max-adapter-bytes": budget,
        "adapter-slots": slots,
    }
    if limit > DEFAULT_MAX_LENGTH:
        flags["max-sequence-length"] = limit
    if device.on_gpu:
        flags["max-device-adapter-bytes"] = device_room
    notes = _notes(demand, figures, slots, count, needed, measured=bool(tokens_per_second))
    if rate > ceiling:
        notes.append(
            "more tokens a second are given than the roofline allows: --bandwidth and --flops are "
            "too low (a CPU that is busy while it is measured shows less than it can), or the "
            "measurement was of something else"
        )
    return Capacity(figures, flags, count, notes)


def _memory(
    device: Device, memory: Memory, weights: int, per_token: int, wanted: int
) -> tuple[int, int, int]:
    """Tokens of the KV cache, and bytes for adapters on the device and in host memory.

    Args:
        device, memory: of a replica.
        weights: bytes.
        per_token: bytes of the KV cache.
        wanted: tokens that the cache needs at most.
    """
    if device.on_gpu:
        adapters = device.memory // DEVICE_ADAPTERS_SHARE
        taken = weights + int(_PROBED * adapters) + device.memory // ACTIVATIONS_SHARE
        host = device.memory if memory.host is None else memory.host
        return max(0, device.memory - taken) // per_token, adapters, max(0, host - _PROCESSES_BYTES)
    free = max(0, device.memory - weights - _PROCESSES_BYTES)
    tokens = min(wanted, free // 3 // per_token)
    room = free - tokens * per_token
    return tokens, room, room  # slots hold what host memory has


def _blocks(tokens: int) -> int:
    return -(-tokens // BLOCK) * BLOCK


def _notes(
    demand: Demand,
    figures: dict[str, Figure],
    slots: int,
    replicas: int,
    needed: int,
    *,
    measured: bool,
) -> list[str]:
    found = []
    if not measured:
        found.append(
            "rates are the roofline's, which no server reaches: measure one replica under such "
            "requests and give --tokens-per-second"
        )
    if replicas < needed:
        found.append(f"{replicas} replicas are too few: {needed} are needed")
    host = int(figures["host_adapters"].value)
    if demand.adapters <= host:
        found.append("each replica holds all adapters in memory: any routing will do")
    elif demand.adapters <= host * replicas:
        found.append(
            f"a replica holds {host / demand.adapters:.1%} of the adapters in memory, all replicas "
            "together hold each: route by adapter (see docs/scaling.md)"
        )
    else:
        found.append(
            f"all replicas together hold {host * replicas / demand.adapters:.1%} of the adapters "
            "in memory: route by adapter, and expect loads from disk"
        )
    if slots < min(demand.adapters, int(figures["sequences"].value)):
        found.append(f"{slots} slots are fewer than sequences at once: adapters take turns")
    return found
