"""An HTTP server that answers as a test tells it to, wrongly if need be."""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal


@dataclass
class Answer:
    """One answer.

    Attributes:
        headers: those that are empty are left out.
        announced: the Content-Length, None for the body's.
        then: what happens once the headers are out. "trickle" sends a byte at a time for ever,
            "flood" the body again and again, "cut" closes the connection after half of the body.
    """

    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    announced: int | None = None
    then: Literal["send", "hang", "trickle", "flood", "cut"] = "send"


Script = Callable[[str, str], "Answer | None"]
"""From a method and a path to an answer; None closes the connection without one."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exception(), OSError):  # a client that has hung up
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class RawServer:
    """Answers by ``script``; remembers what it was asked."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.stopping = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                outer._answer(self)

            do_HEAD = do_GET

            def log_message(self, *arguments: object) -> None:
                pass

        self._server = _Server(("127.0.0.1", 0), Handler)
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def close(self) -> None:
        self.stopping.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        self.requests.append((handler.command, handler.path, dict(handler.headers)))
        answer = self.script(handler.command, handler.path)
        if answer is None:
            handler.close_connection = True
            return
        announced = len(answer.body) if answer.announced is None else answer.announced
        handler.send_response(answer.status)
        for name, value in ({"Content-Length": str(announced)} | answer.headers).items():
            if value:
                handler.send_header(name, value)
        handler.end_headers()
        if handler.command == "HEAD":
            return
        try:
            self._send(handler, answer)
        except OSError:  # the client has hung up
            handler.close_connection = True

    def _send(self, handler: BaseHTTPRequestHandler, answer: Answer) -> None:
        if answer.then == "hang":
            self.stopping.wait()
        while answer.then == "trickle" and not self.stopping.wait(0.02):
            handler.wfile.write(b"x")
        while answer.then == "flood" and not self.stopping.is_set():
            handler.wfile.write(answer.body)
        if answer.then == "cut":
            handler.wfile.write(answer.body[: len(answer.body) // 2])
        if answer.then == "send":
            handler.wfile.write(answer.body)
        handler.close_connection = answer.then != "send" or answer.announced is not None


@contextmanager
def raw_server(script: Script) -> Iterator[RawServer]:
    server = RawServer(script)
    try:
        yield server
    finally:
        server.close()


def closed_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
