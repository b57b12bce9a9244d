"""The base model's weights that adapters are folded with, read from its files when needed."""

from __future__ import annotations

from contextlib import ExitStack
from functools import cached_property
from pathlib import Path

import torch

from lorax_serve.checkpoint.loader import Checkpoint, read_bias, read_head, read_norm, read_weight
from lorax_serve.checkpoint.part import WHOLE
from lorax_serve.checkpoint.spec_cache import load_spec
from lorax_serve.checkpoint.weights import Norm

__all__ = ["StoredBase"]


class StoredBase:
    """``fold.BaseWeights`` of a model that no rank has all of, on the CPU. For one thread.

    The files stay open: those that replace them later are not this model's.

    Args:
        directory: of the model.
        dtype: of the weights in the decoder.

    Raises:
        ModelUnsupported: see ``open_shards``.
    """

    def __init__(self, directory: Path, dtype: torch.dtype) -> None:
        self.spec = load_spec(directory)
        self.dtype = dtype
        stack = ExitStack()  # closed with the process
        device = torch.device("cpu")
        self._checkpoint = Checkpoint(directory, self.spec.layout, stack, dtype, device)
        self._sites = self.spec.sites()
        self._last = _StoredLinear(self, 0)

    def site_weights(self, site: int) -> _StoredLinear:
        """See ``fold.BaseWeights``; nothing is read before it is looked at."""
        if self._last.index != site:  # a site is asked for once for each of its slices
            self._last = _StoredLinear(self, site)
        return self._last

    def norm_weights(self, site: int) -> Norm | None:
        """See ``fold.BaseWeights``."""
        every = [*self._sites, self.spec.output_site()]
        path = every[site].norm_path
        if path is None:
            return None
        return read_norm(self.spec, self._checkpoint, path, self.spec.hidden_size)

    def embedding_weights(self) -> torch.Tensor:
        """See ``fold.BaseWeights``."""
        spec = self.spec
        name = f"{spec.embedding_path}.weight"
        return self._checkpoint.get(name, spec.vocab_size, spec.hidden_size)


class _StoredLinear:
    """``LinearWeights`` that are read when they are looked at."""

    def __init__(self, base: StoredBase, index: int) -> None:
        self._base, self.index = base, index

    @cached_property
    def weight(self) -> torch.Tensor:
        base, index = self._base, self.index
        if index == len(base._sites):
            if base.spec.tied_embeddings:
                return base.embedding_weights()
            return read_head(base.spec, base._checkpoint)
        site = base._sites[index]
        part = WHOLE.site(base.spec, index, site)
        return read_weight(base.spec, base._checkpoint, site, part)

    @cached_property
    def bias(self) -> torch.Tensor | None:
        base, index = self._base, self.index
        if index == len(base._sites):
            return None
        site = base._sites[index]
        return read_bias(base._checkpoint, site, WHOLE.site(base.spec, index, site))
