"""How much memory a run takes, before it takes it.

The terms, in bytes, for n trained numbers, e bytes an element of the base, and a largest batch of
T tokens (padding included) with K targets:

- weights: the base's parameters and buffers, each storage once (a quantised weight's are buffers);
- adapter: ``n * (8 + e)``, values and gradients in float32 and the copy cast for the products;
- optimizer: ``n * 8``, Adam's two float32 moments;
- activations: ``T *`` what autograd keeps for one token, which is measured on this model; with a
  quantised base also its largest weight, in the dtype that it is dequantised to for a product;
- logits: of a few targets at a time, twice in float32, if the head is frozen and on targets only;
  else ``vocabulary * (12 + 2 e)`` for each token, or, with a trained head, for each of a few
  targets: logits and their gradient in the base's dtype, and in float32 the logits, their
  log-softmax and its gradient.

Not counted: torch itself, the temporary tensors of single operations, the one layer that is
computed again with ``--checkpointing``, and what the allocator wastes. On a CPU, with smollm2-135m,
the temporary tensors and the waste were 0.3 to 0.4 GB for batches of 200 and of 2048 tokens alike.
With a llama of 6 layers of 512, one thread, float32 and 8 rows of 256 tokens, the peak beyond the
weights was 1.6 times the estimate, with dropout 1.8 times; for 4 layers of 256 and 4 rows of 128
tokens it was 0.9 times.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from transformers import PreTrainedModel

from lorax_train.config import LoopConfig
from lorax_train.data.batches import by_length
from lorax_train.data.encode import Example
from lorax_train.loop.loss import CHUNK, TargetLoss
from lorax_train.loop.training_run import TrainingRun
from lorax_train.model.base import vocabulary_size
from lorax_train.model.head import piece
from lorax_train.model.quantize import QuantizedLinear

__all__ = ["MemoryEstimate", "available_memory", "estimate"]

_PROBE_TOKENS = 128


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes by purpose; see the module's docstring for the formulas."""

    weights: int
    adapter: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(getattr(self, field.name) for field in fields(self))

    @property
    def to_come(self) -> int:
        """What is still to be allocated once the weights are loaded."""
        return self.total - self.weights


def estimate(
    model: PreTrainedModel, runs: Sequence[TrainingRun], loss: TargetLoss, processes: int = 1
) -> MemoryEstimate:
    """Estimate a training whose largest batch has the longest examples of each run.

    Args:
        model: with the adapters in it.
        runs: of the adapters.
        loss: of the model.
        processes: that share the rows of a step; the estimate is of one of them.
    """
    largest = [
        row
        for run in runs
        for example in by_length(run.examples)[-_most_rows(run.loop, processes) :]
        for row in example.rows
    ]
    largest.sort(key=lambda example: len(example.tokens))
    lengths = [len(example.tokens) for example in largest]
    tokens = len(largest) * lengths[-1] if loss.padded else sum(lengths)
    vocabulary = vocabulary_size(model)
    trained = {id(parameter) for run in runs for parameter in run.parameters}
    n_trained = sum(run.adapter.n_parameters for run in runs)
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in (*model.parameters(), *model.buffers())
        if id(tensor) not in trained
    }
    size = model.dtype.itemsize
    targets = sum(example.n_targets for example in largest)
    if not loss.head_on_targets:
        logits = tokens * vocabulary * (12 + 2 * size)
    elif loss.head_is_frozen:
        logits = 2 * 4 * vocabulary * min(targets, piece(vocabulary))
    else:
        logits = min(targets, CHUNK) * vocabulary * (12 + 2 * size)
    for run in runs:
        run.adapter.train(True)  # dropout's masks are kept too
    per_token = _activation_bytes_per_token(model, loss, largest[-1])
    return MemoryEstimate(
        weights=sum(storages.values()),
        adapter=n_trained * (8 + size),
        optimizer=n_trained * 8,
        activations=int(tokens * per_token) + _largest_dequantised(model),
        logits=logits,
    )


def _most_rows(loop: LoopConfig, processes: int) -> int:
    """That a process has in one forward pass, where rows are of like lengths."""
    own = math.ceil(loop.batch_size * loop.grad_accumulation / processes)
    return min(loop.batch_size, own)


def _largest_dequantised(model: PreTrainedModel) -> int:
    sizes = (
        layer.in_features * layer.out_features * layer.dtype.itemsize
        for layer in model.modules()
        if isinstance(layer, QuantizedLinear)
    )
    return max(sizes, default=0)


def _activation_bytes_per_token(
    model: PreTrainedModel, loss: TargetLoss, longest: Example
) -> float:
    """The slope between two lengths, so that what does not grow with the tokens falls out."""
    long = min(max(2, len(longest.tokens)), _PROBE_TOKENS)
    short = long // 2
    kept = [_kept_for_backward(model, loss, longest.tokens[:n]) for n in (short, long)]
    return (kept[1] - kept[0]) / (long - short)


def _kept_for_backward(model: PreTrainedModel, loss: TargetLoss, tokens: tuple[int, ...]) -> int:
    """Bytes of the storages that autograd keeps after one row's forward pass to the hidden states.

    A model that does not part with its hidden states is measured up to its logits.
    """
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage  # kept alive, so that no address comes twice
        # And nothing for the graph: a tensor would keep it alive for ever, with all weights, as
        # the graph would keep the tensor.

    row = loss.collate([Example(tokens, (False, *[True] * (len(tokens) - 1)), "")], 0)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda nothing: nothing):
        out = loss.hidden(row) if loss.head_on_targets else loss.logits(row)
    del out
    return sum(storage.nbytes() for storage in storages.values())


def available_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on ``device``; None where the system does not say."""
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free
    found = [size for size in (_free_of_machine(), _free_of_container()) if size is not None]
    return min(found, default=None)


def _free_of_machine() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    sizes = (line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    return next((int(size) * 1024 for size in sizes), None)


def _free_of_container(
    root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> int | None:
    """What the memory limits leave of the control group of this process and of those above it, of
    version 1 or 2; file cache is given back. A process that goes beyond is killed."""
    try:
        lines = [line.split(":", 2) for line in own.read_text().splitlines()]
    except (OSError, ValueError):
        lines = []
    paths = {"": "", **{names: path for _, names, path in lines if names in ("", "memory")}}
    found = []
    for names, path in paths.items():
        top = root / names
        # In a container, the path may be the host's, which is not to be seen: its own is the top.
        group = top / path.lstrip("/")
        groups = [group, *(above for above in group.parents if above.is_relative_to(top)), top]
        found += [
            free for each in dict.fromkeys(groups) if (free := _free_of_group(each)) is not None
        ]
    return min(found, default=None)


def _free_of_group(group: Path) -> int | None:
    for limit_file, used_file, cache in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            limit = int((group / limit_file).read_text())  # or "max"
            used = int((group / used_file).read_text())
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            return max(0, limit - used + int(stat.get(cache, 0)))
        except (OSError, ValueError):
            continue
    return None
