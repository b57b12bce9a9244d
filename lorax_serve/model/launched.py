"""A step between its launch and its samples."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

from lorax_serve.core import Sequence
from lorax_serve.model.sampling.sampler import Sample

__all__ = ["Done", "Launched"]


class Launched(Protocol):
    """A step that a device computes, perhaps still."""

    @property
    def sequences(self) -> Seq[Sequence]:
        """Those that a token is sampled for."""

    def samples(self) -> list[Sample]:
        """One for each of ``sequences``; waits for the device. To be called once."""


@dataclass(frozen=True, slots=True)
class Done:
    """A step that was computed when it was launched."""

    sequences: Seq[Sequence]
    drawn: list[Sample]

    def samples(self) -> list[Sample]:
        """See ``Launched``."""
        return self.drawn
