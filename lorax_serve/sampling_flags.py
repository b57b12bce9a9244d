"""The command-line flags that say how tokens are chosen: the same words wherever text is made."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

__all__ = ["add_sampling_flags", "given_sampling"]

_FLAGS: dict[str, tuple[type, str]] = {
    "max_new_tokens": (int, "most tokens to generate (default: 256)"),
    "temperature": (float, "0 is greedy (default: 1 with --top-k or --top-p, else 0)"),
    "top_k": (int, "keep the k most probable tokens"),
    "top_p": (float, "keep the most probable tokens up to this mass"),
    "seed": (int, "repeat a draw"),
    "repetition_penalty": (float, "above 1 discourages repetition"),
    "stop": (str, "text that ends the generation; may be given several times"),
}


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """Add them all. One that is not given leaves no attribute behind."""
    for name, (kind, text) in _FLAGS.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=kind,
            help=text,
            action="append" if name == "stop" else "store",
            default=argparse.SUPPRESS,
        )


def given_sampling(options: argparse.Namespace, others: Iterable[str] = ()) -> dict[str, Any]:
    """Those that were given, and of ``others``, by name; ``stop`` is a list of texts."""
    return {name: getattr(options, name) for name in (*_FLAGS, *others) if hasattr(options, name)}
