"""The tensors of one adapter, matched one to one against its config and a base model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from lorax_serve.adapter.config import LoRAConfig
from lorax_serve.adapter.targets import LinearShape, select_targets
from lorax_serve.errors import AdapterRejected, RejectReason

__all__ = ["LoRAPair", "LoRAWeights", "first_not_finite", "match_weights", "tensor_name"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_KEY = re.compile(r"base_model\.model\.(?P<path>.+)\.lora_(?P<side>[AB])\.weight")


@dataclass(frozen=True, slots=True)
class LoRAPair:
    """LoRA on one linear module: ``y += scale * (x @ a.T) @ b.T`` (arXiv:2106.09685).

    Attributes:
        a: ``[rank, in_features]``, as stored in the file.
        b: ``[out_features, rank]``, as stored in the file, not scaled.
        scale: ``alpha / rank`` or ``alpha / sqrt(rank)``, with this module's own alpha and rank.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float

    @property
    def rank(self) -> int:
        """The true rank of this module, which may differ from the config's ``r``."""
        return self.a.shape[0]


@dataclass(frozen=True, slots=True)
class LoRAWeights:
    """All pairs of an adapter by module path, each known to fit the base model."""

    pairs: Mapping[str, LoRAPair]

    @property
    def max_rank(self) -> int:
        """The largest rank of any module."""
        return max(pair.rank for pair in self.pairs.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all A and B tensors as stored."""
        return sum(pair.a.nbytes + pair.b.nbytes for pair in self.pairs.values())


def tensor_name(path: str, side: str) -> str:
    """PEFT's name of the A or B tensor of the module at ``path``."""
    return f"base_model.model.{path}.lora_{side}.weight"


def match_weights(
    config: LoRAConfig,
    tensors: Mapping[str, torch.Tensor],
    modules: Mapping[str, LinearShape],
) -> LoRAWeights:
    """Match a file's tensors with the modules that ``config`` selects in the base model.

    PEFT warns about tensors that are missing or left over, and goes on; both mean that something
    else than the trained adapter would answer, so both are refused here.

    Args:
        config: the adapter's config.
        tensors: the file's tensors by name.
        modules: every linear module of the base model by full path.

    Raises:
        AdapterRejected: naming the first tensor that does not fit, and all of them by count.
    """
    if not tensors:
        raise AdapterRejected(RejectReason.MISSING_TENSOR, "the weights file holds no tensors")
    targets = select_targets(config, modules)
    expected = [tensor_name(path, side) for path in targets for side in "AB"]
    _refuse_unexpected(config, sorted(tensors.keys() - set(expected)), modules)
    missing = [name for name in expected if name not in tensors]
    if missing:
        raise AdapterRejected(
            RejectReason.MISSING_TENSOR,
            f"{missing[0]} is missing, but target_modules selects its module "
            f"({len(missing)} of {len(expected)} tensors are missing)",
        )
    pairs = {path: _pair(config, path, modules[path], tensors) for path in targets}
    bad = first_not_finite([tensors[name] for name in expected])
    if bad is not None:
        name = next(name for name in expected if tensors[name] is bad)
        raise AdapterRejected(RejectReason.NOT_FINITE, f"{name} holds NaN or infinity")
    return LoRAWeights(pairs)


def first_not_finite(tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """The first of the tensors that holds NaN or infinity, if one does.

    All are looked at in three calls: a call a tensor, on a thread beside a busy one, waits for the
    interpreter's lock hundreds of times. The maximum hands NaN on, and is seven times as fast as
    ``torch._foreach_norm`` in bfloat16.
    """
    largest = torch.stack(torch._foreach_max(torch._foreach_abs(list(tensors))))
    if bool(torch.isfinite(largest).all()):
        return None
    return next(t for t in tensors if not bool(torch.isfinite(t).all()))


def _refuse_unexpected(
    config: LoRAConfig, names: list[str], modules: Mapping[str, LinearShape]
) -> None:
    if not names:
        return
    name = names[0]
    match = _KEY.fullmatch(name)
    if match is None:
        reason, why = RejectReason.UNSUPPORTED, _explain_foreign(name)
    elif match["path"] not in modules:
        reason = RejectReason.NO_MATCH
        why = f"the base model has no linear module {match['path']!r}: is it for another model?"
    else:
        reason = RejectReason.UNEXPECTED_TENSOR
        why = "adapter_config.json's target_modules does not select its module, so PEFT ignores it"
    raise AdapterRejected(reason, f"{name}: {why} ({len(names)} such tensors)")


def _explain_foreign(name: str) -> str:
    for part, what in {
        "lora_embedding_": "LoRA on an embedding",
        "lora_magnitude_vector": "DoRA",
        "lora_B.bias": "a bias on lora_B",
        "modules_to_save": "a full copy of a module",
        "token_adapter": "trainable tokens",
    }.items():
        if part in name:
            return f"{what} is not applied yet"
    return "not a LoRA tensor in PEFT's naming (base_model.model.<path>.lora_A.weight)"


def _pair(
    config: LoRAConfig, path: str, shape: LinearShape, tensors: Mapping[str, torch.Tensor]
) -> LoRAPair:
    a, b = (tensors[tensor_name(path, side)] for side in "AB")
    rank = config.rank_for(path)
    for side, tensor in (("A", a), ("B", b)):
        name = tensor_name(path, side)
        if tensor.dtype not in _DTYPES:
            raise AdapterRejected(
                RejectReason.UNSUPPORTED,
                f"{name} is {tensor.dtype}; float32, float16 and bfloat16 are read",
            )
        rank_axis, features = (0, shape.in_features) if side == "A" else (1, shape.out_features)
        if tensor.ndim != 2 or tensor.shape[1 - rank_axis] != features:
            want = [rank, features] if side == "A" else [features, rank]
            raise AdapterRejected(
                RejectReason.SHAPE_MISMATCH,
                f"{name} has shape {list(tensor.shape)}; the base model's {path} needs {want}",
            )
        if tensor.shape[rank_axis] != rank:
            raise AdapterRejected(
                RejectReason.RANK_MISMATCH,
                f"{name} has rank {tensor.shape[rank_axis]}, but adapter_config.json gives "
                f"r={rank} for {path}: its scale would be wrong",
            )
    return LoRAPair(a, b, config.scale_for(path))
