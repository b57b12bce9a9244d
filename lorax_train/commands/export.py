"""``lorax-train export``: an adapter in another form."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from lorax_serve.adapter import match_weights, read, save
from lorax_serve.errors import TrainingError
from lorax_train.adapters.merge import check_new_directory, unwritable
from lorax_train.adapters.portable import portable
from lorax_train.adapters.stored import open_adapter, without_copies
from lorax_train.commands.parsing import CommandParser

__all__ = ["main"]


def main(argv: Sequence[str]) -> int:
    """Write the adapter anew.

    Raises:
        TrainingError: an argument is wrong, the adapter has no such form, or cannot be written.
        AdapterRejected: the server's reader refuses the adapter.
        ModelUnsupported: the base cannot be found.
    """
    parser = CommandParser("export", "Write an adapter in another form.")
    parser.add_adapter()
    parser.add_out("the directory of the new form, which must not exist")
    parser.add_argument(
        "--portable",
        action="store_true",
        help="scale folded into B, one rank, alpha equal to it: for loaders that read little of "
        "the config, such as llama.cpp's and vLLM's",
    )
    options = parser.parse_args(argv)
    if not options.portable:
        raise TrainingError("name the form to write: --portable")
    check_new_directory(options.out)
    stored = open_adapter(options.adapter, options.model)
    config, tensors = portable(stored.files.config, without_copies(stored), stored.modules)
    metadata = {**stored.files.metadata, "portable_of": stored.files.digest}
    metadata.pop("format", None)
    try:
        save(options.out, config, tensors, metadata)
    except OSError as error:
        raise unwritable(options.out, error) from error
    written = read(options.out)
    match_weights(written.config, written.tensors, stored.modules)
    print(
        f"{options.out}: rank {config.r}, alpha {config.lora_alpha:g} on "
        f"{len(stored.weights.pairs)} modules",
        file=sys.stderr,
    )
    return 0
