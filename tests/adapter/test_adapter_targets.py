"""``select_targets`` picks the modules that PEFT injects LoRA into, for every way to say it."""

from __future__ import annotations

from typing import Any

import pytest
from peft import LoraConfig

from lorax_serve.adapter import LoRAConfig, select_targets
from lorax_serve.errors import AdapterRejected, RejectReason
from tests.adapter.peft_side import peft_layers, tiny_modules


def read(fields: dict[str, Any]) -> LoRAConfig:
    return LoRAConfig.from_dict({"peft_type": "LORA", **fields})


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": ["q_proj", "down_proj", "nothing"]},
        {"target_modules": ["self_attn.q_proj"]},
        {"target_modules": ["lm_head"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["model.layers.0.mlp.gate_proj"]},
        {"target_modules": ["layers.1.mlp.up_proj", "k_proj"]},
        {"target_modules": r".*\.q_proj"},
        {"target_modules": r".*(q|v)_proj$"},
        {"target_modules": r"model\.layers\.[1-9]\d*\.(self_attn|mlp)\.\w+_proj"},
        {"target_modules": "lm_head"},
        {"target_modules": r"(?i).*\.Q_PROJ"},
        {"target_modules": "all-linear"},
        {"target_modules": "ALL-linear"},
        {"target_modules": "all-linear", "exclude_modules": ["q_proj"]},
        {"target_modules": "all-linear", "exclude_modules": r".*\.0\..*"},
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["proj"]},
        {"target_modules": r".*_proj", "exclude_modules": ["mlp", "o_proj"]},
        {"target_modules": r".*_proj", "exclude_modules": r"q_proj"},
        {"target_modules": r".*_proj", "exclude_modules": r".*(q|up)_proj"},
        {"target_modules": ["q_proj"], "exclude_modules": []},
        {"target_modules": ["q_proj"], "layers_to_transform": [1]},
        {"target_modules": ["q_proj"], "layers_to_transform": [0, 1, 7]},
        {"target_modules": ["q_proj"], "layers_to_transform": 0},
        {"target_modules": ["q_proj"], "layers_to_transform": []},
        {"target_modules": ["q_proj", "lm_head"], "layers_to_transform": [0]},
        {"target_modules": ["v_proj", "model.layers.0.self_attn.q_proj"]}
        | {"layers_to_transform": [1]},
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
        {"target_modules": ["q_proj"], "layers_to_transform": [1]}
        | {"layers_pattern": ["h", "layers"]},
        {"target_modules": ["q_proj"], "layers_to_transform": [0]}
        | {"layers_pattern": [r"(lay\w+|blocks)"]},
        {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": []},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:You have passed exclude_modules:UserWarning")
def test_selects_what_peft_injects(fields: dict[str, Any]) -> None:
    theirs = set(peft_layers(LoraConfig(**fields)))
    ours = select_targets(read(fields), tiny_modules())
    assert theirs
    assert set(ours) == theirs
    assert len(ours) == len(theirs)


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["Wqkv", "out"]},
        {"target_modules": ["proj"]},
        {"target_modules": "q_proj"},  # a regex for the whole path
        {"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]},
        {"target_modules": ["q_proj"], "layers_to_transform": [2]},
        {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": ["h"]},
    ],
    ids=str,
)
def test_zero_matches_are_refused_as_in_peft(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"[Tt]arget modules"):
        peft_layers(LoraConfig(**fields))
    with pytest.raises(AdapterRejected) as caught:
        select_targets(read(fields), tiny_modules())
    assert caught.value.reason is RejectReason.NO_MATCH
    wanted = fields["target_modules"]
    assert (wanted if isinstance(wanted, str) else wanted[0]) in str(caught.value)
    assert "down_proj, gate_proj, k_proj" in str(caught.value)  # says what there is


def test_order_is_the_models() -> None:
    modules = tiny_modules()
    paths = select_targets(read({"target_modules": ["v_proj", "q_proj"]}), modules)
    assert paths == [path for path in modules if path.endswith(("q_proj", "v_proj"))]
