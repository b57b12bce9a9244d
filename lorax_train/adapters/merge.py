"""An adapter merged into its base: one model, with the logits of both.

The arithmetic is float32, whatever the weights are in, and what comes out is rounded once.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lorax_serve.adapter import LoRAPair
from lorax_serve.errors import TrainingError
from lorax_train.adapters.stored import StoredAdapter
from lorax_train.model.base import load_model, output_head

__all__ = [
    "check_mergeable",
    "check_new_directory",
    "merge_into",
    "merged_model",
    "save_model",
    "unwritable",
]

_CPU = torch.device("cpu")
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "config.json", "README.md")
_KEPT = ("*.json", "*.jinja", "*.model", "*.txt")


def check_mergeable(stored: StoredAdapter, *, to_disk: bool = True) -> None:
    """Make sure, before the base is loaded, that the adapter can be a part of its weights.

    Args:
        stored: the adapter.
        to_disk: whether the model is to be saved, and so cannot have biases that its architecture
            does not have.

    Raises:
        TrainingError: naming what cannot be.
    """
    if stored.weights.invocation_tokens:
        raise TrainingError(
            f"{stored.directory} is an activated LoRA (alora_invocation_tokens): it acts only "
            "after its invocation in a prompt, which merged weights cannot; serve it unmerged"
        )
    for path, pair in stored.weights.pairs.items():
        if to_disk and pair.bias is not None and not stored.modules[path].has_bias:
            raise TrainingError(
                f"{stored.directory} has lora_bias on {path}, where the base model has no bias to "
                "merge it into; serve it unmerged"
            )
    config = stored.source / "config.json"
    if json.loads(config.read_bytes()).get("quantization_config"):
        raise TrainingError(
            f"model {stored.model} is quantised, and merging would round the adapter away; name "
            "the unquantised weights with --model"
        )


def merged_model(stored: StoredAdapter, dtype: torch.dtype) -> PreTrainedModel:
    """The base with the adapter merged in, on the CPU in ``dtype``, in evaluation mode.

    Raises:
        TrainingError: the base cannot be loaded, or a merged weight is not finite in ``dtype``.
    """
    model = load_model(stored.model, stored.source, torch.float32, _CPU)
    merge_into(model, stored)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(dtype)
        if not bool(torch.isfinite(parameter).all()):
            raise TrainingError(f"{name} overflows {dtype} once merged; nothing was written")
    model.config.dtype = dtype
    return model


@torch.no_grad()
def merge_into(model: PreTrainedModel, stored: StoredAdapter) -> None:
    """Change a float32 model's weights to what the adapter makes of them.

    As PEFT's ``merge_and_unload``. Where the output is tied to the embedding and the adapter
    changes one of them only, they are untied.
    """
    weights = stored.weights
    changed = {name.rpartition(".")[0] for name in weights.parameters}
    changed |= weights.pairs.keys() | weights.tokens.keys()
    tied = _untie(model, changed)
    for name, tensor in weights.parameters.items():
        model.get_parameter(name).data = tensor.float().clone()
    for path, pair in weights.pairs.items():
        _merge_pair(model.get_submodule(path), pair)
    for path, tokens in weights.tokens.items():
        weight = model.get_parameter(f"{path}.weight")
        weight.data[list(tokens.token_ids)] = tokens.rows.float()
    if tied is not None:
        _settle_ties(model, *tied)


def save_model(model: PreTrainedModel, stored: StoredAdapter, out: Path) -> None:
    """Write a Hugging Face directory, which appears whole or not at all.

    The tokenizer's and the generation config's files are the base's own.

    Raises:
        TrainingError: it cannot be written.
    """
    staged: Path | None = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        staged = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        model.save_pretrained(staged)
        for pattern in _KEPT:
            for file in stored.source.glob(pattern):
                if not any(file.match(weights) for weights in _WEIGHTS):
                    shutil.copyfile(file, staged / file.name)
        (staged / "README.md").write_text(_card(stored, out.name), encoding="utf-8")
        for file in staged.iterdir():
            file.chmod(0o644)  # safetensors writes for its user alone
        staged.chmod(0o755)
        staged.replace(out)
    except OSError as error:
        raise unwritable(out, error) from error
    finally:
        if staged is not None:
            shutil.rmtree(staged, ignore_errors=True)


def check_new_directory(out: Path) -> None:
    """Make sure, before anything is computed, that a directory can appear at ``out``.

    Raises:
        TrainingError: there is something already, or no permission.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise TrainingError(f"--out {out} exists; choose a directory that does not, or delete it")
    nearest = next(path for path in out.absolute().parents if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise TrainingError(f"--out {out} cannot be written: no write permission for {nearest}")


def unwritable(out: Path, error: OSError) -> TrainingError:
    """What to raise where the disk is full or fails while a new directory is written."""
    return TrainingError(
        f"--out {out} cannot be written: {error.strerror}; make room there, or choose another "
        "directory, and run the command again"
    )


def _untie(model: PreTrainedModel, changed: set[str]) -> tuple[nn.Module, nn.Module] | None:
    """Give the output a weight of its own, if it shares the embedding's and one is changed."""
    getter: Callable[[], Any] = model.get_input_embeddings
    embedding, head = getter(), output_head(model)
    if head is None or head.weight is not embedding.weight:
        return None
    if not any(module in (embedding, head) for path, module in _modules(model, changed)):
        return None
    own = head.get_parameter("weight").detach().clone()
    head.weight = nn.Parameter(own, requires_grad=False)
    return embedding, head


def _modules(model: PreTrainedModel, paths: set[str]) -> list[tuple[str, nn.Module]]:
    return [(path, model.get_submodule(path)) for path in paths]


def _settle_ties(model: PreTrainedModel, embedding: nn.Module, head: nn.Module) -> None:
    """Tie what has come out the same, and have the config say so if it has not."""
    ours, theirs = head.get_parameter("weight"), embedding.get_parameter("weight")
    if torch.equal(ours, theirs):
        head.weight = theirs
        return
    config: Any = model.config
    for each in (config, config.get_text_config()):
        each.tie_word_embeddings = False
    # Which transformers leaves out of what it saves.
    model.all_tied_weights_keys = {}
    model._tied_weights_keys = {}


def _merge_pair(module: nn.Module, pair: LoRAPair) -> None:
    """``W + s B A``; with DoRA, each row of it at its magnitude (arXiv:2402.09353)."""
    transposed = isinstance(module, Conv1D | nn.Embedding)  # store W as [in, out]
    weight = module.get_parameter("weight")
    w = weight.data.T if transposed else weight.data
    merged = w + (pair.b.float() * pair.scale) @ pair.a.float()
    if pair.magnitude is not None:
        lengths = torch.linalg.vector_norm(merged, dim=1)
        merged *= (pair.magnitude.float() / lengths)[:, None]
    weight.data = (merged.T if transposed else merged).contiguous()
    if pair.bias is not None:
        own = pair.bias.float() * pair.scale
        bias = getattr(module, "bias", None)
        total = own if bias is None else bias.data + own
        module.bias = nn.Parameter(total, requires_grad=False)


def _card(stored: StoredAdapter, name: str) -> str:
    return f"""---
base_model: {json.dumps(stored.model)}
library_name: transformers
pipeline_tag: text-generation
---

# {name}

`{stored.model}` with the LoRA adapter `{stored.directory.resolve().name}` merged in by
`lorax-train merge`; SHA-256 of the adapter's files: `{stored.files.digest}`.
"""
