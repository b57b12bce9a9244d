"""Which modules of a base model a LoRA config selects, by PEFT's rules.

Source: PEFT ``tuners_utils.check_target_module_exists`` and ``_maybe_include_all_linear_layers``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from lorax_serve.adapter.config import ALL_LINEAR, LAYERS_PATTERN, LoRAConfig
from lorax_serve.errors import AdapterRejected, RejectReason

__all__ = ["LinearShape", "select_targets"]


class LinearShape(NamedTuple):
    """A linear module of the base model: ``y = x @ W.T`` with W of ``[out_features, in_features]``.

    ``is_output`` marks the output embedding (lm_head), which ``all-linear`` leaves out.
    """

    in_features: int
    out_features: int
    is_output: bool = False


def select_targets(config: LoRAConfig, modules: Mapping[str, LinearShape]) -> list[str]:
    """The paths of ``modules`` that ``config`` targets, in the order of ``modules``.

    Raises:
        AdapterRejected: ``no_match`` when not one module is selected. PEFT raises here too; peers
            that go on serve the base model under the adapter's name.
    """
    paths = [path for path, shape in modules.items() if _is_target(config, path, shape)]
    if not paths:
        wanted = config.target_modules
        shown = repr(wanted) if isinstance(wanted, str) else ", ".join(map(repr, wanted))
        known = sorted({path.rsplit(".", 1)[-1] for path in modules})
        raise AdapterRejected(
            RejectReason.NO_MATCH,
            f"target_modules ({shown}) matches no linear module of this base model; "
            f"its linear modules are named {', '.join(known)}",
        )
    return paths


def _is_target(config: LoRAConfig, path: str, shape: LinearShape) -> bool:
    if config.exclude_modules and _names_match(config.exclude_modules, path):
        return False
    if config.target_modules == ALL_LINEAR:
        return not shape.is_output
    if isinstance(config.target_modules, str):
        return _names_match(config.target_modules, path)
    if path in config.target_modules:  # a full path wins over layers_to_transform
        return True
    return _names_match(config.target_modules, path) and _layer_selected(config, path)


def _names_match(names: tuple[str, ...] | str, path: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in names)


def _layer_selected(config: LoRAConfig, path: str) -> bool:
    """Whether the first index in ``path`` is one of ``layers_to_transform`` (all, if empty)."""
    if not config.layers_to_transform:
        return True
    if config.layers_pattern:
        found = (
            re.match(LAYERS_PATTERN.format(pattern), path) for pattern in config.layers_pattern
        )
        match = next((m for m in found if m), None)
    else:
        match = re.match(r".*?\.[^.]*\.(?P<index>\d+)\.", path)
    return match is not None and int(match["index"]) in config.layers_to_transform
