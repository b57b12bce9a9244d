"""Which module of the base each of a file's LoRA layers belongs to.

The Elixir lorax put LoRA on the query, key and value of each block. Its later versions name a layer
by its target (``lora_decoder.blocks.3.self_attention.key``). Earlier ones number the layers as Axon
meets them, from the model's outputs up: of GPT-2 in Bumblebee the cache is the first output, and
so a block's key comes first, then its value, and its query with the next block.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from lorax_serve.adapter import LoRAConfig, ModuleShape, Role, tensor_name
from lorax_serve.errors import TrainingError
from lorax_train.elixir.nx import Layers

__all__ = ["GPT2_ORDER", "PROJECTIONS", "Imported", "import_layers"]

PROJECTIONS = ("query", "key", "value")
GPT2_ORDER = ("key", "value", "query")

_NUMBERED = re.compile(r"lora_(\d{1,6})")
_NAMED = re.compile(r"lora_(?:.*\.)?blocks\.(\d{1,6})\.self_attention\.(query|key|value)")
_NAMES = (("lora_a", "lora_b"), ("lora_down", "lora_up"))
_FUSED = re.compile(r".*\.(\d+)\.attn\.c_attn")
_SEPARATE = re.compile(r".*\.(\d+)\.self_attn\.([qkv])_proj")

Place = tuple[int, str]
"""A block's number, and one of ``PROJECTIONS``."""
Pair = tuple[torch.Tensor, torch.Tensor]
"""A ``[r, in]`` and B ``[out, r]``, in float32."""


@dataclass(frozen=True)
class Imported:
    """An adapter in PEFT's format, and what became of the file's layers.

    Attributes:
        config: of the adapter.
        tensors: by PEFT's names, float32.
        rank: of the file's own pairs.
        blocks: how many blocks of the base have LoRA.
        projections: which of ``PROJECTIONS`` do.
        modules: the base's modules, in its order.
        guessed: the order in which numbered layers were taken; empty if the file names them.
    """

    config: LoRAConfig
    tensors: dict[str, torch.Tensor]
    rank: int
    blocks: int
    projections: tuple[str, ...]
    modules: tuple[str, ...]
    guessed: tuple[str, ...]


def import_layers(
    layers: Layers,
    modules: Mapping[str, ModuleShape],
    model: str,
    alpha: float,
    rank: int | None = None,
    order: Sequence[str] | None = None,
) -> Imported:
    """Put a file's LoRA layers on the base's modules.

    GPT-2's query, key and value are one module (``c_attn``): their A are laid below each other, and
    their B go into the rows of their own outputs, so that the product is exactly theirs.

    Args:
        layers: of the file.
        modules: of the base.
        model: the base's name, for the config and for errors.
        alpha: as in training; the file does not say it.
        rank: as in training, to be checked; None: the file's.
        order: of a block's projections among numbered layers; None: GPT-2's.

    Raises:
        TrainingError: naming the layer or the flag.
    """
    pairs = {name: pair for name, each in layers.items() if (pair := _pair(name, each)) is not None}
    if not pairs:
        shown = ", ".join(sorted(layers)[:4]) or "none"
        raise TrainingError(f"the file has no LoRA layers (its layers: {shown})")
    ranks = sorted({len(a) for a, _ in pairs.values()})
    if len(ranks) > 1:
        raise TrainingError(f"the file's LoRA layers have different ranks: {ranks}")
    if rank is not None and rank != ranks[0]:
        raise TrainingError(f"--r {rank}: the file's LoRA layers have rank {ranks[0]}")
    fused = {int(m[1]): path for path in modules if (m := _FUSED.fullmatch(path))}
    apart = {
        (int(m[1]), next(p for p in PROJECTIONS if p.startswith(m[2]))): path
        for path in modules
        if (m := _SEPARATE.fullmatch(path))
    }
    blocks = len(fused) or len({block for block, _ in apart})
    if not blocks:
        raise TrainingError(
            f"model {model} has neither attn.c_attn nor self_attn.q_proj, k_proj and v_proj, which "
            "the file's layers belong to; name the model that it was trained on with --model"
        )
    placed, guessed = _placed(pairs, blocks, order, fused=bool(fused))
    if fused:
        joined = _fuse(placed, fused, modules)
    else:
        joined = {apart[place]: pair for place, pair in placed.items() if place in apart}
    if not fused and len(joined) != len(placed):
        place = next(place for place in placed if place not in apart)
        raise TrainingError(f"model {model} has no block {place[0]} with a {place[1]}: {blocks}")
    for path, (a, b) in joined.items():
        shape = modules[path]
        if (b.shape[0], a.shape[1]) != (shape.out_features, shape.in_features):
            raise TrainingError(
                f"the file's LoRA is for a module of {a.shape[1]} inputs and {b.shape[0]} outputs; "
                f"{path} of {model} has {shape.in_features} and {shape.out_features}: name the "
                "model that it was trained on with --model"
            )
    times = next(len(a) for a, _ in joined.values()) // ranks[0]
    config = LoRAConfig(
        r=ranks[0] * times,
        lora_alpha=_whole(alpha * times),
        target_modules=tuple(sorted({path.rpartition(".")[2] for path in joined})),
        fan_in_fan_out=bool(fused),
        base_model_name_or_path=model,
    )
    tensors = {}
    for path, (a, b) in joined.items():
        tensors[tensor_name(path, Role.A)] = a
        tensors[tensor_name(path, Role.B)] = b
    used = tuple(p for p in PROJECTIONS if any(name == p for _, name in placed))
    in_order = tuple(path for path in modules if path in joined)
    return Imported(config, tensors, ranks[0], blocks, used, in_order, guessed)


def _pair(layer: str, tensors: Mapping[str, torch.Tensor]) -> Pair | None:
    for names in _NAMES:
        if not any(name in tensors for name in names):
            continue
        a, b = (tensors.get(name) for name in names)
        if a is None or b is None or a.ndim != 2 or b.ndim != 2 or len(a) != b.shape[1]:
            raise TrainingError(
                f"layer {layer!r} is not LoRA on a linear layer: {names[0]} must be [r, in] and "
                f"{names[1]} [out, r] (convolutions are not for text models)"
            )
        a, b = a.float(), b.float()
        if not bool(a.isfinite().all() and b.isfinite().all()):
            raise TrainingError(f"layer {layer!r} overflows float32")
        return a, b
    return None


def _placed(
    pairs: Mapping[str, Pair], blocks: int, order: Sequence[str] | None, *, fused: bool
) -> tuple[dict[Place, Pair], tuple[str, ...]]:
    """The pairs by place, and the order that was taken for granted, if one was."""
    named = {name: m for name in pairs if (m := _NAMED.fullmatch(name))}
    if len(named) == len(pairs):
        placed = {(int(m[1]), m[2]): pairs[name] for name, m in named.items()}
        if len(placed) != len(pairs):
            raise TrainingError("the file has two LoRA layers on one projection")
        each = {name for _, name in placed}
        missing = [(b, p) for b in range(blocks) for p in sorted(each) if (b, p) not in placed]
        if missing or len(placed) != blocks * len(each):
            raise TrainingError(
                f"the file's LoRA layers are not on all of the base's {blocks} blocks alone: name "
                "the model that it was trained on with --model"
            )
        return placed, ()
    numbered = {int(m[1]): name for name in pairs if (m := _NUMBERED.fullmatch(name))}
    if sorted(numbered) != list(range(len(pairs))):
        strange = next((n for n in sorted(pairs) if not _NUMBERED.fullmatch(n)), None)
        raise TrainingError(
            f"layer {strange!r} is on no block's query, key or value"
            if strange
            else f"the file's LoRA layers are not numbered from 0 to {len(pairs) - 1}"
        )
    if order is None:
        if not fused:
            raise TrainingError(
                "the file numbers its LoRA layers, and of this model their order is not known; "
                "give it with --order (query,key,value with rotary embeddings in Bumblebee)"
            )
        order = GPT2_ORDER
    if len(pairs) != blocks * len(order):
        raise TrainingError(
            f"the file has {len(pairs)} LoRA layers; {blocks} blocks with {', '.join(order)} make "
            f"{blocks * len(order)}: give the targets that it was trained with as --order, in "
            f"their order ({','.join(GPT2_ORDER)} for all of GPT-2's)"
        )
    places = [(block, name) for block in range(blocks) for name in order]
    return {place: pairs[numbered[i]] for i, place in enumerate(places)}, tuple(order)


def _fuse(
    placed: Mapping[Place, Pair], fused: Mapping[int, str], modules: Mapping[str, ModuleShape]
) -> dict[str, Pair]:
    joined = {}
    for block, path in fused.items():
        width = modules[path].out_features // 3
        a, b, first = [], [], 0
        for row, name in enumerate(PROJECTIONS):
            pair = placed.get((block, name))
            if pair is None:
                continue
            if pair[1].shape[0] != width or pair[0].shape[1] != modules[path].in_features:
                raise TrainingError(
                    f"the file's LoRA is for a {name} of {pair[0].shape[1]} inputs and "
                    f"{pair[1].shape[0]} outputs; {path} has {modules[path].in_features} and "
                    f"{width}: name the model that it was trained on with --model"
                )
            a.append(pair[0])
            part = torch.zeros(3 * width, len(pair[0]))
            part[row * width : (row + 1) * width] = pair[1]
            b.append(part)
            first += len(pair[0])
        joined[path] = torch.cat(a), torch.cat(b, dim=1)
    return joined


def _whole(number: float) -> float:
    return int(number) if float(number).is_integer() else number
