"""The entry point of the engine's process."""

from __future__ import annotations

import socket

from lorax_serve.config import EngineConfig

READY_CALL = 0


def main(config: EngineConfig, link: socket.socket) -> None:
    """Run an engine until it is told to stop or the other end of ``link`` goes away."""
    raise NotImplementedError
