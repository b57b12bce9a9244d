"""``lorax-train generate``: try an adapter without a server."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from lorax_serve.sampling_flags import add_sampling_flags, given_sampling
from lorax_train.adapters.generation import Sampling, generate
from lorax_train.adapters.merge import check_mergeable, merged_model
from lorax_train.adapters.stored import open_adapter
from lorax_train.commands.parsing import CommandParser
from lorax_train.data.tokenizer import load_tokenizer
from lorax_train.model.base import choose_device

__all__ = ["main"]


def main(argv: Sequence[str]) -> int:
    """Print what the adapter makes of a prompt, as it comes.

    The adapter is merged into the base in memory, in float32, so that all variants answer as they
    would be served.

    Raises:
        TrainingError: an argument is wrong, or the adapter acts on a part of the prompt only.
        AdapterRejected: the server's reader refuses the adapter.
        ModelUnsupported: the base cannot be found.
    """
    options = _parser().parse_args(argv)
    given = given_sampling(options)
    sampling = Sampling(**given | {"stop": tuple(given.get("stop", ()))})
    stored = open_adapter(options.adapter, options.model)
    check_mergeable(stored, to_disk=False)
    tokenizer = load_tokenizer(stored.model, stored.source, chat=options.chat)
    text = sys.stdin.read() if options.prompt == "-" else options.prompt
    if options.chat:
        prompt = tokenizer.render([("user", text)], answer=True)
    else:
        prompt = tokenizer.encode(text, special=True)
    device = choose_device(options.device)
    model: torch.nn.Module = merged_model(stored, getattr(torch, options.dtype))
    model.to(device)
    done = generate(model, tokenizer, prompt, sampling, _show)  # type: ignore[arg-type]
    print()
    if options.verbose:
        print(
            f"[{options.adapter}@{stored.files.digest[:12]}; {len(prompt)} + {len(done.tokens)} "
            f"tokens; {done.reason}]",
            file=sys.stderr,
        )
    return 0


def _show(text: str) -> None:
    print(text, end="", flush=True)


def _parser() -> CommandParser:
    parser = CommandParser("generate", "Try an adapter without a server.")
    parser.add_adapter()
    parser.add_argument("prompt", help="the prompt; - reads it from standard input")
    parser.add_argument(
        "--chat", action="store_true", help="take it as a user's message, in the chat template"
    )
    add_sampling_flags(parser)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        default="float32",
        help="of the merged weights; bfloat16 takes half the memory, and rounds (default: float32)",
    )
    parser.add_argument(
        "-v", "--verbose", action="store_true", help="say what answered, and how it ended"
    )
    return parser
