"""An adapter on disk with the base model that it is for."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lorax_serve.adapter import AdapterFiles, LoRAWeights, ModuleShape, match_weights, read
from lorax_serve.checkpoint.architectures import read_spec
from lorax_serve.checkpoint.shards import open_shards
from lorax_serve.checkpoint.source import EMBEDDED_MODEL, resolve_model
from lorax_serve.errors import ModelUnsupported, TrainingError
from lorax_train.model.inject import module_shapes

__all__ = ["StoredAdapter", "base_modules", "base_name", "open_adapter", "without_copies"]


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter that the server's reader has found to fit its base.

    Attributes:
        directory: with its two files.
        files: what they hold.
        weights: its tensors, by what they are to the base.
        model: what the base is called.
        source: the base's directory.
        modules: every module of the base that adapters can change, by path.
    """

    directory: Path
    files: AdapterFiles
    weights: LoRAWeights
    model: str
    source: Path
    modules: Mapping[str, ModuleShape]


def open_adapter(directory: Path, model: str | None) -> StoredAdapter:
    """Read an adapter and match it with its base.

    Args:
        directory: with the adapter's two files.
        model: the base; None: the one that the adapter's config names.

    Raises:
        AdapterRejected: the server's reader refuses it.
        ModelUnsupported: there is no such base.
    """
    files = read(directory)
    name = base_name(model, files.config.base_model_name_or_path)
    source = resolve_model(name)
    modules = base_modules(name, source)
    weights = match_weights(files.config, files.tensors, modules)
    return StoredAdapter(directory, files, weights, name, source, modules)


def without_copies(stored: StoredAdapter) -> LoRAWeights:
    """The weights without the base's own, which PEFT stores beside LoRA on an embedding or on the
    output. What differs from the base's stays."""
    if not stored.weights.parameters:
        return stored.weights
    with ExitStack() as stack:
        shards = open_shards(stored.source, stack)

        def is_base(name: str, tensor: torch.Tensor) -> bool:
            path = name.removesuffix(".weight")
            if path not in stored.weights.pairs:
                return False
            names = [name, f"{stored.modules[path].tied_to}.weight"]
            names += [each.removeprefix("transformer.") for each in names]  # GPT-2's own files
            found = next((each for each in names if each in shards), None)
            if found is None:
                return False
            theirs: torch.Tensor = shards[found].get_tensor(found)
            return torch.equal(theirs.to(tensor.dtype), tensor)

        parameters = stored.weights.parameters
        own = {name: tensor for name, tensor in parameters.items() if not is_base(name, tensor)}
    return replace(stored.weights, parameters=own)


def base_name(given: str | None, named: str | None) -> str:
    """The base: what ``--model`` says, else what the adapter's config does, else the default."""
    return given or named or EMBEDDED_MODEL


def base_modules(model: str, source: str | os.PathLike[str]) -> Mapping[str, ModuleShape]:
    """Every module that adapters can change: as the server sees them, or, of models that it does
    not serve, those that can have LoRA.

    Raises:
        TrainingError: it is no causal language model.
    """
    try:
        return read_spec(Path(source)).modules()
    except ModelUnsupported:
        pass
    try:
        config = AutoConfig.from_pretrained(source)
        with torch.device("meta"):  # shapes only
            build: Callable[..., PreTrainedModel] = AutoModelForCausalLM.from_config
            return module_shapes(build(config))
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise TrainingError(f"model {model}: cannot be read: {error}") from error
