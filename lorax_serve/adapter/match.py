"""An adapter's tensors matched one to one against its config and a base model.

PEFT warns about tensors that are missing or left over, and goes on; both mean that something else
than the trained adapter would answer, so both are refused here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from lorax_serve.adapter.config import LoRAConfig
from lorax_serve.adapter.expected import Expected, expected_tensors, token_targets
from lorax_serve.adapter.modules import ModuleShape
from lorax_serve.adapter.tensors import (
    PREFIX,
    Role,
    TensorKey,
    explain_foreign,
    parse_key,
    tensor_name,
)
from lorax_serve.adapter.weights import LoRAPair, LoRAWeights, TokenRows, first_not_finite
from lorax_serve.errors import AdapterRejected, RejectReason

__all__ = ["Match", "match_tensors", "match_weights"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# What a tensor may be called as well, where versions of PEFT differ or the module is wrapped.
_ALIASES = {Role.BIAS: Role.BASE_BIAS, Role.BASE_BIAS: Role.BIAS}


@dataclass(slots=True)
class Match:
    """What fits and what does not.

    Attributes:
        weights: the adapter, if there are no problems.
        matched: names of the tensors that have a place.
        unmatched: names of those that have none.
        missing: names of those that the config asks for and the file does not have.
        problems: every reason to refuse the adapter, the first to be told first.
        warnings: what is applied, but should be known.
    """

    weights: LoRAWeights | None = None
    matched: list[str] = field(default_factory=list)
    unmatched: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    problems: list[AdapterRejected] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def match_weights(
    config: LoRAConfig,
    tensors: Mapping[str, torch.Tensor],
    modules: Mapping[str, ModuleShape],
    *,
    probed: bool = False,
) -> LoRAWeights:
    """``match_tensors``, or its first problem.

    Raises:
        AdapterRejected: naming the first tensor that does not fit, and all of them by count.
    """
    match = match_tensors(config, tensors, modules, probed=probed)
    if match.weights is None:
        raise match.problems[0]
    return match.weights


def match_tensors(
    config: LoRAConfig,
    tensors: Mapping[str, torch.Tensor],
    modules: Mapping[str, ModuleShape],
    *,
    probed: bool = False,
) -> Match:
    """Match a file's tensors with what ``config`` changes in the base model.

    Args:
        config: the adapter's config.
        tensors: the file's tensors by name.
        modules: every module of the base model that adapters can change, by full path.
        probed: whether a golden probe will show that the adapter fits the base. Without one, an
            initialisation that changes the base is a problem.
    """
    found = Match()
    if config.changes_base and not probed:
        found.problems.append(
            AdapterRejected(
                RejectReason.UNSUPPORTED,
                f"adapter_config.json: init_lora_weights={config.init_lora_weights!r} changes the "
                "base weights, so the adapter is wrong on the original base; convert it to a plain "
                "LoRA first (PEFT: save_pretrained(..., "
                "path_initial_model_for_weight_conversion=...))",
            )
        )
    if not tensors:
        found.problems.append(
            AdapterRejected(RejectReason.MISSING_TENSOR, "the weights file holds no tensors")
        )
        return found
    try:
        wanted = expected_tensors(config, modules)
    except AdapterRejected as error:
        found.problems.append(error)
        return found
    placed = _place(config, tensors, modules, wanted, found)
    for key, name in placed.items():
        problem = _misfit(config, key, name, tensors[name], wanted[key])
        if problem is not None:
            found.problems.append(problem)
    if found.problems:
        return found
    bad = first_not_finite([tensors[name] for name in found.matched])
    if bad is not None:
        name = next(name for name in found.matched if tensors[name] is bad)
        problem = AdapterRejected(RejectReason.NOT_FINITE, f"{name} holds NaN or infinity")
        found.problems.append(problem)
        return found
    by_key = {key: tensors[name] for key, name in placed.items()}
    problem = _untied(config, modules, by_key)
    if problem is not None:
        found.problems.append(problem)
        return found
    found.weights = _collect(config, by_key, modules)
    return found


def _place(
    config: LoRAConfig,
    tensors: Mapping[str, torch.Tensor],
    modules: Mapping[str, ModuleShape],
    wanted: Mapping[TensorKey, Expected],
    found: Match,
) -> dict[TensorKey, str]:
    """The names of the tensors that have a place; what is left over or missing is a problem."""
    placed: dict[TensorKey, str] = {}
    prefixed = any(name.startswith(PREFIX) for name in tensors)
    for name in sorted(tensors):
        key = parse_key(name) if name.startswith(PREFIX) or not prefixed else None
        if key is not None and key not in wanted and key.role in _ALIASES:
            key = TensorKey(key.path, _ALIASES[key.role])
        if key is None or key not in wanted or key in placed:
            found.unmatched.append(name)
        else:
            placed[key] = name
            found.matched.append(name)
    if not prefixed and placed:
        found.warnings.append(
            f"the tensors' names lack PEFT's prefix {PREFIX!r}; PEFT would ignore them, here they "
            "are applied to the modules that they name"
        )
    if found.unmatched:
        name = found.unmatched[0]
        reason, why = _explain_unmatched(config, name, modules)
        message = f"{name}: {why} ({len(found.unmatched)} such tensors)"
        found.problems.append(AdapterRejected(reason, message))
    required = [key for key, place in wanted.items() if place.required]
    found.missing += [tensor_name(*key) for key in required if key not in placed]
    if found.missing:
        found.problems.append(
            AdapterRejected(
                RejectReason.MISSING_TENSOR,
                f"{found.missing[0]} is missing, but adapter_config.json asks for it "
                f"({len(found.missing)} of {len(required)} tensors are missing)",
            )
        )
    return placed


def _explain_unmatched(
    config: LoRAConfig, name: str, modules: Mapping[str, ModuleShape]
) -> tuple[RejectReason, str]:
    key = parse_key(name)
    if key is None:
        return RejectReason.UNSUPPORTED, explain_foreign(name)
    if key.path not in modules:
        why = f"the base model has no module {key.path!r}: is it for another model?"
        return RejectReason.NO_MATCH, why
    asks = {
        Role.B_BIAS: "lora_bias is off",
        Role.MAGNITUDE: "use_dora is off",
        Role.TOKENS: "trainable_token_indices does not name it",
        Role.WEIGHT: "modules_to_save does not name it",
        Role.BIAS: f"bias is {config.bias!r}",
        Role.BASE_BIAS: f"bias is {config.bias!r}",
    }
    why = asks.get(key.role, "target_modules does not select its module")
    return RejectReason.UNEXPECTED_TENSOR, f"adapter_config.json's {why}, so PEFT ignores it"


def _misfit(
    config: LoRAConfig, key: TensorKey, name: str, tensor: torch.Tensor, wanted: Expected
) -> AdapterRejected | None:
    if tensor.dtype not in _DTYPES:
        return AdapterRejected(
            RejectReason.UNSUPPORTED,
            f"{name} is {tensor.dtype}; float32, float16 and bfloat16 are read",
        )
    shape, want, axis = tuple(tensor.shape), wanted.shape, wanted.rank_axis
    if shape == want:
        return None
    if axis is None or len(shape) != 2 or shape[1 - axis] != want[1 - axis]:
        return AdapterRejected(
            RejectReason.SHAPE_MISMATCH,
            f"{name} has shape {list(shape)}; the base model's {key.path} needs {list(want)}",
        )
    return AdapterRejected(
        RejectReason.RANK_MISMATCH,
        f"{name} has rank {shape[axis]}, but adapter_config.json gives r={want[axis]} for "
        f"{key.path}: its scale would be wrong",
    )


def _untied(
    config: LoRAConfig,
    modules: Mapping[str, ModuleShape],
    tensors: Mapping[TensorKey, torch.Tensor],
) -> AdapterRejected | None:
    """With ``ensure_weight_tying``, the output's tensors are the embedding's, transposed for LoRA:
    PEFT loads both into the same memory."""
    if not config.ensure_weight_tying:
        return None
    for path, shape in modules.items():
        if shape.tied_to is None:
            continue
        for own, other in ((Role.A, Role.EMBEDDING_B), (Role.B, Role.EMBEDDING_A)):
            mine = tensors.get(TensorKey(path, own))
            theirs = tensors.get(TensorKey(shape.tied_to, other))
            if mine is not None and theirs is not None and not torch.equal(mine, theirs.T):
                return _differs(path, own, shape.tied_to, other)
        mine = tensors.get(TensorKey(path, Role.WEIGHT))
        theirs = tensors.get(TensorKey(shape.tied_to, Role.WEIGHT))
        if mine is not None and theirs is not None and not torch.equal(mine, theirs):
            return _differs(path, Role.WEIGHT, shape.tied_to, Role.WEIGHT)
    return None


def _differs(path: str, role: Role, other: str, other_role: Role) -> AdapterRejected:
    return AdapterRejected(
        RejectReason.UNEXPECTED_TENSOR,
        f"{tensor_name(path, role)} differs from {tensor_name(other, other_role)}, to which "
        "ensure_weight_tying ties it",
    )


def _collect(
    config: LoRAConfig,
    tensors: Mapping[TensorKey, torch.Tensor],
    modules: Mapping[str, ModuleShape],
) -> LoRAWeights:
    pairs, parameters, tokens = {}, {}, {}
    token_ids = token_targets(config, modules)
    for (path, role), tensor in tensors.items():
        if role in (Role.A, Role.EMBEDDING_A):
            b = Role.B if role is Role.A else Role.EMBEDDING_B
            pairs[path] = LoRAPair(
                a=tensor,
                b=tensors[TensorKey(path, b)],
                scale=config.scale_for(path),
                bias=tensors.get(TensorKey(path, Role.B_BIAS)),
                magnitude=tensors.get(TensorKey(path, Role.MAGNITUDE)),
            )
        elif role in (Role.WEIGHT, Role.BASE_WEIGHT):
            parameters[f"{path}.weight"] = tensor
        elif role in (Role.BIAS, Role.BASE_BIAS):
            parameters[f"{path}.bias"] = tensor
        elif role is Role.TOKENS:
            tokens[path] = TokenRows(token_ids[path], tensor)
            tied = (other for other, shape in modules.items() if shape.tied_to == path)
            tokens.update((other, tokens[path]) for other in tied)
    ordered = {path: pairs[path] for path in modules if path in pairs}
    return LoRAWeights(ordered, parameters, tokens, config.alora_invocation_tokens)
