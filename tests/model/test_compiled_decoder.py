"""The compiled decoder against the torch one in float32: prompts, chunks, decodes and LoRA."""

from __future__ import annotations

from collections.abc import Callable
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

# Around the kernels' blocks: 32 rows of a prompt, 64 positions.
LENGTHS = (1, 2, 31, 32, 33, 63, 64, 65, 130, 200)


@pytest.fixture(scope="module", params=[(6, 2), (4, 4), (5, 1), (8, 1)], ids=str)
def tiny_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of sizes that the bfloat16 kernels take, and groups of 3, 1, 5 and 8 heads."""
    heads, kv_heads = request.param
    config: Any = LlamaConfig
    sizes = {"hidden_size": 32 * heads, "head_dim": 32, "num_attention_heads": heads}
    directory: Path = tmp_path_factory.mktemp("model")
    settings = TINY_LLAMA.to_diff_dict() | sizes | {"num_key_value_heads": kv_heads}
    save_tiny_model(directory, config(**settings))
    return directory


def run(model: Path, adapters: list[Path], dtype: str, kernels: str) -> list[torch.Tensor]:
    """Logits of one sequence a length: the prompt in two chunks beside decoding rows, then on."""
    runner = LogitsRunner(
        EngineConfig(model=str(model), dtype=dtype, kernels=kernels, max_batch_size=len(LENGTHS))
    )
    for slot, adapter in enumerate(adapters):
        load(runner, slot, adapter)
    generator = torch.Generator().manual_seed(0)
    sequences = []
    for row, length in enumerate(LENGTHS):
        prompt = torch.randint(3, 128, (length,), generator=generator).tolist()
        sequence = Sequence(row, prompt, length, None, SamplingParams(), 99, 0, frozenset())
        sequence.kv_slot, sequence.adapter_slot = row, (BASE, 0, 1)[row % 3]
        sequences.append(sequence)
    first, second = sequences[:4], sequences[4:]
    seen: list[torch.Tensor] = []

    def step(batch: Batch) -> None:
        runner.step(batch)
        for sequence in batch.sequences:
            # Both must go the same way: what is compared is the logits, not who is a hair ahead.
            if sequence.computed == len(sequence.tokens) - 1:
                seen.append(runner.logits[sequence.request_id])
                sequence.tokens[-1] = 3 + (7 * len(sequence.tokens) + sequence.request_id) % 120

    step(Batch(prefills=[(s, len(s.tokens)) for s in first]))
    runner.run(Batch(prefills=[(s, 20) for s in second]))
    for s in second:
        s.computed = 20
    step(Batch(decodes=first, prefills=[(s, len(s.tokens) - 20) for s in second]))
    for _ in range(4):
        step(Batch(decodes=sequences))
    return seen


def after_prompts(model: Path, dtype: str, chunk: int) -> torch.Tensor:
    """Logits after prompts that the invariant mode computed in chunks; 0: as tokens that decode."""
    config = EngineConfig(model=str(model), dtype=dtype, kernels="compiled", batch_invariant=True)
    runner = LogitsRunner(config)
    generator = torch.Generator().manual_seed(0)
    for row, length in enumerate(LENGTHS):
        tokens = torch.randint(3, 128, (length,), generator=generator).tolist()
        sequence = Sequence(row, [], 0, None, SamplingParams(), 99, 0, frozenset())
        sequence.kv_slot, sequence.adapter_slot = row, BASE
        for begin in range(0, length, chunk or 1):
            end = min(begin + (chunk or 1), length)
            sequence.tokens, sequence.computed = tokens[:end], begin
            if chunk:
                runner.step(Batch(prefills=[(sequence, end - begin)]))
            else:
                runner.step(Batch(decodes=[sequence]))
    return torch.stack([runner.logits[row] for row in range(len(LENGTHS))])


def distance(some: list[torch.Tensor], others: list[torch.Tensor]) -> float:
    """Root mean square of the differences."""
    return float((torch.stack(some) - torch.stack(others)).square().mean().sqrt())


def test_logits_are_those_of_plain_torch(
    tiny_model: Path, make_adapter: Callable[..., Path]
) -> None:
    adapters = [
        make_adapter("a", 1, r=5, target_modules="all-linear"),
        make_adapter("b", 2, r=12, target_modules=["q_proj", "up_proj", "down_proj"]),
    ]
    exact = run(tiny_model, adapters, "float32", "torch")
    assert len(exact) == 4 + len(LENGTHS) * 5
    scale = distance(exact, [torch.zeros_like(logits) for logits in exact])
    assert distance(run(tiny_model, adapters, "float32", "compiled"), exact) < 1e-5 * scale
    # In bfloat16 torch is off too, for it rounds as often: the kernels may be no worse.
    rounded = distance(run(tiny_model, adapters, "bfloat16", "torch"), exact)
    assert 1e-3 * scale < rounded < 0.1 * scale
    assert distance(run(tiny_model, adapters, "bfloat16", "compiled"), exact) < 1.1 * rounded


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_in_the_invariant_mode_a_prompt_has_the_bits_of_tokens_that_decode(
    tiny_model: Path, dtype: str
) -> None:
    decoded = after_prompts(tiny_model, dtype, 0)
    for chunk in (3, 50, 256):
        assert torch.equal(after_prompts(tiny_model, dtype, chunk), decoded), chunk
