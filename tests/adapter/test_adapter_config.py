"""``LoRAConfig``: the same adapter as in PEFT, or a refusal that names the key."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig

from lorax_serve.adapter import CONFIG_FILE, LoRAConfig
from lorax_serve.errors import AdapterRejected, RejectReason
from tests.adapter.peft_side import peft_layers

GOOD: dict[str, Any] = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"]}
GATE = "model.layers.0.mlp.gate_proj"

CONFIGS: list[dict[str, Any]] = [
    {"target_modules": ["q_proj"]},
    {"r": 4, "lora_alpha": 32, "lora_dropout": 0.1, "target_modules": ["v_proj", "q_proj"]},
    {"r": 3, "lora_alpha": 5, "use_rslora": True, "target_modules": "all-linear"},
    {"target_modules": r".*\.mlp\..*_proj", "exclude_modules": ["down_proj"]},
    {"target_modules": ["q_proj", "k_proj"], "exclude_modules": r".*\.0\..*"},
    {"target_modules": ["up_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    {"target_modules": ["up_proj"], "layers_to_transform": 0},
    {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
    {"target_modules": ["q_proj"], "init_lora_weights": False},
    {"target_modules": ["q_proj"], "use_dora": True, "bias": "lora_only"},
    {"target_modules": ["q_proj"], "lora_bias": True, "modules_to_save": ["lm_head"]},
    {"target_modules": ["q_proj"], "trainable_token_indices": [4, 2]},
    {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [4, 2]}},
    {"target_modules": ["q_proj"], "alora_invocation_tokens": [4, 2]},
    {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
    {
        "r": 4,
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"v_proj": 2},
        "alpha_pattern": {r"layers\.1\..*": 7.5},
    },
]


def through_json(config: LoRAConfig) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(json.dumps(config.to_dict()))
    return parsed


def rejection(raw: object) -> AdapterRejected:
    with pytest.raises(AdapterRejected) as caught:
        LoRAConfig.from_dict(raw)
    return caught.value


@pytest.mark.parametrize("fields", CONFIGS, ids=str)
@pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning")
@pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`:UserWarning")
def test_what_peft_writes_is_read_and_what_is_written_peft_reads(
    fields: dict[str, Any], tmp_path: Path
) -> None:
    theirs = LoraConfig(task_type="CAUSAL_LM", **fields)
    theirs.save_pretrained(tmp_path)
    ours = LoRAConfig.from_dict(json.loads((tmp_path / CONFIG_FILE).read_text()))

    assert LoRAConfig.from_dict(through_json(ours)) == ours

    (tmp_path / CONFIG_FILE).write_text(json.dumps(ours.to_dict()))
    back = LoraConfig.from_pretrained(tmp_path)
    for key in ("r", "lora_alpha", "lora_dropout", "use_rslora", "init_lora_weights", "bias"):
        assert getattr(back, key) == getattr(theirs, key), key
    for key in ("target_modules", "rank_pattern", "alpha_pattern", "task_type"):
        assert getattr(back, key) == getattr(theirs, key), key
    assert peft_layers(back) == peft_layers(theirs)


def test_adapter_saved_by_peft_is_read_whole(make_adapter: Callable[..., Path]) -> None:
    path = make_adapter("one", r=4, lora_alpha=12, target_modules=["o_proj", "k_proj"])
    config = LoRAConfig.from_dict(json.loads((path / CONFIG_FILE).read_text()))
    assert (config.r, config.lora_alpha) == (4, 12)
    assert config.target_modules == ("k_proj", "o_proj")
    assert config.base_model_name_or_path


@pytest.mark.parametrize(
    "fields",
    [
        {"r": 4, "lora_alpha": 6},
        {"r": 5, "lora_alpha": 6, "use_rslora": True},
        {"r": 4, "rank_pattern": {"q_proj": 2, "down_proj": 7}},
        {"r": 4, "use_rslora": True, "rank_pattern": {"q_proj": 2}},
        {"r": 4, "alpha_pattern": {"q_proj": 1, "layers.1.mlp.up_proj": 0.5}},
        {"r": 4, "rank_pattern": {r"layers\.0\..*": 3, "q_proj": 2}},  # the first that matches
        {"r": 4, "rank_pattern": {"q_proj": 2, r"layers\.0\..*": 3}},
        {"r": 4, "rank_pattern": {"proj": 2}},  # no whole part of a path: matches nothing
        {"r": 4, "rank_pattern": {r".*_proj|nothing": 2}},
        {"r": 4, "rank_pattern": {"model.layers.0.self_attn.q_proj": 6}},
        {"r": 4, "rank_pattern": {r"^model\.layers\.1\.self_attn\.q_proj": 6}},
        {"r": 2, "rank_pattern": {r"(q|k)_proj": 6}, "alpha_pattern": {r"[kv]_proj": 3}},
        {
            "r": 2,
            "use_rslora": True,
            "rank_pattern": {r"layers\.[01]\.mlp\.\w+": 9},
            "alpha_pattern": {r"mlp\.up_proj": 11},
        },
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning")
def test_rank_and_scale_of_every_module_are_pefts(fields: dict[str, Any]) -> None:
    theirs = peft_layers(LoraConfig(target_modules="all-linear", **fields))
    raw = {"peft_type": "LORA", "target_modules": "all-linear", **fields}
    ours = LoRAConfig.from_dict(raw)
    assert len(theirs) == 14
    for path, layer in theirs.items():
        assert ours.rank_for(path) == layer.rank, path
        assert ours.scale_for(path) == pytest.approx(layer.scale, rel=1e-12), path


def test_defaults_are_pefts() -> None:
    ours = LoRAConfig.from_dict({"peft_type": "LORA", "target_modules": ["q_proj"]})
    theirs = LoraConfig()
    for key in ("r", "lora_alpha", "lora_dropout", "use_rslora", "fan_in_fan_out", "bias"):
        assert getattr(ours, key) == getattr(theirs, key), key


@pytest.mark.parametrize(
    ("extra", "reason", "named"),
    [
        ({"peft_type": "LOHA"}, RejectReason.UNSUPPORTED, "peft_type='LOHA'"),
        ({"peft_type": None}, RejectReason.UNSUPPORTED, "peft_type=None"),
        ({"brand_new": 1}, RejectReason.UNSUPPORTED, "brand_new=1"),
        ({"use_qalora": True}, RejectReason.UNSUPPORTED, "use_qalora=True"),
        ({"target_parameters": ["w"]}, RejectReason.UNSUPPORTED, "target_parameters="),
        ({"layer_replication": [[0, 1]]}, RejectReason.UNSUPPORTED, "layer_replication="),
        ({"arrow_config": {"top_k": 1}}, RejectReason.UNSUPPORTED, "arrow_config="),
        ({"r": 0}, RejectReason.BAD_CONFIG, "r must be"),
        ({"bias": "some"}, RejectReason.BAD_CONFIG, "bias must be"),
        ({"use_dora": "yes"}, RejectReason.BAD_CONFIG, "use_dora must be"),
        ({"use_dora": True, "lora_bias": True}, RejectReason.BAD_CONFIG, "exclude each other"),
        ({"modules_to_save": [""]}, RejectReason.BAD_CONFIG, "modules_to_save holds an empty"),
        ({"modules_to_save": ["("]}, RejectReason.BAD_CONFIG, "modules_to_save: '('"),
        ({"trainable_token_indices": 3}, RejectReason.BAD_CONFIG, "trainable_token_indices must"),
        ({"trainable_token_indices": [-1]}, RejectReason.BAD_CONFIG, "must hold token ids"),
        ({"trainable_token_indices": [1, 1]}, RejectReason.BAD_CONFIG, "names a token twice"),
        ({"trainable_token_indices": {"": [1]}}, RejectReason.BAD_CONFIG, "trainable_token_"),
        ({"alora_invocation_tokens": []}, RejectReason.BAD_CONFIG, "alora_invocation_tokens must"),
        ({"alora_invocation_tokens": ["a"]}, RejectReason.BAD_CONFIG, "must hold token ids"),
        (
            {"alora_invocation_tokens": [5], "modules_to_save": ["lm_head"], "bias": "all"},
            RejectReason.UNSUPPORTED,
            "alora_invocation_tokens with bias, modules_to_save is not applied",
        ),
        ({"r": -1}, RejectReason.BAD_CONFIG, "r must be"),
        ({"r": 4.0}, RejectReason.BAD_CONFIG, "r must be"),
        ({"r": True}, RejectReason.BAD_CONFIG, "r must be"),
        ({"r": None}, RejectReason.BAD_CONFIG, "r must be"),
        ({"lora_alpha": float("nan")}, RejectReason.BAD_CONFIG, "lora_alpha must be"),
        ({"lora_alpha": float("inf")}, RejectReason.BAD_CONFIG, "lora_alpha must be"),
        ({"lora_alpha": 10**400}, RejectReason.BAD_CONFIG, "lora_alpha must be"),
        ({"lora_alpha": "16"}, RejectReason.BAD_CONFIG, "lora_alpha must be"),
        ({"lora_dropout": None}, RejectReason.BAD_CONFIG, "lora_dropout must be"),
        ({"use_rslora": 1}, RejectReason.BAD_CONFIG, "use_rslora must be"),
        ({"fan_in_fan_out": "no"}, RejectReason.BAD_CONFIG, "fan_in_fan_out must be"),
        ({"rank_pattern": []}, RejectReason.BAD_CONFIG, "rank_pattern must be"),
        ({"rank_pattern": {"q_proj": 0}}, RejectReason.BAD_CONFIG, "rank_pattern['q_proj']"),
        ({"rank_pattern": {"(": 2}}, RejectReason.BAD_CONFIG, "rank_pattern: '('"),
        ({"rank_pattern": {"(?i)q": 2}}, RejectReason.BAD_CONFIG, "rank_pattern: '(?i)q'"),
        ({"alpha_pattern": {"q": None}}, RejectReason.BAD_CONFIG, "alpha_pattern['q']"),
        ({"alpha_pattern": {"[": 2}}, RejectReason.BAD_CONFIG, "alpha_pattern: '['"),
        ({"target_modules": None}, RejectReason.BAD_CONFIG, "target_modules is empty"),
        ({"target_modules": []}, RejectReason.BAD_CONFIG, "target_modules is empty"),
        ({"target_modules": ""}, RejectReason.BAD_CONFIG, "target_modules is empty"),
        ({"target_modules": [1]}, RejectReason.BAD_CONFIG, "target_modules must be"),
        ({"target_modules": "*q"}, RejectReason.BAD_CONFIG, "target_modules: '*q'"),
        ({"target_modules": "q{4294967296}"}, RejectReason.BAD_CONFIG, "target_modules: 'q{"),
        ({"exclude_modules": "(q"}, RejectReason.BAD_CONFIG, "exclude_modules: '(q'"),
        ({"layers_to_transform": [-1]}, RejectReason.BAD_CONFIG, "layers_to_transform must"),
        ({"layers_to_transform": "0"}, RejectReason.BAD_CONFIG, "layers_to_transform must"),
        ({"layers_to_transform": [True]}, RejectReason.BAD_CONFIG, "layers_to_transform must"),
        (
            {"layers_to_transform": [0], "target_modules": ".*q_proj"},
            RejectReason.BAD_CONFIG,
            "layers_to_transform needs",
        ),
        ({"layers_pattern": ["h"]}, RejectReason.BAD_CONFIG, "layers_pattern needs"),
        (
            {"layers_pattern": ["("], "layers_to_transform": [0]},
            RejectReason.BAD_CONFIG,
            "layers_pattern: '('",
        ),
        ({"layers_pattern": {"a": 1}}, RejectReason.BAD_CONFIG, "layers_pattern must be"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_refusals_name_the_key(extra: dict[str, Any], reason: RejectReason, named: str) -> None:
    error = rejection(GOOD | extra)
    assert error.reason is reason
    assert str(error).startswith("adapter_config.json: ")
    assert named in str(error)


@pytest.mark.parametrize(
    ("init", "changes"),
    [
        *((init, False) for init in (True, False, None, "gaussian", "eva", "orthogonal")),
        *((init, True) for init in ("pissa", "pissa_niter_4", "olora", "loftq", "corda", ["x"])),
    ],
)
def test_initialisations_that_change_the_base_are_known(init: object, changes: bool) -> None:
    assert LoRAConfig.from_dict(GOOD | {"init_lora_weights": init}).changes_base is changes


@pytest.mark.parametrize("raw", [None, [], "LORA", 3])
def test_config_that_is_no_object_is_refused(raw: object) -> None:
    error = rejection(raw)
    assert error.reason is RejectReason.BAD_CONFIG
    assert type(raw).__name__ in str(error)


def test_config_without_a_type_is_refused() -> None:
    assert "peft_type=None" in str(rejection({"r": 4, "target_modules": ["q_proj"]}))


def test_each_refused_key_is_fine_when_it_is_off() -> None:
    off: dict[str, object] = {
        "use_dora": False,
        "modules_to_save": None,
        "layer_replication": [],
        "unheard_of": {},
    }
    assert LoRAConfig.from_dict(GOOD | off) == LoRAConfig.from_dict(GOOD)


def test_keys_of_training_and_provenance_are_ignored() -> None:
    inert = {"peft_version": "0.21", "revision": "main", "eva_config": {"rho": 2.0}}
    assert LoRAConfig.from_dict(GOOD | inert) == LoRAConfig.from_dict(GOOD)


def test_order_of_target_modules_does_not_change_the_file() -> None:
    one, two = (
        LoRAConfig.from_dict(GOOD | {"target_modules": names})
        for names in (["q_proj", "v_proj"], ["v_proj", "q_proj"])
    )
    assert one.to_dict() == two.to_dict()


def test_written_config_has_no_key_that_old_loaders_do_not_know() -> None:
    keys = set(LoRAConfig.from_dict(GOOD).to_dict())
    assert "exclude_modules" not in keys
    assert {"peft_type", "r", "lora_alpha", "target_modules", "task_type"} <= keys
