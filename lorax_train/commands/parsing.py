"""What the subcommands' parsers share."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

from lorax_serve.errors import TrainingError

__all__ = ["CommandParser"]


class CommandParser(argparse.ArgumentParser):
    """A parser of one subcommand, whose errors are ``TrainingError``."""

    def __init__(self, word: str, description: str) -> None:
        super().__init__(prog=f"lorax-train {word}", description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raise what is wrong with the arguments."""
        raise TrainingError(message)

    def add_adapter(self) -> None:
        """Take the adapter's directory, and the base model."""
        self.add_argument("adapter", type=Path, metavar="DIR", help="the adapter's directory")
        self.add_argument(
            "--model",
            metavar="M",
            help="the base: smollm2-135m, a .gguf file, a directory or a Hub id "
            "(default: what the adapter's config names)",
        )

    def add_out(self, what: str) -> None:
        """Take the directory that is written."""
        self.add_argument("--out", type=Path, metavar="OUT", required=True, help=what)
