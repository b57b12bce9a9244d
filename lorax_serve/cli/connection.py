"""The flags of ``lorax`` that say which server it talks to, and how."""

from __future__ import annotations

import argparse
import os
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from lorax_serve.cli.flags import ENVIRONMENT_PREFIX, OFF, ON
from lorax_serve.errors import InvalidRequest

if TYPE_CHECKING:
    from lorax_serve.client import Client

__all__ = ["add_connection_flags", "connect"]

_DEFAULT_SERVER = "localhost:50051"
_TLS = f"{ENVIRONMENT_PREFIX}TLS"
_FILES = {
    "ca": "roots to trust (PEM), in place of those that come with gRPC",
    "cert": "the client's own certificate (PEM), for a server that asks for one",
    "key": "its key (PEM)",
}


def add_connection_flags(parser: argparse.ArgumentParser) -> None:
    """Add ``--server``, ``--timeout`` and those of TLS. All but the time-out have a variable."""
    parser.add_argument(
        "--server",
        metavar="HOST:PORT",
        default=os.environ.get("LORAX_SERVER"),
        help=f"default: $LORAX_SERVER, else {_DEFAULT_SERVER}",
    )
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="for each call")
    parser.add_argument(
        "--tls",
        action=argparse.BooleanOptionalAction,
        help=f"speak TLS; default: on if a flag below gives a file, else ${_TLS} ({ON} or {OFF}), "
        "else on if a variable does",
    )
    for name, what in _FILES.items():
        variable = f"{_TLS}_{name.upper()}"
        parser.add_argument(
            f"--tls-{name}",
            metavar="FILE",
            help=f"{what}; default: ${variable}",
        )


def connect(options: argparse.Namespace) -> Client:
    """A client of the server that the flags name.

    Raises:
        InvalidRequest: a file for TLS cannot be used or is given beside ``--no-tls``, or
            ``$LORAX_TLS`` is neither on nor off.
    """
    from lorax_serve.client import Client, Tls  # not for commands without a server

    flags = {name: getattr(options, f"tls_{name}") for name in _FILES}
    given = {name: file for name, file in flags.items() if file is not None}
    said = {name: os.environ.get(f"{_TLS}_{name.upper()}") for name in _FILES}
    ca, certificate, key = (
        Path(file).expanduser() if file else None for file in {**said, **given}.values()
    )
    wanted = _wanted(options.tls, given)
    if wanted is None:
        wanted = any((ca, certificate, key))
    tls = Tls(ca, certificate, key) if wanted else None
    return Client(options.server or _DEFAULT_SERVER, tls=tls, timeout=options.timeout)


def _wanted(flag: bool | None, given: Collection[str]) -> bool | None:
    """Whether TLS is asked for, by flags first; None leaves it to the variables of files.

    Args:
        flag: what ``--tls`` or ``--no-tls`` says.
        given: which files flags name.
    """
    if flag is False and given:
        raise InvalidRequest(f"--no-tls and --tls-{next(iter(given))} exclude each other; give one")
    if flag is not None:
        return flag
    if given:  # whatever a variable says, or prompts would be sent in plain text
        return True
    said = os.environ.get(_TLS)
    if not said:
        return None
    if said not in (ON, OFF):
        raise InvalidRequest(f"{_TLS} must be {ON} or {OFF}, found {said!r}")
    return said == ON
