"""``--targets``: which linear modules get LoRA, and how the adapter's config names them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lorax_serve.adapter import LoRAConfig, ModuleShape, select_targets
from lorax_serve.errors import AdapterRejected, TrainingError

__all__ = ["resolve_targets"]

# What the projections to query, key and value are called, fused ones included.
_QKV = frozenset(
    {
        *("q_proj", "k_proj", "v_proj"),  # Llama, Mistral, Qwen, Gemma, OPT and most others
        *("query", "key", "value"),  # the BERT family
        *("q_lin", "k_lin", "v_lin"),  # DistilBERT's naming
        "c_attn",  # GPT-2, GPT-BigCode
        "query_key_value",  # GPT-NeoX, Bloom, Falcon
        "qkv_proj",  # Phi-3, CodeGen
        "Wqkv",  # MPT
    }
)


def resolve_targets(
    spec: str, shapes: Mapping[str, ModuleShape]
) -> tuple[list[str], tuple[str, ...]]:
    """Find the modules that ``--targets`` means.

    Args:
        spec: ``all-linear``, ``qkv``, comma-separated names, or ``regex:`` and an expression for
            the whole path.
        shapes: every linear module of the base by path.

    Returns:
        Their paths in the order of ``shapes``, and names for ``target_modules`` that PEFT and the
        server resolve to exactly these: last name segments if they do, else the full paths.

    Raises:
        TrainingError: when the whole, or one name of a list, matches no module.
    """
    segments = {path.rsplit(".", 1)[-1] for path in shapes}
    wanted: str | tuple[str, ...]
    if spec == "all-linear":
        wanted = spec
    elif spec == "qkv":
        wanted = tuple(sorted(_QKV & segments))
        if not wanted:
            raise TrainingError(
                f"--targets qkv: this model's linear modules are named "
                f"{', '.join(sorted(segments))}, none of which is known to be the query, key or "
                "value; name them with --targets"
            )
    elif spec.startswith("regex:"):
        wanted = spec.removeprefix("regex:")
    else:
        wanted = tuple(name.strip() for name in spec.split(","))
        if not all(wanted):
            raise TrainingError(f"--targets {spec!r}: there is an empty name in the list")
        for name in wanted:
            _select((name,), shapes)  # PEFT is content when any one of them matches
    paths = _select(wanted, shapes)
    last = tuple(sorted({path.rsplit(".", 1)[-1] for path in paths}))
    return paths, last if _select(last, shapes) == paths else tuple(sorted(paths))


def _select(wanted: str | Sequence[str], shapes: Mapping[str, ModuleShape]) -> list[str]:
    try:
        # from_dict is where the leaf checks a regular expression.
        names = wanted if isinstance(wanted, str) else list(wanted)
        config = LoRAConfig.from_dict({"peft_type": "LORA", "target_modules": names})
        return select_targets(config, shapes)
    except AdapterRejected as error:
        raise TrainingError(f"--targets: {error}") from error
