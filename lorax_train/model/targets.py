"""``--targets`` and ``--layers``: which modules get LoRA, and what the adapter's config says."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lorax_serve.adapter import LoRAConfig, ModuleShape, select_targets
from lorax_serve.errors import AdapterRejected, TrainingError

__all__ = ["Targets", "resolve_targets"]

# What the projections are called: by Llama and most others, the BERT family, DistilBERT.
_PROJECTIONS = {
    "query": frozenset({"q_proj", "query", "q_lin"}),
    "key": frozenset({"k_proj", "key", "k_lin"}),
    "value": frozenset({"v_proj", "value", "v_lin"}),
}
# All three in one: GPT-2 and GPT-BigCode; GPT-NeoX, Bloom and Falcon; Phi-3 and CodeGen; MPT.
_FUSED = frozenset({"c_attn", "query_key_value", "qkv_proj", "Wqkv"})
# PEFT's way to find a module's layer, for layers_to_transform.
_LAYER = re.compile(r".*?\.[^.]*\.(?P<index>\d+)\.")


@dataclass(frozen=True, slots=True)
class Targets:
    """The modules of one adapter.

    Attributes:
        paths: in the model's order.
        names: for ``target_modules``: last name segments where PEFT and the server resolve them to
            exactly these modules, else the full paths.
        layers: for ``layers_to_transform``; empty if the names alone say which.
    """

    paths: list[str]
    names: tuple[str, ...]
    layers: tuple[int, ...] = ()


def resolve_targets(
    spec: str, shapes: Mapping[str, ModuleShape], layers: Sequence[int] = ()
) -> Targets:
    """Find the modules that ``--targets`` and ``--layers`` mean.

    Args:
        spec: ``all-linear``; ``qkv``; ``regex:`` and an expression for the whole path; or names
            with commas between them, where ``query``, ``key`` and ``value`` are the projections of
            that role, whatever this model calls them.
        shapes: every module of the base that can have LoRA, by path.
        layers: only in these; empty: in all.

    Raises:
        TrainingError: when the whole, or one name of a list, matches no module, or a layer is not
            there.
    """
    if spec.startswith("regex:"):
        paths = _select(spec.removeprefix("regex:"), shapes)
    elif spec == "all-linear":
        paths = _select(spec, shapes)
    else:
        paths = _select(_names(spec, shapes), shapes)
    if layers:
        paths = _in_layers(paths, shapes, layers)
    last = tuple(sorted({path.rsplit(".", 1)[-1] for path in paths}))
    for only in ((), tuple(layers)) if layers else ((),):
        if _select(last, shapes, only) == paths:
            return Targets(paths, last, only)
    return Targets(paths, tuple(sorted(paths)))


def _names(spec: str, shapes: Mapping[str, ModuleShape]) -> tuple[str, ...]:
    """A comma list, its roles replaced by what this model calls them, each name checked."""
    segments = {path.rsplit(".", 1)[-1] for path in shapes}
    found: list[str] = []
    for name in (part.strip() for part in spec.split(",")):
        if not name:
            raise TrainingError(f"--targets {spec!r}: there is an empty name in the list")
        if name == "qkv":
            found += _of_roles(name, _FUSED.union(*_PROJECTIONS.values()), segments)
        elif name in _PROJECTIONS:
            found += _of_roles(name, _PROJECTIONS[name], segments)
        else:
            _check_name(name, shapes, segments)
            found.append(name)
    return tuple(dict.fromkeys(found))


def _of_roles(role: str, known: frozenset[str], segments: set[str]) -> list[str]:
    found = sorted(known & segments)
    if found:
        return found
    if fused := sorted(_FUSED & segments):
        raise TrainingError(
            f"--targets {role}: this model computes query, key and value together, in {fused[0]}; "
            "use --targets qkv"
        )
    raise TrainingError(
        f"--targets {role}: this model's linear modules are named {', '.join(sorted(segments))}, "
        "none of which is known to be the query, key or value; name them with --targets"
    )


def _check_name(name: str, shapes: Mapping[str, ModuleShape], segments: set[str]) -> None:
    """PEFT is content when any name of a list matches; here, each one must."""
    try:
        _select((name,), shapes)
    except TrainingError as error:
        near = difflib.get_close_matches(name, [*segments, *shapes], n=3)
        if not near:
            raise
        raise TrainingError(f"{error}; did you mean {' or '.join(near)}?") from error


def _in_layers(
    paths: list[str], shapes: Mapping[str, ModuleShape], layers: Sequence[int]
) -> list[str]:
    of = {path: _layer(path) for path in shapes}
    known = sorted({layer for layer in of.values() if layer is not None})
    for layer in layers:
        if layer not in known:
            there = f"has layers {known[0]} to {known[-1]}" if known else "has no numbered layers"
            raise TrainingError(f"--layers: there is no layer {layer}; this model {there}")
    for path in paths:
        if of[path] is None:
            raise TrainingError(
                f"--layers: {path} is in none of the layers; leave it out of --targets, or "
                "leave --layers out"
            )
    found = [path for path in paths if of[path] in layers]
    if not found:
        raise TrainingError("--layers: none of --targets is in these layers")
    return found


def _layer(path: str) -> int | None:
    match = _LAYER.match(path)
    return int(match["index"]) if match else None


def _select(
    wanted: str | Sequence[str], shapes: Mapping[str, ModuleShape], layers: Sequence[int] = ()
) -> list[str]:
    try:
        # from_dict is where the leaf checks a regular expression.
        raw = {"target_modules": wanted if isinstance(wanted, str) else list(wanted)}
        config = LoRAConfig.from_dict(
            {"peft_type": "LORA", "layers_to_transform": list(layers) or None, **raw}
        )
        return select_targets(config, shapes)
    except AdapterRejected as error:
        raise TrainingError(f"--targets: {error}") from error
