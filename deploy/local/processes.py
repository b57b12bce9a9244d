"""Child processes, each with a log of its own, that end with whoever started them."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

__all__ = ["Process", "free_port", "wait_until"]

_STOP_SECONDS = 40.0


class Process:
    """A process in a group of its own, which is all that is signalled.

    Args:
        name: of its log, ``name.log``.
        command: and its arguments.
        logs: directory of the log, which is appended to.
        env: variables beside this process's own.
    """

    def __init__(
        self, name: str, command: Sequence[str], logs: Path, env: Mapping[str, str] | None = None
    ) -> None:
        self.name = name
        self.log = logs / f"{name}.log"
        self._command = list(command)
        self._env = {**os.environ, **(env or {})}
        self._child: subprocess.Popen[bytes] | None = None

    @property
    def running(self) -> bool:
        """Whether it has been started, and has not ended."""
        return self._child is not None and self._child.poll() is None

    def start(self) -> None:
        """Start it, again if it has ended."""
        assert not self.running, self.name
        with self.log.open("ab") as log:
            self._child = subprocess.Popen(
                self._command, stdout=log, stderr=log, env=self._env, start_new_session=True
            )

    def stop(self) -> int:
        """Ask it to end (SIGTERM), and wait for that; returns its exit code."""
        child = self._child
        assert child is not None, self.name
        if child.poll() is None:
            child.send_signal(signal.SIGTERM)
        try:
            return child.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        finally:
            self.kill()

    def kill(self) -> None:
        """End it, and what it has started, without asking (SIGKILL)."""
        if self._child is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._child.pid, signal.SIGKILL)
            self._child.wait()

    def tail(self, lines: int = 20) -> str:
        """The end of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


def wait_until(ready: Callable[[], bool], process: Process, seconds: float = 120.0) -> None:
    """Wait for ``ready``, which needs ``process``.

    Raises:
        RuntimeError: the process ended, or time did; with the end of its log.
    """
    end = time.monotonic() + seconds
    while not ready():
        if not process.running or time.monotonic() > end:
            what = "is not ready" if process.running else "has ended"
            raise RuntimeError(f"{process.name} {what}:\n{process.tail()}")
        time.sleep(0.05)


def free_port(*hosts: str) -> int:
    """A port that is free at all these addresses of this machine."""
    while True:
        with contextlib.ExitStack() as stack:
            first, *others = [stack.enter_context(socket.socket()) for _ in hosts]
            first.bind((hosts[0], 0))
            port = int(first.getsockname()[1])
            try:
                for other, host in zip(others, hosts[1:], strict=True):
                    other.bind((host, port))
            except OSError:
                continue
            return port
