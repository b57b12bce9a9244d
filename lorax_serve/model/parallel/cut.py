"""A rank's part of an adapter, cut as its linears are (``checkpoint.part``)."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate

import torch

from lorax_serve.checkpoint.part import Part, SitePart
from lorax_serve.checkpoint.spec import DecoderSpec, Site
from lorax_serve.model.adapters.folded import FoldedAdapter, SiteLoRA

__all__ = ["cut"]


def cut(folded: FoldedAdapter, part: Part, whole: DecoderSpec) -> FoldedAdapter:
    """A rank's part of an adapter; what it does to norms, embedding and output is all there.

    LoRA is cut as its linear is, so that it adds to the same part of the result: by columns of B,
    with all of A, or by A's columns, with all of B. All ranks' parts have equal shapes.

    Args:
        folded: of the whole model.
        part: the rank.
        whole: of the model.
    """
    sites = whole.sites()
    parts = tuple(
        None if lora is None else _cut(lora, site, part.site(whole, index, site))
        for index, (lora, site) in enumerate(zip(folded.sites[:-1], sites, strict=True))
    )
    return replace(folded, sites=(*parts, folded.sites[-1]))


def _cut(lora: SiteLoRA, site: Site, part: SitePart) -> SiteLoRA:
    widths = part.widths
    starts = list(accumulate(widths[:-1], initial=0))
    which = {each.start: number for number, each in enumerate(site.slices)}
    parts = []
    for rows, columns, b in lora.parts:
        number = which[columns.start]
        own = slice(starts[number], starts[number] + widths[number])
        parts.append((rows, own, part.columns_of(number, b).contiguous()))

    def of_columns(vector: torch.Tensor) -> torch.Tensor:
        return torch.cat(
            [
                part.columns_of(number, vector[each.start : each.start + each.length])
                for number, each in enumerate(site.slices)
            ]
        )

    shift = None if lora.shift is None else of_columns(lora.shift)
    if shift is not None and not part.adds:
        shift = torch.zeros_like(shift)  # not none: the parts must be of one size
    gain = None if lora.gain is None else of_columns(lora.gain)
    return SiteLoRA(lora.a[:, part.inputs].contiguous(), tuple(parts), gain, shift, lora.norm)
