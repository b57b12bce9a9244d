"""The flags of ``lorax`` that say which server it talks to, and how."""

from __future__ import annotations

import argparse
import os
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
        help=f"speak TLS; default: ${_TLS} ({ON} or {OFF}), else whether a file below is given",
    )
    for name, what in _FILES.items():
        variable = f"{_TLS}_{name.upper()}"
        parser.add_argument(
            f"--tls-{name}",
            metavar="FILE",
            default=os.environ.get(variable),
            help=f"{what}; default: ${variable}",
        )


def connect(options: argparse.Namespace) -> Client:
    """A client of the server that the flags name.

    Raises:
        InvalidRequest: a file for TLS cannot be used, or ``$LORAX_TLS`` is neither on nor off.
    """
    from lorax_serve.client import Client, Tls  # not for commands without a server

    ca, certificate, key = (
        Path(file).expanduser() if (file := getattr(options, f"tls_{name}")) else None
        for name in _FILES
    )
    wanted = _wanted(options.tls)
    if wanted is None:
        wanted = any((ca, certificate, key))
    tls = Tls(ca, certificate, key) if wanted else None
    return Client(options.server or _DEFAULT_SERVER, tls=tls, timeout=options.timeout)


def _wanted(flag: bool | None) -> bool | None:
    """What is said of TLS itself; None leaves it to whether there are files."""
    said = os.environ.get(_TLS)
    if flag is not None or not said:
        return flag
    if said not in (ON, OFF):
        raise InvalidRequest(f"{_TLS} must be {ON} or {OFF}, found {said!r}")
    return said == ON
