"""The base model, loaded for training: frozen, in one dtype, on one device."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
)

from lorax_serve.errors import TrainingError
from lorax_train.config import Device, DtypeName, Quantize
from lorax_train.model.quantized_base import load_quantized

__all__ = [
    "check_dense",
    "choose_device",
    "choose_dtype",
    "load_model",
    "output_head",
    "vocabulary_size",
]


def choose_device(name: Device, local_rank: int | None = None) -> torch.device:
    """The device that ``--device`` means here.

    Args:
        name: the flag's value.
        local_rank: the number of this process on its machine, if each has a device of its own.

    Raises:
        TrainingError: when cuda is asked for and there is none, or not one for each process.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise TrainingError(
            "--device cuda: torch finds no CUDA device here; use --device cpu, or install a CUDA "
            "build of torch"
        )
    if not available or name == "cpu":
        return torch.device("cpu")
    if local_rank is None:
        return torch.device("cuda")
    devices = torch.cuda.device_count()
    if local_rank >= devices:
        raise TrainingError(
            f"there are {devices} CUDA devices here, and more processes; start one for each "
            f"(--nproc-per-node {devices}), or use --device cpu"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def choose_dtype(name: DtypeName, device: torch.device) -> torch.dtype:
    """The dtype of the frozen base that ``--dtype`` means on ``device``.

    ``auto`` takes bfloat16 only where the hardware multiplies it: emulated, it is slower than
    float32. A and B, and the optimizer, are float32 in either case.
    """
    if name != "auto":
        return torch.bfloat16 if name == "bfloat16" else torch.float32
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        # Private, and the only names that torch has for these two facts.
        probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        fast = any(getattr(torch.cpu, probe, bool)() for probe in probes)
    return torch.bfloat16 if fast else torch.float32


def check_dense(spec: str, directory: Path, quantize: Quantize = "none") -> None:
    """Make sure that a checkpoint has the model's own weights, not quantised ones: these are
    packed, so LoRA would get wrong shapes, and no server of ours could apply the adapter to them.

    Args:
        spec: what the user calls it, for messages.
        directory: in Hugging Face's layout.
        quantize: what is asked for.

    Raises:
        TrainingError: its config.json has a ``quantization_config``.
    """
    try:
        found = json.loads((directory / "config.json").read_bytes()).get("quantization_config")
    except (OSError, ValueError):  # which is for the loading to refuse
        return
    if not found:
        return
    method = found.get("quant_method", "of an unknown method")
    flag = "" if quantize == "none" else f"--quantize {quantize}: "
    hint = ", with --quantize nf4 or int8 if memory is scarce" if quantize == "none" else ""
    raise TrainingError(
        f"{flag}model {spec} is quantised already (quantization_config in its config.json, "
        f"{method}), and adapters are trained for dense weights; name the model that it was made "
        f"from{hint}"
    )


def load_model(
    spec: str,
    directory: Path,
    dtype: torch.dtype,
    device: torch.device,
    quantize: Quantize = "none",
) -> PreTrainedModel:
    """Load the base model, frozen and in evaluation mode.

    It stays in evaluation mode: the base is not trained, so its own dropout would be noise, and
    ``--dropout`` acts on the LoRA branch alone.

    Args:
        spec: what the user calls it, for messages.
        directory: in Hugging Face's layout.
        dtype: of its weights, or of what they are dequantised to.
        device: where it goes.
        quantize: how its linear layers are kept, but for the output head.

    Raises:
        TrainingError: when it is no causal language model, weights are missing, it is quantised
            already, or it cannot be quantised.
    """
    check_dense(spec, directory, quantize)
    try:
        # Any: the declared type leaves out the pair that output_loading_info asks for.
        loaded: Any
        if quantize == "none":
            loaded = AutoModelForCausalLM.from_pretrained(
                directory, dtype=dtype, output_loading_info=True
            )
        else:
            loaded = load_quantized(spec, directory, dtype, device, quantize)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise TrainingError(f"model {spec}: cannot be loaded: {error}") from error
    model: PreTrainedModel = loaded[0]
    missing = sorted(loaded[1]["missing_keys"])
    if missing:  # transformers would fill them with random numbers
        raise TrainingError(
            f"model {spec}: {len(missing)} tensors are missing in its files, {missing[0]} the first"
        )
    module: nn.Module = model
    module.requires_grad_(False).eval().to(device)
    return model


def output_head(model: PreTrainedModel) -> nn.Module | None:
    """The module that turns hidden states into logits."""
    getter: Callable[[], Any] = model.get_output_embeddings
    head = getter()
    return head if isinstance(head, nn.Module) else None


def vocabulary_size(model: PreTrainedModel) -> int:
    """How many rows the input embedding has: more than the tokenizer's tokens, in some models."""
    embedding: Any = model.get_input_embeddings()
    return int(embedding.weight.shape[0])
