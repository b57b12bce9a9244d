"""Which modules of a base model a LoRA config selects, by PEFT's rules.

Source: PEFT ``tuners_utils.check_target_module_exists`` and ``_maybe_include_all_linear_layers``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from lorax_serve.adapter.config import ALL_LINEAR, LAYERS_PATTERN, LoRAConfig
from lorax_serve.adapter.modules import ModuleKind, ModuleShape
from lorax_serve.errors import AdapterRejected, RejectReason

__all__ = ["saved_modules", "select_targets"]

# PEFT's EMBEDDING_LAYER_NAMES.
_TIED_NAMES = ("embed_tokens", "lm_head")
_SAVED = (ModuleKind.EMBEDDING, ModuleKind.OUTPUT, ModuleKind.NORM)


def select_targets(config: LoRAConfig, modules: Mapping[str, ModuleShape]) -> list[str]:
    """The paths of ``modules`` that ``config`` targets, in the order of ``modules``.

    Raises:
        AdapterRejected: ``no_match`` when not one module is selected. PEFT raises here too; peers
            that go on serve the base model under the adapter's name.
    """
    paths = [path for path, shape in modules.items() if _is_target(config, path, shape)]
    if _ties(config, config.target_modules) and not _ties(config, config.modules_to_save):
        tied = _tied_pair(modules)
        paths = [path for path in modules if path in paths or path in tied]
    if not paths:
        wanted = config.target_modules
        shown = repr(wanted) if isinstance(wanted, str) else ", ".join(map(repr, wanted))
        linears = (ModuleKind.LINEAR, ModuleKind.OUTPUT)
        known = sorted(
            {path.rsplit(".", 1)[-1] for path, shape in modules.items() if shape.kind in linears}
        )
        raise AdapterRejected(
            RejectReason.NO_MATCH,
            f"target_modules ({shown}) matches no linear module of this base model; "
            f"its linear modules are named {', '.join(known)}",
        )
    return paths


def saved_modules(config: LoRAConfig, modules: Mapping[str, ModuleShape]) -> list[str]:
    """The paths of ``modules`` that ``modules_to_save`` replaces as a whole.

    Raises:
        AdapterRejected: ``no_match`` for a name that is the end of no path, ``unsupported`` for
            modules that cannot be replaced.
    """
    found = []
    for name in config.modules_to_save:
        paths = [path for path in modules if path.endswith(name)]
        if not paths:
            raise AdapterRejected(
                RejectReason.NO_MATCH,
                f"modules_to_save: {name!r} is none of the modules of this base model that an "
                "adapter can replace (embeddings, lm_head, norms)",
            )
        for path in paths:
            if modules[path].kind not in _SAVED:
                raise AdapterRejected(
                    RejectReason.UNSUPPORTED,
                    f"modules_to_save: a full copy of {path} is not applied; embeddings, lm_head "
                    "and norms are",
                )
        found += paths
    if _ties(config, config.modules_to_save):
        found += _tied_pair(modules)
    return list(dict.fromkeys(found))


def _ties(config: LoRAConfig, names: tuple[str, ...] | str) -> bool:
    """Whether PEFT's ``ensure_weight_tying`` acts on these names: it goes by the last parts of
    names, so the embeddings of models that call them otherwise (GPT-2's wte) stay untied."""
    if not config.ensure_weight_tying:
        return False
    if isinstance(names, str):
        return any(re.fullmatch(names, name) for name in _TIED_NAMES)
    return any(name.rsplit(".", 1)[-1] in _TIED_NAMES for name in names)


def _tied_pair(modules: Mapping[str, ModuleShape]) -> list[str]:
    """The output and the embedding that it is tied to; empty if it is not."""
    pairs = ((path, shape.tied_to) for path, shape in modules.items())
    return next(([own, other] for own, other in pairs if other is not None), [])


def _is_target(config: LoRAConfig, path: str, shape: ModuleShape) -> bool:
    if shape.kind is ModuleKind.NORM:
        return False
    if any(re.match(rf"(^|.*\.){name}($|\..*)", path) for name in config.modules_to_save):
        return False
    if config.exclude_modules and _names_match(config.exclude_modules, path):
        return False
    if config.target_modules == ALL_LINEAR:
        return shape.kind is ModuleKind.LINEAR
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
