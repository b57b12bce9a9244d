"""The matrix: each variant on each model, in each dtype, on each kind of kernels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lorax_serve.config import EngineConfig
from lorax_serve.core import Batch, SamplingParams, Sequence
from tests.fidelity.compositions import (
    COMPOSITIONS,
    compositions_of,
    peft_side_by_side,
    peft_sum,
)
from tests.fidelity.matrix import (
    GROUPS,
    TOLERANCE,
    Group,
    run_group,
    weights_of,
    write_group,
)
from tests.fidelity.variants import UNTIED, VARIANTS
from tests.helpers import needs_kernels
from tests.model.logits_runner import LogitsRunner

Written = Callable[[str], tuple[Path, dict[str, Path]]]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """A kind of model and its adapters, written once."""
    made: dict[str, tuple[Path, dict[str, Path]]] = {}

    def get(model: str) -> tuple[Path, dict[str, Path]]:
        if model not in made:
            made[model] = write_group(model, tmp_path_factory.mktemp(model))
        return made[model]

    return get


def marks(group: Group) -> list[pytest.MarkDecorator]:
    slow = group.ranks > 1 and group.model != UNTIED
    return [needs_kernels] * (group.kernels == "compiled") + [pytest.mark.slow] * slow


@pytest.mark.parametrize(
    "group", [pytest.param(group, id=str(group), marks=marks(group)) for group in GROUPS]
)
def test_every_variant_equals_peft_alone(group: Group, written: Written) -> None:
    model, adapters = written(group.model)
    cases = list(run_group(group, model, adapters))
    assert {case.variant for case in cases} == {"base", *adapters, *compositions_of(adapters)}
    assert {case.variant: case.error for case in cases if not case.passed} == {}
    # What is ignored must show.
    silent = {"base", "alora, not invoked"}
    seen = {case.variant: case.effect for case in cases if case.variant not in silent}
    assert min(seen.values()) > 1.5 * TOLERANCE[group.dtype]


@pytest.mark.parametrize("first", ["rslora", "exclude_modules", "layers_to_transform"])
def test_the_order_of_the_parts_does_not_matter(first: str, written: Written) -> None:
    """It does in PEFT's ``cat``, which takes these settings over from the first part."""
    model, adapters = written(UNTIED)
    parts = {first: 0.5, "linear": 1.0}
    runner = LogitsRunner(EngineConfig(model=str(model), dtype="float32"))
    prompt = list(range(12, 40))
    for slot, order in enumerate((parts, dict(reversed(parts.items())))):
        runner.put_adapter(slot, runner.fold(weights_of("", order, runner, adapters)))
        alone = Sequence(slot, prompt[:], len(prompt), 0, SamplingParams(), 9, 0, frozenset())
        alone.kv_slot = alone.adapter_slot = slot
        runner.step(Batch(prefills=[(alone, len(prompt))]))
    auto: Any = AutoModelForCausalLM
    for theirs in (peft_side_by_side, peft_sum):
        base = auto.from_pretrained(model, dtype=torch.float32)
        with torch.no_grad():
            wanted = theirs(base, parts, adapters).eval()(torch.tensor([prompt])).logits[0, -1]
        for slot in range(2):
            torch.testing.assert_close(
                runner.logits[slot], wanted, atol=TOLERANCE["float32"], rtol=0
            )


def test_every_composition_is_on_every_model(written: Written) -> None:
    for model in {group.model for group in GROUPS}:
        assert compositions_of(written(model)[1]) == list(COMPOSITIONS), model


def test_every_variant_is_on_some_model() -> None:
    models = {group.model for group in GROUPS}
    for name, variant in VARIANTS.items():
        assert any(variant.fields(model) is not None for model in models), name
