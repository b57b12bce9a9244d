"""Which regular expressions of a config are too costly to match."""

from __future__ import annotations

import re
from typing import Any

import pytest

from lorax_serve.adapter import LoRAConfig
from lorax_serve.adapter.patterns import MAX_CHARACTERS, MAX_WAYS, ways
from lorax_serve.errors import AdapterRejected, RejectReason

# As a popular trainer writes it.
GENERATED = (
    r"(?:.*?(?:vision|image|visual|patch_embed|language|text).*?(?:self_attn|attention|attn|mlp)"
    r".*?(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj).*?)"
    r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp)\.(?:(?:q_proj|k_proj)))"
)
USUAL = (
    GENERATED,
    r".*\.(q_proj|v_proj)",
    r"^(?!.*lm_head).*proj",
    r"model\.layers\.([0-9]|1[0-9])\..*(q|k)_proj",
    r"model.layers.[0-9]+.(self_attn|mlp).(.*_proj|q)",
    r"(base\.)?(model\.){1,2}layers.*",
    "|".join(rf"model\.layers\.{n}\.self_attn\.q_proj" for n in range(100)),
)
COSTLY = (
    "(a+)+$",
    "(.*)*x",
    "(a|a)*b",
    "(.*a){20}",
    ".*" * 12 + "!",
    "a?" * 30 + "a" * 30,
    "(?=(.*)+)x",
    r"(\w+\s?)*\.",
    "(a|ab)(a|ab)" * 20,
    "(?>(a+)+)b",
)


@pytest.mark.parametrize("expression", USUAL)
def test_usual_expressions_are_taken(expression: str) -> None:
    assert ways(expression) <= MAX_WAYS
    assert LoRAConfig.from_dict({"peft_type": "LORA", "target_modules": expression})


@pytest.mark.parametrize("expression", COSTLY)
@pytest.mark.parametrize(
    "place",
    [
        lambda e: {"target_modules": e},
        lambda e: {"exclude_modules": e},
        lambda e: {"rank_pattern": {e: 2}},
        lambda e: {"alpha_pattern": {e: 2}},
        lambda e: {"modules_to_save": [e]},
        lambda e: {"layers_pattern": [e], "layers_to_transform": [0]},
    ],
)
def test_costly_expressions_are_refused_everywhere(expression: str, place: Any) -> None:
    assert re.compile(expression)
    raw = {"peft_type": "LORA", "target_modules": ["q"], **place(expression)}
    with pytest.raises(AdapterRejected, match=r"could take for ever to match") as caught:
        LoRAConfig.from_dict(raw)
    assert caught.value.reason is RejectReason.UNSUPPORTED


def test_many_expressions_count_together() -> None:
    costly = r".*a.*b{}"
    raw = {"peft_type": "LORA", "target_modules": ["q"]}
    few, many = ({costly.format(n): 2 for n in range(count)} for count in (4, 1000))
    assert LoRAConfig.from_dict(raw | {"rank_pattern": few}).rank_for("q") == 8
    with pytest.raises(AdapterRejected, match="1000 expressions together"):
        LoRAConfig.from_dict(raw | {"rank_pattern": many})


def test_long_expressions_are_refused() -> None:
    with pytest.raises(AdapterRejected, match=f"more than {MAX_CHARACTERS} characters"):
        LoRAConfig.from_dict({"peft_type": "LORA", "target_modules": "q" * (MAX_CHARACTERS + 1)})
