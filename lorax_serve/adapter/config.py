"""``adapter_config.json``: what it says, checked key by key against what we apply exactly.

Semantics follow PEFT's ``LoraConfig``. A key that changes the result and that we do not apply is
refused, and so is a key that we have never heard of, unless its value is empty.
"""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lorax_serve.errors import AdapterRejected, RejectReason

__all__ = ["ALL_LINEAR", "LAYERS_PATTERN", "LoRAConfig"]

ALL_LINEAR = "all-linear"

# PEFT's expressions around its users' patterns.
_PATTERN_KEY = r"(.*\.)?({})$"
LAYERS_PATTERN = r"(?:^|.*?\.){}\.(?P<index>\d+)\."

_MAX = sys.float_info.max

# Keys that never change what a loaded adapter computes: training-time switches, provenance, and
# parameters of initialisations that leave the base weights as they were.
_INERT = frozenset(
    {
        "auto_mapping",
        "corda_config",
        "ensure_weight_tying",
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
    "alora_invocation_tokens": "activated LoRA (aLoRA) is not applied yet",
    "arrow_config": "Arrow routing changes the forward pass",
    "kasa_config": "KaSA changes the base weights",
    "layer_replication": "layer replication changes the base model",
    "lora_bias": "a bias on lora_B is not applied yet",
    "modules_to_save": "full copies of modules are not applied yet",
    "monteclora_config": "MonteCLoRA changes the forward pass",
    "target_parameters": "LoRA on bare parameters is not applied yet",
    "trainable_token_indices": "trainable tokens are not applied yet",
    "use_bdlora": "block-diagonal LoRA changes the forward pass",
    "use_dora": "DoRA is not applied yet",
    "use_qalora": "QA-LoRA changes the forward pass",
}

# Initialisations that leave the base weights alone. The others (pissa, olora, corda, loftq,
# lora_ga) move part of the base into the adapter: served on the original base they are wrong.
_HARMLESS_INIT: tuple[Any, ...] = (True, False, None, "gaussian", "eva", "orthogonal")


def _bad(message: str) -> AdapterRejected:
    return AdapterRejected(RejectReason.BAD_CONFIG, f"adapter_config.json: {message}")


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
    bias: Literal["none"] = "none"
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
            raise _bad(f"expected a JSON object, found {type(raw).__name__}")
        if raw.get("peft_type") != "LORA":
            raise AdapterRejected(
                RejectReason.UNSUPPORTED,
                f"adapter_config.json: peft_type={raw.get('peft_type')!r}; only 'LORA' is served",
            )
        _refuse_what_is_not_applied(raw)
        config = cls(
            r=_positive_int(raw.get("r", 8), "r"),
            lora_alpha=_number(raw.get("lora_alpha", 8), "lora_alpha"),
            target_modules=_names_or_regex(raw.get("target_modules"), "target_modules"),
            exclude_modules=_names_or_regex(raw.get("exclude_modules"), "exclude_modules"),
            lora_dropout=_number(raw.get("lora_dropout", 0.0), "lora_dropout"),
            use_rslora=_bool(raw.get("use_rslora"), "use_rslora"),
            rank_pattern={
                k: _positive_int(v, f"rank_pattern[{k!r}]")
                for k, v in _pattern(raw.get("rank_pattern"), "rank_pattern").items()
            },
            alpha_pattern={
                k: _number(v, f"alpha_pattern[{k!r}]")
                for k, v in _pattern(raw.get("alpha_pattern"), "alpha_pattern").items()
            },
            layers_to_transform=_layer_indices(raw.get("layers_to_transform")),
            layers_pattern=_layer_patterns(raw.get("layers_pattern")),
            fan_in_fan_out=_bool(raw.get("fan_in_fan_out"), "fan_in_fan_out"),
            init_lora_weights=raw.get("init_lora_weights", True),
            task_type=raw.get("task_type"),
            base_model_name_or_path=raw.get("base_model_name_or_path"),
        )
        if not config.target_modules:
            raise _bad("target_modules is empty; it must name the modules that the adapter changes")
        if config.layers_to_transform and isinstance(config.target_modules, str):
            raise _bad("layers_to_transform needs target_modules to be a list, as in PEFT")
        if config.layers_pattern and not config.layers_to_transform:
            raise _bad("layers_pattern needs layers_to_transform, as in PEFT")
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
        if not self.exclude_modules:
            del out["exclude_modules"]
        return dict(sorted(out.items()))

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


def _pattern_key(patterns: Mapping[str, Any], path: str) -> str:
    """PEFT's ``get_pattern_key``: the first key, in order, that matches the end of the path."""
    for key in patterns:
        if re.match(_PATTERN_KEY.format(key), path):
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
    if raw.get("bias", "none") != "none":
        raise AdapterRejected(
            RejectReason.UNSUPPORTED,
            f"adapter_config.json: bias={raw['bias']!r}: trained biases are not applied yet",
        )
    init = raw.get("init_lora_weights", True)
    if not any(init is ok or init == ok for ok in _HARMLESS_INIT):
        raise AdapterRejected(
            RejectReason.UNSUPPORTED,
            f"adapter_config.json: init_lora_weights={init!r} changes the base weights, so the "
            "adapter is wrong on the original base; convert it to a plain LoRA first (PEFT: "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...))",
        )


def _positive_int(value: object, key: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise _bad(f"{key} must be a whole number of at least 1, found {value!r}")
    return value


def _number(value: object, key: str) -> float:
    # The bounds refuse NaN and infinity too, and whole numbers that no float can hold.
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _MAX:
        raise _bad(f"{key} must be a finite number, found {value!r}")
    return value


def _bool(value: object, key: str) -> bool:
    if value is not None and not isinstance(value, bool):
        raise _bad(f"{key} must be true or false, found {value!r}")
    return bool(value)


def _as_tuple(value: object, key: str) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
        return tuple(value)
    raise _bad(f"{key} must be a list of strings, found {value!r}")


def _names_or_regex(value: object, key: str) -> tuple[str, ...] | str:
    if isinstance(value, str):
        if value.lower() == ALL_LINEAR:
            return ALL_LINEAR
        _check_regex(value, key)
        return value
    # PEFT collects the names in a set, so their order means nothing: sort for stable files.
    return tuple(sorted(_as_tuple(value, key)))


def _pattern(value: object, key: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise _bad(f"{key} must be an object of module patterns, found {value!r}")
    for pattern in value:
        _check_regex(pattern, key, within=_PATTERN_KEY)
    return value


def _layer_patterns(value: object) -> tuple[str, ...]:
    patterns = _as_tuple(value, "layers_pattern")
    for pattern in patterns:
        _check_regex(pattern, "layers_pattern", within=LAYERS_PATTERN)
    return patterns


def _check_regex(pattern: str, key: str, within: str = "{}") -> None:
    """Refuse what does not compile where it is used: inside the expression ``within``."""
    try:
        re.compile(within.format(pattern))
    except (re.error, OverflowError, RecursionError) as error:
        raise _bad(f"{key}: {pattern!r} is not a regular expression: {error}") from error


def _layer_indices(value: object) -> tuple[int, ...]:
    if value is None:
        return ()
    items = value if isinstance(value, list) else [value]
    for item in items:
        if isinstance(item, bool) or not isinstance(item, int) or item < 0:
            raise _bad(f"layers_to_transform must hold layer indices, found {item!r}")
    return tuple(items)
