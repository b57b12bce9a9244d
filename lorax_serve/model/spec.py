"""What a base model is made of: sizes read from its ``config.json``, and its LoRA sites.

A *site* is one fused linear of the decoder, where several modules of the checkpoint (q, k and v)
are computed by one matrix product; each module keeps its own slice of the site's output.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorax_serve.adapter import LinearShape
from lorax_serve.errors import ModelUnsupported

__all__ = ["SITES_PER_LAYER", "DecoderSpec", "Site", "Slice"]

_ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
# These rescale as a sequence grows, so cached keys would have to change with it.
_LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}
SITES_PER_LAYER = 4


@dataclass(frozen=True, slots=True)
class Slice:
    """One checkpoint module's columns ``[start, start + length)`` of its site's output."""

    path: str
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class Site:
    """One fused linear, ``y = x @ W.T`` with W of ``[out_features, in_features]``.

    ``gated`` says that ``silu(first half of y) * second half`` is what is made of it.
    """

    in_features: int
    out_features: int
    slices: tuple[Slice, ...]
    gated: bool = False


@dataclass(frozen=True, slots=True)
class DecoderSpec:
    """The sizes of a Llama-like decoder (pre-norm, RoPE, grouped-query attention, gated SiLU).

    ``inv_freq`` is RoPE's ``[head_dim / 2]`` in float32, ``rope_scale`` the factor of cos and sin.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    max_positions: int
    tied_embeddings: bool
    qk_norm: bool
    inv_freq: torch.Tensor
    rope_scale: float
    eos_token_ids: tuple[int, ...]

    @classmethod
    def from_directory(cls, directory: Path) -> DecoderSpec:
        """Read ``config.json`` and ``generation_config.json``.

        Raises:
            ModelUnsupported: naming the setting that this decoder does not compute exactly.
        """
        from transformers import AutoConfig, GenerationConfig

        try:
            config = AutoConfig.from_pretrained(directory, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise ModelUnsupported(f"{directory}/config.json cannot be read: {error}") from error
        _refuse_inexact(config, directory)
        head_dim = getattr(config, "head_dim", None) or (
            config.hidden_size // config.num_attention_heads
        )
        inv_freq, rope_scale = _rope(config, head_dim)
        max_positions = config.max_position_embeddings
        window = getattr(config, "sliding_window", None)
        if window is not None:  # up to the window, sliding attention is full attention
            max_positions = min(max_positions, window)
        eos: Any = config.eos_token_id
        if (directory / "generation_config.json").is_file():
            stated = GenerationConfig.from_pretrained(directory, local_files_only=True)
            eos = stated.eos_token_id if stated.eos_token_id is not None else eos
        return cls(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_layers=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=head_dim,
            norm_eps=config.rms_norm_eps,
            max_positions=max_positions,
            tied_embeddings=bool(config.tie_word_embeddings),
            qk_norm=config.model_type == "qwen3",
            inv_freq=inv_freq,
            rope_scale=rope_scale,
            eos_token_ids=tuple(eos) if isinstance(eos, list) else (() if eos is None else (eos,)),
        )

    def sites(self) -> list[Site]:
        """The LoRA sites: qkv, o, gate_up and down of each layer, in the order of the forward."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        inner = self.intermediate_size
        found = []
        for layer in range(self.num_layers):
            attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
            found += [
                _site(
                    self.hidden_size,
                    [
                        (f"{attention}.q_proj", q),
                        (f"{attention}.k_proj", kv),
                        (f"{attention}.v_proj", kv),
                    ],
                ),
                _site(q, [(f"{attention}.o_proj", self.hidden_size)]),
                _site(
                    self.hidden_size,
                    [(f"{mlp}.gate_proj", inner), (f"{mlp}.up_proj", inner)],
                    gated=True,
                ),
                _site(inner, [(f"{mlp}.down_proj", self.hidden_size)]),
            ]
        return found

    @property
    def num_parameters(self) -> int:
        """Number of weights of the linears and the embeddings; tied ones count once."""
        linears = sum(site.in_features * site.out_features for site in self.sites())
        embeddings = self.vocab_size * self.hidden_size
        return linears + (embeddings if self.tied_embeddings else 2 * embeddings)

    def linear_modules(self) -> dict[str, LinearShape]:
        """Every linear module by its path in the transformers model, lm_head last."""
        modules = {
            part.path: LinearShape(site.in_features, part.length)
            for site in self.sites()
            for part in site.slices
        }
        modules["lm_head"] = LinearShape(self.hidden_size, self.vocab_size, is_output=True)
        return modules


def _site(in_features: int, modules: list[tuple[str, int]], *, gated: bool = False) -> Site:
    slices, start = [], 0
    for path, length in modules:
        slices.append(Slice(path, start, length))
        start += length
    return Site(in_features, start, tuple(slices), gated)


def _refuse_inexact(config: Any, directory: Path) -> None:
    names = config.architectures or []
    known = [name for name in names if _ARCHITECTURES.get(name) == config.model_type]
    if not known:
        raise ModelUnsupported(
            f"{directory}/config.json: architectures={names} (model_type={config.model_type!r}) is "
            f"not served; these are: {', '.join(sorted(_ARCHITECTURES))}"
        )
    if config.hidden_act != "silu":
        raise ModelUnsupported(f"config.json: hidden_act={config.hidden_act!r}; only 'silu'")
    if getattr(config, "quantization_config", None):
        raise ModelUnsupported("config.json: quantization_config: quantised weights are not served")


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
