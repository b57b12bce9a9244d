"""``lorax-train import``: a file of the Elixir library lorax as an adapter in PEFT's format."""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from lorax_serve._version import __version__
from lorax_serve.adapter import match_weights, read, save
from lorax_serve.checkpoint.source import resolve_model
from lorax_serve.errors import TrainingError
from lorax_train.adapters.merge import check_new_directory, unwritable
from lorax_train.adapters.stored import base_modules
from lorax_train.commands.parsing import CommandParser
from lorax_train.elixir.layers import GPT2_ORDER, PROJECTIONS, Imported, import_layers
from lorax_train.elixir.nx import read_layers

__all__ = ["main"]


def main(argv: Sequence[str]) -> int:
    """Read the file, and write the adapter.

    Raises:
        TrainingError: an argument or the file is wrong, or the adapter cannot be written.
        ModelUnsupported: the base cannot be found.
    """
    options = _parser().parse_args(argv)
    if not (math.isfinite(options.alpha) and options.alpha > 0):
        raise TrainingError(f"--alpha must be a number above 0, not {options.alpha}")
    order = None if options.order is None else _order(options.order)
    check_new_directory(options.out)
    layers = read_layers(options.file)
    modules = base_modules(options.model, resolve_model(options.model))
    found = import_layers(layers, modules, options.model, options.alpha, options.r, order)
    metadata = {
        "producer": f"lorax-train {__version__} import",
        "imported_from_sha256": hashlib.sha256(options.file.read_bytes()).hexdigest(),
    }
    try:
        save(options.out, found.config, found.tensors, metadata)
    except OSError as error:
        raise unwritable(options.out, error) from error
    written = read(options.out)
    match_weights(written.config, written.tensors, modules)
    _say(found, options.alpha, options.out)
    return 0


def _parser() -> CommandParser:
    parser = CommandParser(
        "import", "Write a .lorax file of the Elixir library lorax as an adapter in PEFT's format."
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="the .lorax file")
    parser.add_argument(
        "--model", metavar="M", required=True, help="the model that it was trained on"
    )
    parser.add_out("the adapter's directory, which must not exist")
    parser.add_argument(
        "--alpha", type=float, required=True, help="as in training; the file does not say it"
    )
    parser.add_argument("--r", type=int, help="as in training; checked (default: the file's)")
    parser.add_argument(
        "--order",
        help="of query, key and value in each block, where the file numbers its layers "
        f"(default, of GPT-2: {','.join(GPT2_ORDER)})",
    )
    return parser


def _order(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    if not set(names) <= set(PROJECTIONS) or len(set(names)) != len(names):
        raise TrainingError(f"--order {text}: give some of {','.join(PROJECTIONS)}, each once")
    return names


def _say(found: Imported, alpha: float, out: Path) -> None:
    config = found.config
    last = ", ".join(dict.fromkeys(path.rpartition(".")[2] for path in found.modules))
    lines = [
        f"read     LoRA of rank {found.rank} on {', '.join(found.projections)} of {found.blocks} "
        f"blocks; scale {alpha / found.rank:g}",
        f"written  {out}: {len(found.modules)} modules ({last}), r {config.r}, alpha "
        f"{config.lora_alpha:g}, scale {config.lora_alpha / config.r:g}",
    ]
    if found.guessed:
        lines.append(
            f"order    the file numbers its layers; taken as {', '.join(found.guessed)} in each "
            "block (--order says otherwise)"
        )
    print("\n".join(lines), file=sys.stderr)
