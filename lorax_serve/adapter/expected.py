"""The tensors that an adapter's config asks for, given a base model: names, places and shapes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lorax_serve.adapter.config import LoRAConfig
from lorax_serve.adapter.modules import ModuleKind, ModuleShape
from lorax_serve.adapter.targets import saved_modules, select_targets
from lorax_serve.adapter.tensors import Role, TensorKey
from lorax_serve.errors import AdapterRejected, RejectReason

__all__ = ["Expected", "expected_tensors", "token_targets"]


@dataclass(frozen=True, slots=True)
class Expected:
    """A tensor's shape, the axis of the rank if it has one, and whether it must be there."""

    shape: tuple[int, ...]
    rank_axis: int | None = None
    required: bool = True


def expected_tensors(
    config: LoRAConfig, modules: Mapping[str, ModuleShape]
) -> dict[TensorKey, Expected]:
    """Every tensor that the config asks for or allows.

    Raises:
        AdapterRejected: it selects no module, or one in a way that is not applied.
    """
    wanted: dict[TensorKey, Expected] = {}
    targets = select_targets(config, modules)
    for path in targets:
        wanted |= _of_target(config, path, modules[path])
    if config.bias != "none":
        for path in modules if config.bias == "all" else targets:
            if modules[path].has_bias:
                role = Role.BASE_BIAS if path in targets else Role.BIAS
                wanted[TensorKey(path, role)] = Expected((modules[path].out_features,))
    saved = saved_modules(config, modules)
    for path in saved:
        shape = modules[path]
        wanted[TensorKey(path, Role.WEIGHT)] = Expected(_weight_shape(shape))
        if shape.has_bias:
            wanted[TensorKey(path, Role.BIAS)] = Expected((shape.out_features,))
    for path, token_ids in token_targets(config, modules).items():
        if path in targets or path in saved:
            raise AdapterRejected(
                RejectReason.UNSUPPORTED,
                f"adapter_config.json: trainable_token_indices of {path}, which the adapter also "
                "changes as a whole, is not applied",
            )
        shape = modules[path]
        rows, hidden = _weight_shape(shape)
        if token_ids and max(token_ids) >= rows:
            raise AdapterRejected(
                RejectReason.SHAPE_MISMATCH,
                f"adapter_config.json: trainable_token_indices names token {max(token_ids)}; the "
                f"base model's {path} has {rows}",
            )
        wanted[TensorKey(path, Role.TOKENS)] = Expected((len(token_ids), hidden))
    return wanted


def _of_target(
    config: LoRAConfig, path: str, shape: ModuleShape
) -> Iterable[tuple[TensorKey, Expected]]:
    rank = config.rank_for(path)
    a, b = Role.A, Role.B
    if shape.kind in (ModuleKind.EMBEDDING, ModuleKind.POSITIONS):
        a, b = Role.EMBEDDING_A, Role.EMBEDDING_B
        if config.lora_bias or config.alora_invocation_tokens:
            key = "lora_bias" if config.lora_bias else "alora_invocation_tokens"
            raise AdapterRejected(
                RejectReason.UNSUPPORTED,
                f"adapter_config.json: {key} on an embedding ({path}), which PEFT refuses too",
            )
    if shape.kind is ModuleKind.POSITIONS:
        raise AdapterRejected(
            RejectReason.UNSUPPORTED, f"LoRA on learned positions ({path}) is not applied"
        )
    yield TensorKey(path, a), Expected((rank, shape.in_features), 0)
    yield TensorKey(path, b), Expected((shape.out_features, rank), 1)
    if config.lora_bias:
        yield TensorKey(path, Role.B_BIAS), Expected((shape.out_features,))
    if config.use_dora:
        yield TensorKey(path, Role.MAGNITUDE), Expected((shape.out_features,))
    if shape.kind is not ModuleKind.LINEAR:
        yield TensorKey(path, Role.BASE_WEIGHT), Expected(_weight_shape(shape), required=False)


def _weight_shape(shape: ModuleShape) -> tuple[int, ...]:
    """Of the base's own tensor."""
    if shape.kind is ModuleKind.NORM:
        return (shape.out_features,)
    if shape.kind is ModuleKind.EMBEDDING:
        return shape.in_features, shape.out_features
    return shape.out_features, shape.in_features


def token_targets(
    config: LoRAConfig, modules: Mapping[str, ModuleShape]
) -> dict[str, tuple[int, ...]]:
    """``trainable_token_indices`` by full path."""
    found: dict[str, tuple[int, ...]] = {}
    for name, token_ids in config.trainable_token_indices.items():
        kinds = (ModuleKind.EMBEDDING, ModuleKind.OUTPUT) if name else (ModuleKind.EMBEDDING,)
        paths = [p for p, shape in modules.items() if p.endswith(name) and shape.kind in kinds]
        if len(paths) != 1:
            raise AdapterRejected(
                RejectReason.NO_MATCH,
                f"trainable_token_indices: {name!r} is no embedding of this base model",
            )
        if modules[paths[0]].tied_to is not None:
            raise AdapterRejected(
                RejectReason.UNSUPPORTED,
                f"trainable_token_indices of {paths[0]}, which is tied to the embedding, is not "
                "applied; name the embedding's",
            )
        found[paths[0]] = token_ids
    return found
