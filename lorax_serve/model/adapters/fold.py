"""From an adapter's tensors to the decoder's form of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import torch

from lorax_serve.adapter import LoRAPair, LoRAWeights, TokenRows
from lorax_serve.adapter.weights import first_not_finite
from lorax_serve.checkpoint.spec import DecoderSpec, Site, Slice
from lorax_serve.checkpoint.weights import Norm
from lorax_serve.errors import AdapterRejected, RejectReason
from lorax_serve.model.adapters.folded import (
    EmbeddingChange,
    FoldedAdapter,
    OutputChange,
    SiteLoRA,
    TokenTable,
)

__all__ = ["BaseWeights", "Linear", "fold", "without_copies"]

_NORM_ROWS = 1024


class Linear(Protocol):
    """``LinearWeights``, or what reads them when they are looked at."""

    @property
    def weight(self) -> torch.Tensor:
        """See there."""

    @property
    def bias(self) -> torch.Tensor | None:
        """See there."""


class BaseWeights(Protocol):
    """The base model's weights, as a decoder keeps them."""

    spec: DecoderSpec
    dtype: torch.dtype

    def site_weights(self, site: int) -> Linear:
        """Of a site; of the output, after the last."""

    def norm_weights(self, site: int) -> Norm | None:
        """Of the norm before a site, if there is one."""

    def embedding_weights(self) -> torch.Tensor:
        """``[vocab, hidden]``."""


def fold(weights: LoRAWeights, base: BaseWeights) -> FoldedAdapter:
    """Bring an adapter into the decoder's form: fused by site, scale in B, in the compute type.

    The scale is folded in float32, before rounding.

    Args:
        weights: the adapter, which fits the base.
        base: for DoRA, which needs the lengths of the changed rows (arXiv:2402.09353, as PEFT's
            ``DoraLinearLayer``), and for trained biases, which take the place of the base's.

    Raises:
        AdapterRejected: it overflows the compute type once B is scaled.
    """
    weights = without_copies(weights, base)
    sites = [*base.spec.sites(), base.spec.output_site()]
    output = _fold_output(weights, base)
    folded = FoldedAdapter(
        tuple(_fold_site(weights, base, index, site, output) for index, site in enumerate(sites)),
        _fold_embedding(weights, base),
        output,
    )
    if first_not_finite(folded.tensors) is not None:
        largest = max(pair.scale for pair in weights.pairs.values())
        scale = "" if largest == 1 else f" by {largest:g} (lora_alpha, r)"
        raise AdapterRejected(
            RejectReason.NOT_FINITE, f"the weights overflow {base.dtype} once B is scaled{scale}"
        )
    return folded


def without_copies(weights: LoRAWeights, base: BaseWeights) -> LoRAWeights:
    """The same without the base's own weights, which PEFT stores beside LoRA on the embedding and
    on the output. What differs from the base's in the compute type stays: it takes its place."""
    own = {k: t for k, t in weights.parameters.items() if not _is_base(k, t, base)}
    return replace(weights, parameters=own)


def _is_base(name: str, tensor: torch.Tensor, base: BaseWeights) -> bool:
    if name == f"{base.spec.embedding_path}.weight":
        theirs = base.embedding_weights()
    elif name == f"{_output_path(base)}.weight":
        theirs = base.site_weights(len(base.spec.sites())).weight
    else:
        return False
    return torch.equal(tensor.to(base.dtype), theirs.cpu())


def _output_path(base: BaseWeights) -> str:
    return base.spec.output_site().slices[0].path


def _fold_site(
    weights: LoRAWeights, base: BaseWeights, index: int, site: Site, output: OutputChange | None
) -> SiteLoRA | None:
    blocks, parts, first = [], [], 0
    gains: list[tuple[Slice, torch.Tensor]] = []
    shifts: list[tuple[Slice, torch.Tensor]] = []
    for part in site.slices:
        bias = weights.parameters.get(f"{part.path}.bias")
        if bias is not None:
            shifts.append((part, bias.float() - _base_bias(base, index, part)))
        pair = weights.pairs.get(part.path)
        if pair is None:
            continue
        blocks.append(pair.a)
        rows = slice(first, first + pair.rank)
        parts.append((rows, slice(part.start, part.start + part.length), _scaled_b(pair, base)))
        first += pair.rank
        if pair.bias is not None:
            shifts.append((part, pair.bias.float() * pair.scale))
        if pair.magnitude is not None:
            own = output.weight if output and index == len(base.spec.sites()) else None
            weight = _base_weight(base, index, part) if own is None else own
            gains.append((part, _gain(pair, weight)))
    norm = _fold_norm(weights, base, index, site)
    if not (parts or shifts or norm):
        return None
    width = site.out_features
    gain = torch.ones(width) if gains else None
    shift = torch.zeros(width) if shifts else None
    for part, values in gains:
        gain[part.start : part.start + part.length] = values  # type: ignore[index]
    for part, values in shifts:
        shift[part.start : part.start + part.length] += values  # type: ignore[index]
    a = torch.cat(blocks) if blocks else torch.empty(0, site.in_features)
    return SiteLoRA(a.to(base.dtype), tuple(parts), gain, shift, norm)


def _base_weight(base: BaseWeights, index: int, part: Slice) -> torch.Tensor:
    return base.site_weights(index).weight[part.start : part.start + part.length]


def _base_bias(base: BaseWeights, index: int, part: Slice) -> torch.Tensor:
    bias = base.site_weights(index).bias
    if bias is None:
        return torch.zeros(part.length)
    return bias[part.start : part.start + part.length].float().cpu()


def _scaled_b(pair: LoRAPair, base: BaseWeights) -> torch.Tensor:
    """``[rank, out]``."""
    return (pair.b.T.float() * pair.scale).to(base.dtype, memory_format=torch.contiguous_format)


def _gain(pair: LoRAPair, weight: torch.Tensor) -> torch.Tensor:
    """``magnitude / ||W + scale * B @ A||``, a row at a time: float32 ``[out]``."""
    assert pair.magnitude is not None
    a, b = pair.a.float().to(weight.device), pair.b.float().to(weight.device) * pair.scale
    lengths = [
        torch.linalg.vector_norm(rows.float() + own @ a, dim=1)
        for rows, own in zip(
            torch.split(weight, _NORM_ROWS), torch.split(b, _NORM_ROWS), strict=True
        )
    ]
    return pair.magnitude.float() / torch.cat(lengths).cpu()


def _fold_norm(weights: LoRAWeights, base: BaseWeights, index: int, site: Site) -> Norm | None:
    own = [weights.parameters.get(f"{site.norm_path}.{part}") for part in ("weight", "bias")]
    if own == [None, None]:
        return None
    norm = base.norm_weights(index)
    assert norm is not None
    weight, bias = (
        theirs if mine is None else mine.to(base.dtype)
        for mine, theirs in zip(own, (norm.weight, norm.bias), strict=True)
    )
    assert weight is not None
    return Norm(weight.cpu(), None if bias is None else bias.cpu())


def _fold_embedding(weights: LoRAWeights, base: BaseWeights) -> EmbeddingChange | None:
    path = base.spec.embedding_path
    table = _replacement(weights, path, base)
    pair, tokens = weights.pairs.get(path), weights.tokens.get(path)
    if pair is None:
        if table is None and tokens is None:
            return None
        return EmbeddingChange(table, _token_table(tokens, base.dtype))
    gain = None
    if pair.magnitude is not None:
        gain = _gain(pair, (base.embedding_weights() if table is None else table).T)
    a = pair.a.T.to(base.dtype, memory_format=torch.contiguous_format)
    return EmbeddingChange(table, None, a, _scaled_b(pair, base), gain)


def _fold_output(weights: LoRAWeights, base: BaseWeights) -> OutputChange | None:
    path = _output_path(base)
    weight = _replacement(weights, path, base)
    tokens = weights.tokens.get(path)
    if weight is None and tokens is None:
        return None
    return OutputChange(weight, _token_table(tokens, base.dtype))


def _replacement(weights: LoRAWeights, path: str, base: BaseWeights) -> torch.Tensor | None:
    own = weights.parameters.get(f"{path}.weight")
    return None if own is None else own.to(base.dtype)


def _token_table(tokens: TokenRows | None, dtype: torch.dtype) -> TokenTable | None:
    if tokens is None:
        return None
    token_ids = torch.tensor(tokens.token_ids, dtype=torch.int64)
    order = torch.argsort(token_ids)
    return TokenTable(token_ids[order], tokens.rows[order].to(dtype))
