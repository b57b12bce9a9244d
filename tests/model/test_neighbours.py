"""With compiled kernels, a request's logits are the same bits whatever else is in its batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from lorax_serve.config import EngineConfig
from lorax_serve.core import BASE, Batch, SamplingParams, Sequence
from tests.helpers import TINY_LLAMA, needs_kernels, save_tiny_model
from tests.model.logits_runner import LogitsRunner, load

pytestmark = needs_kernels

# Three rows of one adapter and one of another beside base rows, in every height of a tile.
ADAPTERS = (BASE, 0, 1, 0, BASE, 0, BASE, BASE, BASE, BASE, BASE)
STEPS = 6


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of sizes that the bfloat16 kernels take."""
    config: Any = LlamaConfig
    sizes = {"hidden_size": 96, "head_dim": 32, "num_attention_heads": 6, "num_key_value_heads": 2}
    directory: Path = tmp_path_factory.mktemp("model")
    save_tiny_model(directory, config(**{**TINY_LLAMA.to_diff_dict(), **sizes}))
    return directory


def sequences() -> Iterator[Sequence]:
    generator = torch.Generator().manual_seed(0)
    for row, adapter in enumerate(ADAPTERS):
        prompt = torch.randint(3, 128, (3 + 5 * row,), generator=generator).tolist()
        version = None if adapter == BASE else adapter
        yield Sequence(
            row, prompt, len(prompt), version, SamplingParams(), 99, 0, frozenset(),
            kv_slot=row, adapter_slot=adapter,
        )  # fmt: skip


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_logits_do_not_depend_on_the_batch(
    tiny_model: Path, make_adapter: Callable[..., Path], dtype: str
) -> None:
    config = EngineConfig(
        model=str(tiny_model), dtype=dtype, kernels="compiled", max_batch_size=len(ADAPTERS)
    )
    runner = LogitsRunner(config)
    load(runner, 0, make_adapter("a", 1, r=5, target_modules="all-linear"))
    load(runner, 1, make_adapter("b", 2, r=12, target_modules=["q_proj", "up_proj"]))
    alone = []
    for sequence in sequences():
        runner.step(Batch(prefills=[(sequence, len(sequence.tokens))]))
        seen = [runner.logits[sequence.request_id]]
        for _ in range(STEPS):
            runner.step(Batch(decodes=[sequence]))
            seen.append(runner.logits[sequence.request_id])
        alone.append(torch.stack(seen))
    together = list(sequences())
    runner.step(Batch(prefills=[(s, len(s.tokens)) for s in together]))
    rows: list[list[torch.Tensor]] = [[runner.logits[s.request_id]] for s in together]
    for step in range(STEPS):
        # All at once, or in groups that change: rows move between tiles, and get other neighbours.
        size = len(together) if step % 2 else 4
        order = together[step:] + together[:step]
        for first in range(0, len(order), size):
            runner.step(Batch(decodes=order[first : first + size]))
        for seen, sequence in zip(rows, together, strict=True):
            seen.append(runner.logits[sequence.request_id])
    for got, want in zip(rows, alone, strict=True):
        assert torch.equal(torch.stack(got), want)
