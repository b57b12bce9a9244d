"""Settings of the engine and the server: frozen, composed, each field described."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from lorax_serve.errors import InvalidRequest

__all__ = ["DTYPES", "KERNELS", "PROBES", "BatchLimits", "EngineConfig", "ServerConfig"]

# It travels in metadata.
_VISIBLE = re.compile(r"[!-~]{1,253}")

KERNELS = ("auto", "compiled", "torch", "triton", "paged")
DTYPES = ("auto", "bfloat16", "float16", "float32")
PROBES = ("refuse", "warn", "off")


class BatchLimits(NamedTuple):
    """Sequences of a batch, and its prompt tokens."""

    size: int
    tokens: int


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """The engine's process: one model, on one device or on several.

    Raises:
        InvalidRequest: naming the flag that is out of range.
    """

    model: str = "smollm2-135m"
    """The embedded model, a local directory, a Hub id, or a .gguf file."""
    device: str = "auto"
    """A torch device: cpu, cuda, cuda:1; auto is a GPU if there is one."""
    dtype: str = "auto"
    """Compute type; auto is bfloat16, or float32 where neither the kernels nor torch multiply
    bfloat16 fast."""
    kernels: str = "auto"
    """Who computes the model: compiled (C++ for CPUs with AVX2, or AVX-512 with bfloat16, built at
    the first start), triton (a GPU's kernels), torch, or auto: the first of these that can be had.
    paged is the GPU's decoder in plain torch, for tests."""
    batch_invariant: bool = False
    """Whether a request's tokens depend on nothing but itself: not on what is beside it, how its
    prompt was cut, or what was cached. Prompts take longer; needs compiled kernels."""
    tensor_parallel: int = 1
    """Devices that compute the model together, each with its part of the weights, of the adapters
    and of the KV cache, for models that do not fit one: GPUs 0 to N - 1 of this machine, a process
    each. Attention heads, key and value heads and the MLP's features must divide by it."""
    max_batch_size: int | None = None
    """Sequences that run at once; each has its own row of the KV cache; default: 32, on a GPU
    128."""
    max_batch_tokens: int | None = None
    """Most prompt tokens computed in one step; longer prompts are split over steps; default: 256,
    on a GPU 2048."""
    max_prefill_slowdown: float = 2.0
    """How many times as long a step may take for the prompts computed beside sequences that decode,
    whose tokens come that much slower meanwhile; more if prompts outnumber those sequences."""
    max_sequence_length: int | None = None
    """Prompt and generated tokens of one sequence; default: the model's own limit, at most 4096."""
    kv_cache_tokens: int | None = None
    """Tokens whose keys and values are kept in memory, of running sequences and of cached prefixes;
    default: max_batch_size sequences of full length, or what a third of the free memory holds."""
    prefix_caching: bool = True
    """Whether the keys and values of ended sequences are kept for prompts that begin alike under
    the same adapter."""
    adapter_slots: int = 64
    """Distinct adapters in one batch, and on the device."""
    adapter_quantum: int = 2048
    """How far an adapter may get ahead of one that waits for a device slot, in prompt tokens (a
    generated token counts twice), before its requests stand still for the other's. Smaller is
    fairer from moment to moment; larger swaps adapters less often, and more requests find theirs
    in its slot."""
    max_adapter_bytes: int = 4 << 30
    """Host memory for adapters, which count with their true ranks. The least recently used leave
    it for others, and are read from their directory again when a request names them."""
    max_device_adapter_bytes: int | None = None
    """Device memory for adapters in slots, of all devices together; default: only the slots are
    counted. Not for a CPU, where slots hold host memory."""
    probe: str = "refuse"
    """What becomes of an adapter that fails the golden probe in its file: refuse, warn (in the
    report of the load), or off: probes are not computed."""
    max_waiting: int = 1024
    """Requests that wait for a place in the batch; more are refused as overload."""
    threads: int | None = None
    """CPU threads of each of the engine's processes; default: its share of the cores that it may
    use."""

    def batch_limits(self, on_gpu: bool) -> BatchLimits:
        """Of a batch, with the defaults of such a device."""
        size, tokens = (128, 2048) if on_gpu else (32, 256)
        return BatchLimits(self.max_batch_size or size, self.max_batch_tokens or tokens)

    def __post_init__(self) -> None:
        _at_least(
            1,
            tensor_parallel=self.tensor_parallel,
            max_batch_size=self.max_batch_size,
            max_batch_tokens=self.max_batch_tokens,
            kv_cache_tokens=self.kv_cache_tokens,
            max_sequence_length=self.max_sequence_length,
            adapter_slots=self.adapter_slots,
            max_device_adapter_bytes=self.max_device_adapter_bytes,
            threads=self.threads,
        )
        _at_least(
            0,
            max_waiting=self.max_waiting,
            max_adapter_bytes=self.max_adapter_bytes,
            adapter_quantum=self.adapter_quantum,
        )
        if not 1 < self.max_prefill_slowdown < math.inf:
            raise InvalidRequest(
                f"max_prefill_slowdown must be a number more than 1, found "
                f"{self.max_prefill_slowdown:g}"
            )
        if self.kernels not in KERNELS:
            need = ", ".join(KERNELS)
            raise InvalidRequest(f"kernels must be one of {need}, found {self.kernels!r}")
        if self.dtype not in DTYPES:
            raise InvalidRequest(f"dtype must be one of {', '.join(DTYPES)}, found {self.dtype!r}")
        if self.probe not in PROBES:
            raise InvalidRequest(f"probe must be one of {', '.join(PROBES)}, found {self.probe!r}")


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """The server's process: gRPC, metrics, and the adapters it starts with."""

    engine: EngineConfig = field(default_factory=EngineConfig)
    host: str = "0.0.0.0"
    port: int = 50051
    """gRPC port; 0 takes a free one."""
    metrics_port: int | None = 9090
    """HTTP port of /metrics; 0 takes a free one, None serves no metrics."""
    adapters: Path | None = None
    """Directory whose subdirectories are adapters, all loaded at the start under their names.
    LoadAdapter reads from inside it only. With --manifest: where its directories are."""
    state: Path | None = None
    """Directory where the server keeps what it has loaded: after a restart it serves that again,
    and earlier versions can be rolled back to. One server each. Without it, adapters are read
    from where they are."""
    source: str | None = None
    """Where adapters come from, with --state: a directory, s3://bucket/prefix, hf://org or
    hf://org/repo; default: --adapters. All that it lists is loaded at the start."""
    manifest: str | None = None
    """The adapters that are served, and no others, in YAML; with --state: a file, or
    s3://bucket/path. Each has a name and a source (s3://, hf://, a directory in --adapters), and
    may have digest, weight, pinned."""
    load_on_demand: bool = False
    """Whether a request may name an adapter that is not loaded, but that the source has. Then
    nothing is loaded from it at the start."""
    adapter_history: int = 4
    """With --state, earlier versions that are kept of each adapter."""
    watch_seconds: float = 10.0
    """With --state, how often the source or the manifest is looked at for what is new or has
    changed, and what could not be loaded is tried again; 0 switches it off."""
    fetch_seconds: float = 300.0
    """How long fetching one adapter from the source may take."""
    drain_seconds: float = 30.0
    """How long running requests may go on after SIGTERM."""
    linger_seconds: float = 0.0
    """How long after SIGTERM the port stays open at least, where new calls are refused with
    UNAVAILABLE: as long as a proxy needs to notice, which makes them elsewhere meanwhile."""
    replica_name: str | None = None
    """What this server calls itself in the metadata lorax-replica of its answers; default: the
    host's name, which in Kubernetes is the pod's."""
    vllm_metric_names: bool = False
    """Whether /metrics has the gauges that routers made for vLLM read too, under vLLM's names."""

    def __post_init__(self) -> None:
        _at_least(
            0,
            port=self.port,
            metrics_port=self.metrics_port,
            adapter_history=self.adapter_history,
        )
        if self.replica_name is not None and not _VISIBLE.fullmatch(self.replica_name):
            raise InvalidRequest(
                f"replica_name must be 1 to 253 visible ASCII characters, found "
                f"{self.replica_name[:300]!r}"
            )
        self._check_places()
        if not self.fetch_seconds > 0:
            raise InvalidRequest(f"fetch_seconds must be more than 0, found {self.fetch_seconds}")
        if not self.watch_seconds >= 0:
            raise InvalidRequest(f"watch_seconds must be 0 or more, found {self.watch_seconds}")
        if self.drain_seconds < 0:
            raise InvalidRequest(f"drain_seconds must be 0 or more, found {self.drain_seconds}")
        if not 0 <= self.linger_seconds < math.inf:
            raise InvalidRequest(f"linger_seconds must be 0 or more, found {self.linger_seconds}")

    def _check_places(self) -> None:
        """Refuse flags that say two things about what is served, or nothing about where it is."""
        if self.manifest is not None:
            if self.state is None:
                raise InvalidRequest(
                    "manifest needs --state DIR, where the adapters that it names are kept"
                )
            if self.source is not None or self.load_on_demand:
                flag = "source" if self.source is not None else "load_on_demand"
                raise InvalidRequest(
                    f"manifest and {flag} exclude each other: the manifest alone decides what is "
                    f"served, and names a source for each adapter; leave out --"
                    f"{flag.replace('_', '-')}"
                )
        if self.state is None and (self.source is not None or self.load_on_demand):
            flag = "source" if self.source is not None else "load_on_demand"
            raise InvalidRequest(f"{flag} needs --state DIR, where what comes from it is kept")


def _at_least(least: int, **settings: int | None) -> None:
    for name, value in settings.items():
        if value is not None and value < least:
            raise InvalidRequest(f"{name} must be at least {least}, found {value}")
