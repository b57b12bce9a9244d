"""``lorax-train merge``: an adapter and its base as one model."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence

import torch

from lorax_train.adapters.merge import (
    check_mergeable,
    check_new_directory,
    merged_model,
    save_model,
)
from lorax_train.adapters.stored import StoredAdapter, open_adapter
from lorax_train.commands.parsing import CommandParser
from lorax_train.console import size

__all__ = ["main"]


def main(argv: Sequence[str]) -> int:
    """Write the merged model.

    Raises:
        TrainingError: an argument is wrong, the adapter cannot be merged, or the model not written.
        AdapterRejected: the server's reader refuses the adapter.
        ModelUnsupported: the base cannot be found.
    """
    parser = CommandParser(
        "merge",
        "Merge an adapter into its base, in float32, and save a Hugging Face model.",
    )
    parser.add_adapter()
    parser.add_out("the merged model's directory, which must not exist")
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        help="of the merged weights (default: the base's; float32 if that is another)",
    )
    options = parser.parse_args(argv)
    check_new_directory(options.out)
    stored = open_adapter(options.adapter, options.model)
    check_mergeable(stored)
    dtype = options.dtype or _dtype_of(stored)
    model = merged_model(stored, getattr(torch, dtype))
    save_model(model, stored, options.out)
    n_bytes = sum(path.stat().st_size for path in options.out.glob("*.safetensors"))
    print(
        f"merged {stored.weights.num_modules} modules into {stored.model}: {options.out} "
        f"({dtype}, {size(n_bytes)})\nserve it with:\n"
        f"  lorax-serve --model {shlex.quote(str(options.out))}",
        file=sys.stderr,
    )
    return 0


def _dtype_of(stored: StoredAdapter) -> str:
    config = json.loads((stored.source / "config.json").read_bytes())
    named = config.get("dtype") or config.get("torch_dtype")
    return "bfloat16" if named == "bfloat16" else "float32"
