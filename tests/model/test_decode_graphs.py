"""Steps that only decode, as graphs do them, against plain torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lorax_serve.config import EngineConfig
from lorax_serve.core import Batch, SamplingParams, Sequence
from tests.model.logits_runner import LogitsRunner, load


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
def test_an_adapter_that_changes_the_output(
    tiny_model: Path, make_adapter: Callable[..., Path]
) -> None:
    directory = make_adapter("head", r=4, target_modules=["q_proj", "lm_head"])
    said = []
    for kernels in ("torch", "paged"):
        config = EngineConfig(
            model=str(tiny_model), device="cpu", dtype="float32", kernels=kernels, max_batch_size=4
        )
        runner = LogitsRunner(config)
        load(runner, 0, directory)
        running = [
            Sequence(
                slot, [5, 6, 7 + slot], 3, None, SamplingParams(), 9, 0, frozenset(),
                kv_slot=slot, adapter_slot=slot % 2 - 1,
            )
            for slot in range(3)
        ]  # fmt: skip
        runner.step(Batch(prefills=[(s, 3) for s in running]))
        runner.step(Batch(decodes=running))
        said.append(torch.stack([runner.logits[s.request_id] for s in running]))
    torch.testing.assert_close(*said, rtol=1e-4, atol=1e-4)
