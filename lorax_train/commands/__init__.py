"""The subcommands of ``lorax-train`` beside training, each a module with a ``main`` of its own.

A module is imported when its command is given, so that training does not wait for the others.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence

from lorax_serve.errors import LoraxError

__all__ = ["COMMANDS", "run_command"]

COMMANDS = {
    "inspect": "lorax_train.commands.inspect",
    "merge": "lorax_train.commands.merge",
    "generate": "lorax_train.commands.generate",
    "export": "lorax_train.commands.export",
    "import": "lorax_train.commands.import_",
}
"""Modules by the word that calls them."""

_INTERRUPTED = 130


def run_command(argv: Sequence[str]) -> int:
    """Run the command that ``argv`` begins with.

    Returns:
        What it returned, 2 after an error (one line on stderr), 130 after Ctrl-C.
    """
    try:
        command: Callable[[Sequence[str]], int] = importlib.import_module(COMMANDS[argv[0]]).main
        # Only now: it takes seconds.
        from transformers.utils import logging as hf_logging

        hide_bars: Callable[[], None] = hf_logging.disable_progress_bar
        hide_bars()
        return command(argv[1:])
    except LoraxError as error:
        text = " ".join(str(error).split())
        print(f"lorax-train {argv[0]}: error: {text}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
