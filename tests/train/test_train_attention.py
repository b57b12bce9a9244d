"""Attention over rows without padding, against transformers' own over padded ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from lorax_train.config import InjectionConfig
from lorax_train.data.batches import Share
from lorax_train.data.encode import Example
from lorax_train.loop.loss import TargetLoss
from lorax_train.model.attention import attend_to_rows, use_row_attention
from lorax_train.model.base import load_model
from lorax_train.model.inject import inject

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {
    "vocab_size": 90,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
KV = SIZES | {"num_key_value_heads": 2}


def build(name: str) -> PreTrainedModel:
    """A random model, with logits that differ visibly."""
    torch.manual_seed(0)
    models: dict[str, Callable[[], PreTrainedModel]] = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**KV)),
        "mistral": lambda: MistralForCausalLM(MistralConfig(**KV, sliding_window=5)),
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**KV, head_dim=16)),
        "gemma": lambda: GemmaForCausalLM(GemmaConfig(**KV, head_dim=16)),
        "neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES)),
    }
    model: Any = models[name]()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    found: PreTrainedModel = model.eval().requires_grad_(False)
    return found


def rows(*lengths: int) -> list[Example]:
    generator = torch.Generator().manual_seed(1)
    return [
        Example(
            tuple(torch.randint(3, 90, (n,), generator=generator).tolist()),
            (False, *[i % 3 > 0 for i in range(n - 1)]),
            f"row {n}",
        )
        for n in lengths
    ]


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "gemma", "neox"])
def test_rows_give_the_losses_of_padded_rows_and_the_same_gradient(name: str) -> None:
    examples = rows(20, 7, 7, 12)
    found = []
    for lean in (False, True):
        model = build(name)
        loss = TargetLoss.prepare(model, examples[0]) if lean else TargetLoss(model)
        assert loss.padded is not lean
        adapter = inject(model, InjectionConfig(r=4), "tiny", seed=0)
        loss.routing = adapter.routing
        for pair in adapter.pairs().values():
            torch.nn.init.normal_(pair.b, std=0.02, generator=torch.Generator().manual_seed(0))
        batch = loss.collate(examples, 0)
        total, each = loss(batch)
        total.backward()  # type: ignore[no-untyped-call]
        grads = [p.grad for p in adapter.parameters() if p.grad is not None]
        assert len(grads) == len(adapter.parameters())
        found.append([each, *grads])
    for ours, theirs in zip(*found, strict=True):
        scale = theirs.abs().max().item()
        torch.testing.assert_close(ours, theirs, atol=1e-4 * scale, rtol=1e-4)


@pytest.mark.parametrize("base", ["llama", "gpt2"], indirect=True)
def test_a_changed_row_changes_nothing_of_another(base: Path) -> None:
    model = load_model("tiny", base, torch.float32, CPU)
    first, second, third = rows(9, 14, 9)
    loss = TargetLoss.prepare(model, first)
    assert not loss.padded
    adapter = inject(model, InjectionConfig(r=4), "tiny", seed=0)
    loss.routing = adapter.routing
    for pair in adapter.pairs().values():
        torch.nn.init.normal_(pair.b, std=0.1)
    changed = Example(tuple(reversed(second.tokens)), second.trained, "")
    found = []
    for middle in (second, changed):
        # Only the outer rows weigh: the middle one could reach the gradient through attention.
        batch = loss.collate([Share(0, [first]), Share(0, [middle], 0.0), Share(0, [third])], 0)
        total, each = loss(batch)
        for parameter in adapter.parameters():
            parameter.grad = None
        total.backward()  # type: ignore[no-untyped-call]
        of_others = torch.cat([each[: first.n_targets], each[-third.n_targets :]])
        grads = [p.grad for p in adapter.parameters() if p.grad is not None]
        assert len(grads) == len(adapter.parameters())
        found.append((each, of_others, grads))
    assert not torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    for one, other in zip(found[0][2], found[1][2], strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("window", [None, 3])
def test_each_row_sees_itself_through_a_window(window: int | None) -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 4, 16, 8), *torch.randn(2, 1, 2, 16, 8).unbind()
    bounds = (0, 5, 10, 16)
    found, _ = attend_to_rows(
        None, query, key, value, row_bounds=bounds, scaling=0.3, sliding_window=window
    )
    place = torch.arange(16)
    row = torch.bucketize(place, torch.tensor(bounds[1:]), right=True)
    back = place[:, None] - place[None]
    seen = (back >= 0) & (row[:, None] == row[None]) & (back < (window or 99))
    keys, values = (each.repeat_interleave(2, dim=1) for each in (key, value))
    scores = (query @ keys.mT * 0.3).masked_fill(~seen, -torch.inf)
    expected = (scores.softmax(-1) @ values).transpose(1, 2)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "asked", [{"softcap": 50.0}, {"s_aux": 1}, {"is_causal": False}, {"dropout": 0.1}]
)
def test_other_attention_is_refused_so_that_rows_are_padded(asked: dict[str, object]) -> None:
    x = torch.randn(1, 2, 4, 8)
    with pytest.raises(ValueError, match="attention over rows has no"):
        attend_to_rows(None, x, x, x, **asked)  # type: ignore[arg-type]


def test_padding_is_refused(llama: Path) -> None:
    model = load_model("tiny", llama, torch.float32, CPU)
    use_row_attention(model)
    ids = torch.arange(8).view(2, 4)
    mask = torch.ones_like(ids)
    model(input_ids=ids, attention_mask=mask)
    mask[0, 3] = 0
    with pytest.raises(ValueError, match="takes no padding"):
        model(input_ids=ids, attention_mask=mask)


def test_layers_that_only_their_mask_tells_what_to_see_are_refused(llama: Path) -> None:
    model = load_model("tiny", llama, torch.float32, CPU)
    model.config.layer_types = ["full_attention", "chunked_attention"]
    with pytest.raises(ValueError, match="not known to keep rows apart"):
        use_row_attention(model)
    loss = TargetLoss.prepare(model, rows(9)[0])
    assert loss.padded
    assert loss.head_on_targets
