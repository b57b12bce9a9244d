"""Running out of memory: how it is recognised, and what is said when nothing more can be done."""

from __future__ import annotations

import gc

import torch

from lorax_serve.errors import TrainingError

__all__ = ["is_out_of_memory", "out_of_memory", "release"]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or on the CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # On the CPU, torch raises a bare RuntimeError.
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)


def out_of_memory(rows: int | None = None) -> TrainingError:
    """The error to raise; ``rows`` is the size of the batch that did not fit, if that is known."""
    if rows == 1:
        return TrainingError(
            "out of memory with a single row in a batch; lower --max-length, choose a smaller "
            "model or --dtype bfloat16, or train fewer adapters at once"
        )
    return TrainingError(
        "out of memory; lower --batch-size (and raise --grad-accumulation by as much, for the "
        "same result), lower --max-length, or choose a smaller model"
    )


def release() -> None:
    """Give back what a failed step has left; to be called outside of the ``except`` block, which
    holds its tensors."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
