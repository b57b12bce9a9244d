"""A base model loaded with its linear layers quantised one by one.

transformers builds the model without memory, and reads the checkpoint tensor by tensor; the
quantizer that is registered here takes each linear weight as it comes, so that at no time more than
one of them is dense. Quantised is every ``nn.Linear`` and ``Conv1D`` but the output head, as in
QLoRA; embeddings and norms stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lorax_serve.checkpoint.shards import open_shards
from lorax_serve.errors import ModelUnsupported, TrainingError
from lorax_train.config import Quantize
from lorax_train.memory import give_back_at_once, give_back_memory
from lorax_train.model.quantize import QuantizedLinear, check_available, count_parameters

__all__ = ["load_quantized", "original_weights", "quantization_warnings", "restorable"]

_METHOD = "lorax"
# Of the parameters that should be in quantised layers for them to be worth it.
_WORTH = 0.25

_DENSE = 4 << 20
"""Bytes of a dense weight whose memory counts: it comes and goes with each product."""


@register_quantization_config(_METHOD)
@dataclass
class _Config(QuantizationConfigMixin):
    """What the quantizer is told.

    Attributes:
        quantize: the format.
        device: where quantised weights go.
        names: of the checkpoint's tensors.
    """

    quantize: Quantize
    device: torch.device
    names: frozenset[str] = frozenset()
    # A name of its own, where the declared type lists those that transformers has.
    quant_method: Any = field(default=_METHOD, init=False)


@register_quantizer(_METHOD)
class _Quantizer(HfQuantizer):
    """Tells transformers which parameters are handed to ``_Replace`` when they are read."""

    requires_calibration = False

    def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
        path, name = param_name.rpartition(".")[::2]
        module = model.get_submodule(path)
        # A subclass may compute something else than a product.
        if name != "weight" or type(module) not in (nn.Linear, Conv1D):
            return False
        tied: dict[str, str] = model.all_tied_weights_keys
        is_head = module is model.get_output_embeddings()
        return not is_head and param_name not in {*tied, *tied.values()}

    def get_quantize_ops(self) -> ConversionOps:
        config: Any = self.quantization_config
        return _Replace(config)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        forget: Any = self.remove_quantization_config
        forget(model)  # from here on it is a model like any other
        return model

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True


class _Replace(ConversionOps):
    """Puts a quantised layer in place of the one whose weight was read."""

    def __init__(self, config: _Config) -> None:
        self.config = config

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, Any]:
        model, missing_keys = kwargs["model"], kwargs["missing_keys"]
        rest = {}
        for name, value in input_dict.items():
            path = name.rpartition(".")[0]
            module = model.get_submodule(path)
            weight = value[0] if isinstance(value, list) else value
            if module.weight.shape != weight.shape:
                rest[name] = weight  # which transformers refuses
                continue
            layer = QuantizedLinear.of(module, weight.to(self.config.device), self.config.quantize)
            if len(source_patterns) == 1 and source_patterns[0] in self.config.names:
                layer.source = source_patterns[0]
            for each in layer.modules():
                each._is_hf_initialized = True
            model.set_submodule(path, layer)
            missing_keys.discard(name)
        give_back_memory()
        return rest


def load_quantized(
    spec: str, directory: Path, dtype: torch.dtype, device: torch.device, quantize: Quantize
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Load a causal language model with quantised linear layers.

    Returns:
        The model, whose other weights are on the CPU, and transformers' report on the loading.

    Raises:
        TrainingError: when the format's package is missing, or the checkpoint has nothing to
            quantise.
    """
    check_available(quantize)
    if device.type == "cpu":
        give_back_at_once(_DENSE)
    options: dict[str, Any] = {"dtype": dtype, "output_loading_info": True}
    load: Any
    with ExitStack() as stack:
        try:
            shards = open_shards(directory, stack, backend="pread")
        except ModelUnsupported:  # an older format, which transformers reads whole
            config = _Config(quantize, device)
            load = AutoModelForCausalLM.from_pretrained
            model, report = load(directory, quantization_config=config, **options)
        else:
            config = _Config(quantize, device, frozenset(shards))
            tensors = {name: shard.get_slice(name) for name, shard in shards.items()}
            with torch.device("meta"):  # to see of which class it is
                build: Any = AutoModelForCausalLM.from_config
                empty = build(AutoConfig.from_pretrained(directory))
            load = type(empty).from_pretrained
            model, report = load(
                None,
                config=empty.config,
                state_dict=tensors,
                quantization_config=config,
                **options,
            )
    if not any(isinstance(module, QuantizedLinear) for module in model.modules()):
        raise TrainingError(
            f"--quantize {quantize}: model {spec} has no linear layer that could be quantised, "
            "other than its output head; leave --quantize out"
        )
    return model, report


def quantization_warnings(spec: str, model: PreTrainedModel, directory: Path) -> list[str]:
    """What a user should know of a model that ``load_quantized`` has loaded: one line each."""
    found = []
    layers = _layers(model)
    quantized = sum(layer.in_features * layer.out_features for layer in layers)
    share = quantized / count_parameters(model)
    if share < _WORTH:
        found.append(
            f"only {share:.0%} of the parameters are in linear layers, which --quantize keeps in "
            "fewer bits; the rest is as large as without"
        )
    if spec.endswith(".gguf"):
        found.append(
            "the first use of a GGUF file converts all of it to bfloat16, which takes the memory "
            "that --quantize saves; later runs load the converted copy layer by layer"
        )
    if not list(directory.glob("*.safetensors")):
        found.append(
            "the weights are not in safetensors files, so loading them took as much memory as "
            "without --quantize; convert the model to lower the peak"
        )
    if not restorable(model):
        found.append(
            "transformers converts this model's weights when it loads them, so they cannot be read "
            "one by one: no probe will be stored with the adapter"
        )
    return found


def restorable(model: PreTrainedModel) -> bool:
    """Whether ``original_weights`` works: each quantised weight is one tensor of the checkpoint."""
    return all(layer.source is not None for layer in _layers(model))


@contextmanager
def original_weights(model: PreTrainedModel, directory: Path) -> Iterator[None]:
    """Have the quantised layers compute with the weights in ``directory`` within the block.

    Each is read when it is needed and dropped again, so at no time more than one is dense. A model
    without quantised layers is left alone.

    Args:
        model: that is ``restorable``.
        directory: where it was loaded from.
    """
    layers = _layers(model)
    with ExitStack() as stack:
        shards = open_shards(directory, stack, backend="pread") if layers else {}
        for layer in layers:
            assert layer.source is not None
            layer.original = _Original(layer, shards[layer.source])
        try:
            yield
        finally:
            for layer in layers:
                layer.original = None


class _Original:
    """Reads a layer's weight from the checkpoint: ``[out, in]`` in the compute dtype."""

    def __init__(self, layer: QuantizedLinear, shard: Any) -> None:
        self.name, self.transposed, self.dtype = layer.source, layer.transposed, layer.dtype
        self.shard = shard
        self.device = next(layer.quantized.buffers()).device

    def __call__(self) -> torch.Tensor:
        weight: torch.Tensor = self.shard.get_tensor(self.name).to(self.device, self.dtype)
        return weight.T if self.transposed else weight


def _layers(model: PreTrainedModel) -> list[QuantizedLinear]:
    return [module for module in model.modules() if isinstance(module, QuantizedLinear)]
