"""``adapter_config.json``: what it says, checked key by key against what we apply exactly.

Semantics follow PEFT's ``LoraConfig``. A key that changes the result and that we do not apply is
refused, and so is a key that we have never heard of, unless its value is empty.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lorax_serve.adapter import parsing
from lorax_serve.adapter.parsing import ALL_LINEAR, LAYERS_PATTERN, PATTERN_KEY, bad
from lorax_serve.errors import AdapterRejected, RejectReason

__all__ = ["ALL_LINEAR", "LAYERS_PATTERN", "LoRAConfig"]

# Keys that never change what a loaded adapter computes: training-time switches, provenance, and
# parameters of initialisations that leave the base weights as they were.
_INERT = frozenset(
    {
        "auto_mapping",
        "corda_config",
        "eva_config",
        "inference_mode",
        "loftq_config",  # init_lora_weights="loftq" is what would change the base: see below
        "lora_ga_config",
        "megatron_config",
        "megatron_core",
        "peft_version",
        "qalora_group_size",  # only read with use_qalora
        "revision",
        "runtime_config",
        "velora_config",
    }
)

# Keys that change the forward pass or the base weights, and that this server does not apply.
_REFUSED = {
    "arrow_config": "Arrow routing changes the forward pass",
    "kasa_config": "KaSA changes the base weights",
    "layer_replication": "layer replication changes the base model",
    "monteclora_config": "MonteCLoRA changes the forward pass",
    "target_parameters": "LoRA on bare parameters (of experts, say) is not applied",
    "use_bdlora": "block-diagonal LoRA changes the forward pass",
    "use_qalora": "QA-LoRA changes the forward pass",
}

# Initialisations that leave the base weights alone. The others (pissa, olora, corda, loftq,
# lora_ga, mica) may move part of the base into the adapter: on the original base it is wrong then.
_HARMLESS_INIT: tuple[Any, ...] = (True, False, None, "gaussian", "eva", "orthogonal")

# Keys that old loaders do not know, and fail on even when they say nothing.
_RECENT = (
    "alora_invocation_tokens",
    "ensure_weight_tying",
    "exclude_modules",
    "lora_bias",
    "trainable_token_indices",
    "use_dora",
)


@dataclass(frozen=True, slots=True)
class LoRAConfig:
    """The meaningful part of a PEFT LoRA config, immutable and validated.

    The fields have PEFT's names and meanings. ``scale_for`` folds ``lora_alpha``, ``r``,
    ``use_rslora`` and both patterns into the one number that multiplies ``x @ A.T @ B.T``.
    """

    r: int = 8
    lora_alpha: float = 8
    target_modules: tuple[str, ...] | str = ()
    """A tuple of name suffixes, a regex for the whole path, or ``"all-linear"``."""
    exclude_modules: tuple[str, ...] | str = ()
    lora_dropout: float = 0.0
    """Training only; inert when serving."""
    use_rslora: bool = False
    """Scale by ``alpha / sqrt(r)`` instead of ``alpha / r`` (arXiv:2312.03732)."""
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    layers_to_transform: tuple[int, ...] = ()
    """Layer indices to which ``target_modules`` applies; empty means all of them."""
    layers_pattern: tuple[str, ...] = ()
    fan_in_fan_out: bool = False
    """Whether the base stores weights transposed (Conv1D). Inert for unmerged LoRA."""
    init_lora_weights: bool | str | None = True
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases of the base were trained: all, or those of the modules with LoRA."""
    use_dora: bool = False
    """Weight-decomposed LoRA (arXiv:2402.09353)."""
    lora_bias: bool = False
    """Whether ``lora_B`` has a bias."""
    modules_to_save: tuple[str, ...] = ()
    """Ends of paths of modules that the adapter replaces as a whole."""
    trainable_token_indices: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Tokens whose rows the adapter replaces, by the end of the embedding's path; under "" those of
    the input embedding."""
    ensure_weight_tying: bool = False
    """Whether a change of the input embedding is also one of the output that is tied to it."""
    alora_invocation_tokens: tuple[int, ...] = ()
    """If there are any, LoRA begins where they last occur in the prompt (aLoRA,
    arXiv:2504.12397)."""
    task_type: str | None = "CAUSAL_LM"
    base_model_name_or_path: str | None = None

    @classmethod
    def from_dict(cls, raw: object) -> LoRAConfig:
        """Read the parsed JSON of an ``adapter_config.json``.

        Raises:
            AdapterRejected: naming the key, when it is malformed (``bad_config``), or when it asks
                for something that would not be applied exactly (``unsupported``).
        """
        if not isinstance(raw, dict):
            raise bad(f"expected a JSON object, found {type(raw).__name__}")
        if raw.get("peft_type") != "LORA":
            raise AdapterRejected(
                RejectReason.UNSUPPORTED,
                f"adapter_config.json: peft_type={raw.get('peft_type')!r}; only 'LORA' is served",
            )
        _refuse_what_is_not_applied(raw)
        config = cls(
            r=parsing.positive_int(raw.get("r", 8), "r"),
            lora_alpha=parsing.number(raw.get("lora_alpha", 8), "lora_alpha"),
            target_modules=parsing.names_or_regex(raw.get("target_modules"), "target_modules"),
            exclude_modules=parsing.names_or_regex(raw.get("exclude_modules"), "exclude_modules"),
            lora_dropout=parsing.number(raw.get("lora_dropout", 0.0), "lora_dropout"),
            use_rslora=parsing.boolean(raw.get("use_rslora"), "use_rslora"),
            rank_pattern={
                k: parsing.positive_int(v, f"rank_pattern[{k!r}]")
                for k, v in parsing.pattern(raw.get("rank_pattern"), "rank_pattern").items()
            },
            alpha_pattern={
                k: parsing.number(v, f"alpha_pattern[{k!r}]")
                for k, v in parsing.pattern(raw.get("alpha_pattern"), "alpha_pattern").items()
            },
            layers_to_transform=parsing.layer_indices(raw.get("layers_to_transform")),
            layers_pattern=parsing.layer_patterns(raw.get("layers_pattern")),
            fan_in_fan_out=parsing.boolean(raw.get("fan_in_fan_out"), "fan_in_fan_out"),
            init_lora_weights=raw.get("init_lora_weights", True),
            bias=raw.get("bias", "none"),
            use_dora=parsing.boolean(raw.get("use_dora"), "use_dora"),
            lora_bias=parsing.boolean(raw.get("lora_bias"), "lora_bias"),
            modules_to_save=parsing.module_names(raw.get("modules_to_save"), "modules_to_save"),
            trainable_token_indices=parsing.token_indices(raw.get("trainable_token_indices")),
            ensure_weight_tying=parsing.boolean(
                raw.get("ensure_weight_tying"), "ensure_weight_tying"
            ),
            alora_invocation_tokens=parsing.invocation_tokens(raw.get("alora_invocation_tokens")),
            task_type=raw.get("task_type"),
            base_model_name_or_path=raw.get("base_model_name_or_path"),
        )
        config._check()
        return config

    def to_dict(self) -> dict[str, Any]:
        """The JSON that PEFT reads back as the same adapter.

        Only long-standing fields are written: old loaders fail on new ones, even when null.
        """
        out: dict[str, Any] = {"peft_type": "LORA", "inference_mode": True}
        for spec in dataclasses.fields(self):
            value = getattr(self, spec.name)
            if isinstance(value, tuple):
                value = list(value) or None
            elif isinstance(value, Mapping):
                value = dict(value)
            out[spec.name] = value
        tokens = self.trainable_token_indices
        if "" in tokens:
            out["trainable_token_indices"] = list(tokens[""])
        for key in _RECENT:
            if not getattr(self, key):
                del out[key]
        return dict(sorted(out.items()))

    @property
    def changes_base(self) -> bool:
        """Whether the initialisation moved a part of the base weights into the adapter, which is
        wrong on the original base until it is converted (PEFT:
        ``save_pretrained(..., path_initial_model_for_weight_conversion=...)``)."""
        init = self.init_lora_weights
        return not any(init is ok or init == ok for ok in _HARMLESS_INIT)

    def rank_for(self, path: str) -> int:
        """The rank of the module at ``path`` (a full module path such as ``model.layers.0...``)."""
        return self.rank_pattern.get(_pattern_key(self.rank_pattern, path), self.r)

    def alpha_for(self, path: str) -> float:
        """The alpha of the module at ``path``."""
        return self.alpha_pattern.get(_pattern_key(self.alpha_pattern, path), self.lora_alpha)

    def scale_for(self, path: str) -> float:
        """The factor of ``x @ A.T @ B.T`` at ``path``: ``alpha/r``, or ``alpha/sqrt(r)``."""
        rank = self.rank_for(path)
        return self.alpha_for(path) / (math.sqrt(rank) if self.use_rslora else rank)

    def _check(self) -> None:
        """Refuse what PEFT itself refuses, and combinations that are not applied."""
        if not self.target_modules:
            raise bad("target_modules is empty; it must name the modules that the adapter changes")
        if self.layers_to_transform and isinstance(self.target_modules, str):
            raise bad("layers_to_transform needs target_modules to be a list, as in PEFT")
        if self.layers_pattern and not self.layers_to_transform:
            raise bad("layers_pattern needs layers_to_transform, as in PEFT")
        if self.bias not in ("none", "all", "lora_only"):
            raise bad(f"bias must be 'none', 'all' or 'lora_only', found {self.bias!r}")
        if self.use_dora and self.lora_bias:
            raise bad("use_dora and lora_bias exclude each other, as in PEFT")
        together = {
            "bias": self.bias != "none",
            "modules_to_save": self.modules_to_save,
            "trainable_token_indices": self.trainable_token_indices,
            "use_dora": self.use_dora,
        }
        if self.alora_invocation_tokens and any(together.values()):
            # Outside LoRA these would act on the tokens before the invocation too.
            named = ", ".join(key for key, on in together.items() if on)
            raise AdapterRejected(
                RejectReason.UNSUPPORTED,
                f"adapter_config.json: alora_invocation_tokens with {named} is not applied",
            )


def _pattern_key(patterns: Mapping[str, Any], path: str) -> str:
    """PEFT's ``get_pattern_key``: the first key, in order, that matches the end of the path."""
    for key in patterns:
        if re.match(PATTERN_KEY.format(key), path):
            return key
    return path


def _refuse_what_is_not_applied(raw: Mapping[str, Any]) -> None:
    known = _INERT | {"peft_type"} | {spec.name for spec in dataclasses.fields(LoRAConfig)}
    for key, value in raw.items():
        if key in known or not value:
            continue
        why = _REFUSED.get(key, "this key is unknown, and may change what the adapter computes")
        raise AdapterRejected(
            RejectReason.UNSUPPORTED, f"adapter_config.json: {key}={value!r}: {why}"
        )
