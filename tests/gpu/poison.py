"""Memory that a kernel allocates and does not write is found out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["poisoned"]


@contextmanager
def poisoned() -> Iterator[None]:
    """While it lasts ``torch.empty`` gives NaN, or the largest integers."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)
