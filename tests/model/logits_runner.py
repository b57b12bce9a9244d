"""A runner that shows the logits behind the tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from lorax_serve import adapter as leaf
from lorax_serve.config import EngineConfig
from lorax_serve.core import Batch
from lorax_serve.model.paged_steps import PagedSteps
from lorax_serve.model.parallel.leading import LeadingSteps
from lorax_serve.model.runner import ModelRunner


class LogitsRunner(ModelRunner):
    """Keeps the logits of each sampled row, by request."""

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self.logits: dict[int, torch.Tensor] = {}
        steps = self._steps._steps if isinstance(self._steps, LeadingSteps) else self._steps
        if isinstance(steps, PagedSteps):
            self._draw = steps._draw
            steps._draw = self._drawing  # type: ignore[assignment]
            return
        self._compute = self._decoder.logits
        self._decoder.logits = self._remember  # type: ignore[method-assign]

    def _remember(self, hidden: torch.Tensor, slots: Sequence[int]) -> torch.Tensor:
        self.last = self._compute(hidden, slots)
        return self.last.clone()

    def _drawing(self, logits: torch.Tensor, *how: torch.Tensor) -> torch.Tensor:
        self.last = logits.clone()
        return self._draw(logits, *how)

    def step(self, batch: Batch) -> None:
        results = self.run(batch)
        for row, (sequence, sample) in enumerate(results):
            self.logits[sequence.request_id] = self.last[row]
            sequence.computed = len(sequence.tokens)
            assert sample.token_id is not None
            sequence.tokens.append(sample.token_id)


def load(runner: ModelRunner, slot: int, directory: Path) -> None:
    files = leaf.read(directory)
    weights = leaf.match_weights(files.config, files.tensors, runner.modules)
    runner.put_adapter(slot, runner.fold(weights))
