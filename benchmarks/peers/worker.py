"""A system in a process of its own, driven by lines of JSON. Standard library only.

Commands come on stdin, one answer to each goes to stdout: ``prepare`` (model, adapters, batch,
dtype), ``run`` (requests), ``quit``. What libraries print goes to stderr instead.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any, Protocol

__all__ = ["TEMPERATURE", "TOP_P", "Backend", "Requests", "serve"]

TEMPERATURE = 0.8
TOP_P = 0.8

Requests = list[dict[str, Any]]
"""Of each: ``prompt`` (token ids), ``new_tokens``, ``adapter`` (a name or None), ``seed``."""


class Backend(Protocol):
    """One system. All sample with ``TEMPERATURE`` and ``TOP_P``, and ignore the end of text."""

    @property
    def packages(self) -> tuple[str, ...]:
        """Whose versions the result names."""

    def prepare(self, model: str, adapters: dict[str, str], batch: int, dtype: str) -> None:
        """Forget what was there; be ready for that many requests at once with these adapters.

        ``dtype`` is "bfloat16" or "float32"; "auto" is for lorax, which then chooses.
        """

    def run(self, requests: Requests) -> list[int]:
        """Answer all requests; returns the numbers of generated tokens."""

    def close(self) -> None:
        """Free everything."""


def serve(backend: Backend) -> None:
    """Obey stdin until ``quit`` or its end."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        command = json.loads(line)
        what = command.pop("do")
        if what == "quit":
            break
        started = time.perf_counter()
        tokens: list[int] = []
        if what == "run":
            tokens = backend.run(**command)
        else:
            backend.prepare(**command)
        seconds = time.perf_counter() - started
        answer = {"seconds": seconds, "tokens": tokens, "versions": _versions(backend.packages)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    backend.close()


def _versions(packages: tuple[str, ...]) -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in packages}
