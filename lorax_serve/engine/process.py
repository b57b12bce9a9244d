"""The engine's process: a thread reads commands, a thread reads adapters, the main one steps."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import signal
import socket
import sys
import threading

from lorax_serve.config import EngineConfig
from lorax_serve.engine.messages import (
    HEADER_BYTES,
    Command,
    Reply,
    StepReport,
    Stop,
    decode,
    encode,
)
from lorax_serve.errors import EngineFailed, LoraxError

__all__ = ["READY_CALL", "main"]

READY_CALL = 0
"""The call that an engine answers by itself when it is ready, with its ``ModelInfo``."""

log = logging.getLogger(__name__)


def main(config: EngineConfig, link: socket.socket) -> None:
    """Run an engine until it is told to stop or the other end of ``link`` goes away."""
    # A terminal's Ctrl-C and a service manager's SIGTERM reach the whole group; the server
    # decides when its engine ends, after the running requests.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    # While it reads an adapter, the loading thread must not hold up the steps for long.
    sys.setswitchinterval(0.0001)
    inbox: queue.SimpleQueue[object] = queue.SimpleQueue()
    threading.Thread(target=_read_commands, args=(link, inbox), daemon=True).start()
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the server is gone
        _serve(config, link, inbox)


def _serve(config: EngineConfig, link: socket.socket, inbox: queue.SimpleQueue[object]) -> None:
    # Read by the OpenMP runtime when torch loads it. A thread that waits for others soon
    # gives up its core: on cores that others use too, steps are a quarter to a third faster, and
    # no slower on idle ones (docs/performance.md).
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    try:
        import torch

        cores = len(os.sched_getaffinity(0)) // config.tensor_parallel
        torch.set_num_threads(config.threads or max(1, cores))
        from lorax_serve.engine.adapter_loader import AdapterLoader
        from lorax_serve.engine.engine import Engine
        from lorax_serve.model.runner import ModelRunner

        runner = ModelRunner(config)
        runner.warm_up()
    except LoraxError as error:
        _send(link, StepReport(replies=[Reply(READY_CALL, error=error)]))
        return
    except Exception as error:
        log.exception("the engine cannot start")
        failed = EngineFailed(f"the engine cannot start: {type(error).__name__}: {error}")
        _send(link, StepReport(replies=[Reply(READY_CALL, error=failed)]))
        return
    loader = AdapterLoader(
        runner.modules,
        runner.fold,
        runner.without_copies,
        inbox.put,
        probe=config.probe,
        fingerprint=runner.fingerprint,
    )
    engine = Engine(config, runner, loader)
    report = engine.take_report()
    report.replies.append(Reply(READY_CALL, runner.info))
    _send(link, report)
    while True:
        messages = _drain(inbox, wait=not engine.busy)
        for message in messages:
            if isinstance(message, Stop):
                runner.close()
                return
            engine.handle(message)  # type: ignore[arg-type]
        if engine.busy:
            engine.step()
        _send(link, engine.take_report())
        if runner.lost:  # the requests of the last step have been told
            runner.close()
            os._exit(1)  # not by way of NCCL, which would wait for the process that has failed


def _drain(inbox: queue.SimpleQueue[object], *, wait: bool) -> list[object]:
    messages = [inbox.get()] if wait else []
    with contextlib.suppress(queue.Empty):
        while True:
            messages.append(inbox.get_nowait())
    return messages


def _send(link: socket.socket, report: StepReport) -> None:
    link.sendall(encode(report))


def _read_commands(link: socket.socket, inbox: queue.SimpleQueue[object]) -> None:
    stream = link.makefile("rb")
    commands: list[Command]
    try:
        while header := stream.read(HEADER_BYTES):
            body = stream.read(int.from_bytes(header, "little"))
            commands = decode(body)  # type: ignore[assignment]
            for command in commands:
                inbox.put(command)
    finally:  # the server has gone, perhaps in the middle of a frame
        inbox.put(Stop())
