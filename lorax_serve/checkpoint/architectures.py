"""Which architectures are served, and how each one's ``config.json`` becomes a ``DecoderSpec``.

A new architecture is a layout (what its checkpoints call what) and a reader, which refuses every
setting that ``decoder`` would not compute exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lorax_serve.checkpoint.spec import Activation, DecoderSpec, Layout
from lorax_serve.errors import ModelUnsupported

__all__ = ["read_spec"]

_LLAMA = Layout(
    inner="model",
    embedding="embed_tokens",
    positions=None,
    norm="norm",
    layers="layers",
    input_norm="input_layernorm",
    post_norm="post_attention_layernorm",
    qk_norm=None,
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    o="self_attn.o_proj",
    gate_up=("mlp.gate_proj", "mlp.up_proj"),
    down="mlp.down_proj",
    conv1d=False,
    buffers=("rotary_emb.inv_freq",),
)
_QWEN3 = replace(_LLAMA, qk_norm=("self_attn.q_norm", "self_attn.k_norm"))
_GPT2 = Layout(
    inner="transformer",
    embedding="wte",
    positions="wpe",
    norm="ln_f",
    layers="h",
    input_norm="ln_1",
    post_norm="ln_2",
    qk_norm=None,
    qkv=("attn.c_attn",),
    o="attn.c_proj",
    gate_up=("mlp.c_fc",),
    down="mlp.c_proj",
    conv1d=True,
    buffers=(".attn.bias", ".attn.masked_bias"),
)
# These rescale as a sequence grows, so cached keys would have to change with it.
_LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}
# gelu_new writes out the formula that torch's own tanh approximation computes.
_GPT2_ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
# What the forward is written for. reorder_and_upcast_attn is not here: it computes the same, in
# another order, and only in transformers' eager attention.
_GPT2_SETTINGS = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}


def read_spec(directory: Path) -> DecoderSpec:
    """Read ``config.json`` and ``generation_config.json``.

    Raises:
        ModelUnsupported: naming the setting that the decoder does not compute exactly.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ModelUnsupported(f"{directory}/config.json cannot be read: {error}") from error
    names = config.architectures or []
    known = [name for name in names if _MODEL_TYPES.get(name) == config.model_type]
    if not known:
        raise ModelUnsupported(
            f"{directory}/config.json: architectures={names} (model_type={config.model_type!r}) is "
            f"not served; these are: {', '.join(sorted(_MODEL_TYPES))}"
        )
    if getattr(config, "quantization_config", None):
        raise ModelUnsupported("config.json: quantization_config: quantised weights are not served")
    return _READERS[config.model_type](config, _eos_token_ids(config, directory))


def _read_llama(config: Any, eos_token_ids: tuple[int, ...]) -> DecoderSpec:
    """Llama, and those that differ from it in biases and norms of heads."""
    if config.hidden_act != "silu":
        raise ModelUnsupported(f"config.json: hidden_act={config.hidden_act!r}; only 'silu'")
    head_dim = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    inv_freq, rope_scale = _rope(config, head_dim)
    max_positions = config.max_position_embeddings
    window = getattr(config, "sliding_window", None)
    if window is not None:  # up to the window, sliding attention is full attention
        max_positions = min(max_positions, window)
    return DecoderSpec(
        layout=_QWEN3 if config.model_type == "qwen3" else _LLAMA,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        norm="rms",
        norm_eps=config.rms_norm_eps,
        activation="silu",
        gated=True,
        max_positions=max_positions,
        inv_freq=inv_freq,
        rope_scale=rope_scale,
        tied_embeddings=bool(config.tie_word_embeddings),
        biased=_llama_biases(config),
        eos_token_ids=eos_token_ids,
    )


def _llama_biases(config: Any) -> tuple[str, ...]:
    if config.model_type == "qwen2":
        return _LLAMA.qkv
    attention = (*_LLAMA.qkv, _LLAMA.o) if getattr(config, "attention_bias", False) else ()
    mlp = (*_LLAMA.gate_up, _LLAMA.down) if getattr(config, "mlp_bias", False) else ()
    return attention + mlp


def _read_gpt2(config: Any, eos_token_ids: tuple[int, ...]) -> DecoderSpec:
    for name, served in _GPT2_SETTINGS.items():
        if (value := getattr(config, name)) != served:
            raise ModelUnsupported(f"config.json: {name}={value!r}; only {served}")
    activation = _GPT2_ACTIVATIONS.get(config.activation_function)
    if activation is None:
        raise ModelUnsupported(
            f"config.json: activation_function={config.activation_function!r}; only "
            f"{', '.join(map(repr, _GPT2_ACTIVATIONS))}"
        )
    return DecoderSpec(
        layout=_GPT2,
        vocab_size=config.vocab_size,
        hidden_size=config.n_embd,
        intermediate_size=4 * config.n_embd if config.n_inner is None else config.n_inner,
        num_layers=config.n_layer,
        num_heads=config.n_head,
        num_kv_heads=config.n_head,
        head_dim=config.n_embd // config.n_head,
        norm="layer",
        norm_eps=config.layer_norm_epsilon,
        activation=activation,
        gated=False,
        max_positions=config.n_positions,
        inv_freq=None,
        rope_scale=1.0,
        tied_embeddings=bool(config.tie_word_embeddings),
        biased=(*_GPT2.qkv, _GPT2.o, *_GPT2.gate_up, _GPT2.down),
        eos_token_ids=eos_token_ids,
    )


_MODEL_TYPES = {
    "GPT2LMHeadModel": "gpt2",
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
_READERS: dict[str, Callable[[Any, tuple[int, ...]], DecoderSpec]] = {
    "gpt2": _read_gpt2,
    "llama": _read_llama,
    "mistral": _read_llama,
    "qwen2": _read_llama,
    "qwen3": _read_llama,
}


def _eos_token_ids(config: Any, directory: Path) -> tuple[int, ...]:
    from transformers import GenerationConfig

    eos: Any = config.eos_token_id
    if (directory / "generation_config.json").is_file():
        stated = GenerationConfig.from_pretrained(directory, local_files_only=True)
        eos = stated.eos_token_id if stated.eos_token_id is not None else eos
    return tuple(eos) if isinstance(eos, list) else (() if eos is None else (eos,))


def _rope(config: Any, head_dim: int) -> tuple[torch.Tensor, float]:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = config.rope_parameters
    kind = parameters["rope_type"]
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise ModelUnsupported("config.json: partial_rotary_factor other than 1 is not served")
    if kind == "default":
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        return 1.0 / (parameters["rope_theta"] ** exponents), 1.0
    if kind in _LENGTH_DEPENDENT_ROPE or kind not in ROPE_INIT_FUNCTIONS:
        raise ModelUnsupported(f"config.json: rope_type={kind!r} is not served")
    inv_freq, scale = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    return inv_freq.float(), float(scale)
