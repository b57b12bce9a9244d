"""The parent's side of a worker: it runs only while it is asked to do something."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.workloads import Request

__all__ = ["Child", "PeerFailed"]

# vLLM compiles when it starts; the first start on a machine is the longest.
_SECONDS = 1800.0


class PeerFailed(Exception):
    """A system cannot be measured; says why."""


class Child:
    """A worker process with all processes that it starts, stopped by SIGSTOP between commands.

    Attributes:
        versions: of the packages that matter, once it has answered.
    """

    def __init__(self, interpreter: str, module: str) -> None:
        self.versions: dict[str, str] = {}
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - close() closes it
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "VLLM_CPU_KVCACHE_SPACE": "2",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
        }
        # A group of its own, so that all of it can be stopped. If this process is killed, the
        # kernel ends the stopped group with SIGHUP.
        self._process = subprocess.Popen(
            [interpreter, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            process_group=0,
            env=environment,
        )
        self._signal(signal.SIGSTOP)

    def prepare(self, model: Path, adapters: Mapping[str, Path], batch: int, dtype: str) -> float:
        """Make it ready for these adapters and so many requests at once; returns the seconds."""
        paths = {name: str(path) for name, path in adapters.items()}
        settings = {"model": str(model), "adapters": paths, "batch": batch, "dtype": dtype}
        answer = self._ask({"do": "prepare", **settings})
        return float(answer["seconds"])

    def run(self, requests: Sequence[Request]) -> float:
        """Have it answer all requests at once; returns the seconds.

        Raises:
            PeerFailed: it died, took too long, or generated another number of tokens.
        """
        fields = ("prompt", "new_tokens", "adapter", "seed")
        work = [{name: asdict(request)[name] for name in fields} for request in requests]
        answer = self._ask({"do": "run", "requests": work})
        if answer["tokens"] != [request.new_tokens for request in requests]:
            raise PeerFailed(f"it generated {answer['tokens']} tokens")
        return float(answer["seconds"])

    def close(self) -> None:
        """Stop it, by force if it does not by itself."""
        with contextlib.suppress(OSError):
            self._signal(signal.SIGCONT)
            assert self._process.stdin is not None
            self._process.stdin.write('{"do": "quit"}\n')
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(30)
        with contextlib.suppress(OSError):  # also what it may have left behind
            self._signal(signal.SIGKILL)
        self._process.wait()
        self._log.close()

    def _ask(self, command: Mapping[str, Any]) -> dict[str, Any]:
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        out_of_time = threading.Timer(_SECONDS, process.kill)
        out_of_time.start()
        try:
            self._signal(signal.SIGCONT)
            process.stdin.write(json.dumps(command) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
            if not line:
                raise PeerFailed(self._last_words())
            self._signal(signal.SIGSTOP)
        except OSError as error:
            raise PeerFailed(self._last_words()) from error
        finally:
            out_of_time.cancel()
        answer: dict[str, Any] = json.loads(line)
        self.versions = answer["versions"]
        return answer

    def _signal(self, number: signal.Signals) -> None:
        os.killpg(self._process.pid, number)

    def _last_words(self) -> str:
        code = self._process.wait()
        self._log.seek(0)
        text = self._log.read()
        sys.stderr.write(text[-4000:])
        lines: Iterable[str] = filter(None, map(str.strip, reversed(text.splitlines())))
        return f"it ended with exit code {code}: {next(iter(lines), 'no reason given')}"
