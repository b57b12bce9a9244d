"""What all parts share: one model, one runner, and the state between parts."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from benchmarks.gpu.adapters import adapter_bytes, random_adapter
from benchmarks.gpu.shapes import BANDWIDTH, Shape, Sizes
from benchmarks.gpu.weights import RandomLlama
from lorax_serve.adapter import LoRAWeights
from lorax_serve.config import EngineConfig
from lorax_serve.core import Batch, RowCopy, SamplingParams
from lorax_serve.core import Sequence as Request
from lorax_serve.model.runner import HostAdapter, ModelRunner

__all__ = ["Bench", "Floor", "advance", "say"]

_GREEDY = SamplingParams()


@dataclass(frozen=True, slots=True)
class Floor:
    """What a decoding step must read, in bytes."""

    weights: int
    keys_and_values: int
    adapters: int = 0

    @property
    def bytes(self) -> int:
        """All of it."""
        return self.weights + self.keys_and_values + self.adapters

    @property
    def ms(self) -> float:
        """How long reading it takes at ``BANDWIDTH``."""
        return 1e3 * self.bytes / BANDWIDTH


class Bench:
    """A random model on a device, and a runner of it.

    Args:
        shape: the model's, and how much to run.
        device: cuda, or cpu to see that all of it works.
        kernels: see ``EngineConfig.kernels``.
    """

    def __init__(self, shape: Shape, device: torch.device, kernels: str = "auto") -> None:
        self.shape, self.device = shape, device
        self.sizes: Sizes = shape.sizes
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.llama = RandomLlama(shape, self.dtype, device)
        modules = self.llama.spec.modules()
        size = adapter_bytes(modules, self.sizes.ranks[0], self.dtype.itemsize)
        room = int(1.05 * size * self.sizes.rows)  # an adapter of the first rank for each row
        self.config = EngineConfig(
            model=f"random-{shape.name}",
            device=str(device),
            dtype=str(self.dtype).removeprefix("torch."),
            kernels=kernels,
            max_batch_size=self.sizes.rows,
            max_batch_tokens=self.sizes.prefill_tokens,
            max_sequence_length=self.sizes.max_length,
            kv_cache_tokens=self.sizes.kv_tokens,
            prefix_caching=False,
            adapter_slots=self.sizes.rows,
            max_adapter_bytes=1 << 42,
            max_device_adapter_bytes=None if device.type == "cpu" else room,
            probe="off",
            max_waiting=1 << 20,
        )
        self.device_adapter_bytes = room
        self.runner = ModelRunner.from_weights(self.config, self.llama.decoder_weights())
        self.runner.warm_up()
        self._adapters: dict[int, tuple[LoRAWeights, HostAdapter]] = {}
        self._filled = 0

    def synchronise(self) -> None:
        """Wait until the device has done all that it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, run: Callable[[], object]) -> float:
        """How long a call takes, to the end of its work on the device."""
        self.synchronise()
        started = time.perf_counter()
        run()
        self.synchronise()
        return time.perf_counter() - started

    def adapter(self, rank: int) -> HostAdapter:
        """The one adapter of a rank. Every slot that it is put into has a copy of its own on a
        GPU, so as many slots are as many adapters to the device."""
        return self._adapter(rank)[1]

    def adapter_weights(self, rank: int) -> LoRAWeights:
        """The same, as a checkpoint has it."""
        return self._adapter(rank)[0]

    def adapter_bytes(self, rank: int) -> int:
        """Bytes of A and B of an adapter."""
        return adapter_bytes(self.runner.modules, rank, self.dtype.itemsize)

    def most_adapters(self, rank: int) -> int:
        """How many of a rank fit on the device at once, by slots and by bytes."""
        return min(self.sizes.rows, self.device_adapter_bytes // self.adapter_bytes(rank))

    def fill_slots(self, rank: int, count: int) -> None:
        """Have adapters of a rank in slots ``0 .. count - 1``, and none in others."""
        self.clear_slots()
        for slot in range(count):
            self.runner.put_adapter(slot, self.adapter(rank))
        self._filled = count
        self.synchronise()

    def clear_slots(self) -> None:
        """Have no adapter on the device."""
        for slot in range(self._filled):
            self.runner.clear_adapter(slot)
        self._filled = 0

    def release(self) -> None:
        """Give back all KV rows and slots, so that the next part finds the runner as new."""
        for slot in range(self.config.adapter_slots):
            self.runner.clear_adapter(slot)
        self._filled = 0
        rows = range(self.runner.kv_rows)
        self.runner.run(Batch(copies=[RowCopy(row, row, 0) for row in rows]))
        gc.collect()

    def request(self, row: int, length: int, sampling: SamplingParams = _GREEDY) -> Request:
        """A sequence of random tokens in a KV row, nothing of it computed."""
        generator = torch.Generator().manual_seed(row)
        tokens = torch.randint(3, self.llama.spec.vocab_size, (length,), generator=generator)
        return Request(
            row, tokens.tolist(), length, None, sampling, 1 << 20, 0, frozenset(), kv_slot=row
        )

    def prefill(self, requests: Sequence[Request]) -> None:
        """Compute prompts, as many in a step as its tokens allow, and their first tokens."""
        each = max(len(request.tokens) for request in requests)
        count = max(1, self.sizes.prefill_tokens // each)
        for first in range(0, len(requests), count):
            some = requests[first : first + count]
            advance(self.runner, Batch(prefills=[(s, len(s.tokens)) for s in some]))

    def floor(self, batch: int, context: int, adapters: int = 0) -> Floor:
        """What a decoding step reads.

        Args:
            batch: rows.
            context: tokens of each row's sequence.
            adapters: bytes of all that the batch names.
        """
        spec = self.llama.spec
        linears = sum(site.in_features * site.out_features for site in spec.sites())
        weights = linears + spec.vocab_size * spec.hidden_size  # the output's; not the embedding
        per_token = 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim
        size = self.dtype.itemsize
        return Floor(size * weights, size * batch * context * per_token, adapters)

    def _adapter(self, rank: int) -> tuple[LoRAWeights, HostAdapter]:
        if rank not in self._adapters:
            weights = random_adapter(self.runner.modules, rank, self.dtype, self.device)
            self._adapters[rank] = weights, self.runner.fold(weights)
        return self._adapters[rank]


def advance(runner: ModelRunner, batch: Batch) -> None:
    """A step, and what the engine does with its tokens.

    Raises:
        RuntimeError: a row's logits were not finite: what was timed is not what it should be.
    """
    results = runner.run(batch)
    for sequence, length in batch.prefills:
        sequence.computed += length
    for sequence in batch.decodes:
        sequence.computed += 1
    for sequence, sample in results:
        if sample.token_id is None:
            raise RuntimeError("a step gave no token: its logits are not finite")
        sequence.tokens.append(sample.token_id)


def say(text: str) -> None:
    """Progress, on stderr: stdout ends with one line of JSON."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)
