"""The matrix: each variant on each model, in each dtype, on each kind of kernels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fidelity.matrix import GROUPS, TOLERANCE, Group, run_group, write_group
from tests.fidelity.variants import VARIANTS
from tests.helpers import needs_kernels

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


@pytest.mark.parametrize(
    "group",
    [
        pytest.param(group, id=str(group), marks=needs_kernels if group.kernels != "torch" else ())
        for group in GROUPS
    ],
)
def test_every_variant_equals_peft_alone(group: Group, written: Written) -> None:
    model, adapters = written(group.model)
    cases = list(run_group(group, model, adapters))
    assert {case.variant for case in cases} == {"base", *adapters}
    assert {case.variant: case.error for case in cases if not case.passed} == {}
    # What is ignored must show.
    silent = {"base", "alora, not invoked"}
    seen = {case.variant: case.effect for case in cases if case.variant not in silent}
    assert min(seen.values()) > 1.5 * TOLERANCE[group.dtype]


def test_every_variant_is_on_some_model() -> None:
    models = {group.model for group in GROUPS}
    for name, variant in VARIANTS.items():
        assert any(variant.fields(model) is not None for model in models), name
