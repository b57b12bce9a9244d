"""The GPU's decoder on Triton kernels, through graphs where there are any, against plain torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lorax_serve.config import EngineConfig
from lorax_serve.core import BASE, Batch, RowCopy, SamplingParams, Sequence
from tests.helpers import save_peft_adapter
from tests.model.logits_runner import LogitsRunner, load

ADAPTERS: dict[str, list[dict[str, Any]]] = {
    "tiny_model": [
        {"r": 4, "target_modules": "all-linear"},
        {"r": 20, "target_modules": ["q_proj", "v_proj", "down_proj"], "use_rslora": True},
        {"r": 3, "target_modules": ["k_proj", "gate_proj", "o_proj"], "use_dora": True},
        {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
    ],
    "tiny_gpt2": [
        {"r": 4, "target_modules": ["c_attn"], "fan_in_fan_out": True},
        {"r": 18, "target_modules": ["c_fc", "c_proj"], "fan_in_fan_out": True, "bias": "all"},
    ],
}
STEPS = 3


def sequences(count: int) -> list[Sequence]:
    generator = torch.Generator().manual_seed(5)
    found = []
    for row in range(2 * count + 2):
        prompt = torch.randint(3, 128, (3 + 9 * row,), generator=generator).tolist()
        sequence = Sequence(row, prompt, len(prompt), None, SamplingParams(), 9, 0, frozenset())
        sequence.kv_slot = (row * 5 + 3) % (2 * count + 3)
        sequence.adapter_slot = row % (count + 1) - 1
        found.append(sequence)
    assert any(s.adapter_slot == BASE for s in found)
    return found


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
@pytest.mark.parametrize("base", ADAPTERS)
def test_logits_equal_plain_torchs(
    base: str, device: torch.device, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    model: Path = request.getfixturevalue(base)
    runners = {}
    for kernels in ("paged", "triton"):
        runners[kernels] = runner = LogitsRunner(
            EngineConfig(
                model=str(model),
                dtype="float32",
                device=device.type,
                kernels=kernels,
                max_batch_size=12,
                kv_cache_tokens=2048,
            )
        )
        for slot, config in enumerate(ADAPTERS[base]):
            torch.manual_seed(slot)
            load(runner, slot, save_peft_adapter(model, tmp_path / f"{kernels}{slot}", **config))
    runners["triton"].warm_up()
    ours, theirs = (sequences(len(ADAPTERS[base])) for _ in runners)
    for step in range(2 + STEPS):
        for runner, running in zip(runners.values(), (theirs, ours), strict=True):
            runner.step(_batch(running, step))
        _same(runners["triton"].logits, runners["paged"].logits)
    # A row whose prefix another has: a shared page, and a copied one.
    for runner, running in zip(runners.values(), (theirs, ours), strict=True):
        source, free = running[-1], len(running)
        again = Sequence(
            99, source.tokens[:], len(source.tokens), None, SamplingParams(), 9, 0, frozenset(),
            kv_slot=free, computed=40, adapter_slot=source.adapter_slot,
        )  # fmt: skip
        batch = Batch(prefills=[(again, again.remaining)])
        batch.copies = [RowCopy(source.kv_slot, free, 40)]
        runner.step(batch)
    _same(runners["triton"].logits, runners["paged"].logits)


def _batch(running: list[Sequence], step: int) -> Batch:
    """Prompts in two chunks, the second beside rows that decode, then decoding alone."""
    if step == 0:
        return Batch(prefills=[(s, min(s.remaining, 40)) for s in running])
    decodes = [s for s in running if s.remaining == 1]
    return Batch(decodes=decodes, prefills=[(s, s.remaining) for s in running if s.remaining > 1])


def _same(ours: dict[int, torch.Tensor], theirs: dict[int, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for key, logits in ours.items():
        torch.testing.assert_close(logits, theirs[key], rtol=1e-4, atol=1e-4)
