"""Trainings in several processes, for tests: ``python -m tests.train.distributing``.

Importing torch and transformers takes seconds, so this is done once. Each line of stdin is a job,
JSON of the command line and the environment of each process; they are forked, meet as those of
torchrun do, and one line of JSON says how each ended and what it said. A process that takes a
minute is ended: it hangs.

A command line is that of ``lorax-train``; or ``configs`` and a pickle of lists of configs, which
are trained one after another by the same processes, and leave their ``Outcome``s beside it.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import signal
import socket
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch.distributed.tensor import DTensor

# Not used here, but by every child.
import lorax_train.model.sharding  # noqa: F401
from lorax_train.cli import main as lorax_train_main
from lorax_train.config import TrainConfig
from lorax_train.console import Console
from lorax_train.distributed import join_processes
from lorax_train.records.log import LOG_FILE
from lorax_train.run import TrainResult, train_all

_SECONDS = 60


@dataclass
class Outcome:
    """What a training has come to.

    Attributes:
        tensors: of each adapter.
        records: of each adapter, by the names of the figures.
        sharded: bytes of the base's parameters in pieces, in this process and in all of them.
        said: by this process.
    """

    tensors: list[dict[str, torch.Tensor]]
    records: list[dict[str, list[float]]]
    sharded: tuple[int, int]
    said: str


def outcome_of(results: Sequence[TrainResult], said: str = "") -> Outcome:
    parts: list[Any] = [p for p in results[0].model.parameters() if isinstance(p, DTensor)]
    return Outcome(
        [each.adapter.tensors(torch.float32) for each in results],
        [
            {
                "held out": each.record.eval_losses,
                "losses": [loss for loss, _ in each.record.recent],
                "targets": [n for _, n in each.record.recent],
                "tokens": [each.record.tokens],
                "margins": margins_in(each),
            }
            for each in results
        ],
        (sum(p.to_local().nbytes for p in parts), sum(4 * p.numel() for p in parts)),
        said,
    )


def margins_in(result: TrainResult) -> list[float]:
    assert result.directory is not None
    rows = map(json.loads, (result.directory / LOG_FILE).read_text().splitlines())
    return [row["reward_margin"] for row in rows if "reward_margin" in row]


def train_configs(path: Path) -> int:
    jobs: list[list[TrainConfig]] = pickle.loads(path.read_bytes())
    outcomes = []
    with join_processes() as processes:
        for configs in jobs:
            stream = io.StringIO()
            console = Console(stream) if processes.is_first else None
            results = train_all(configs, console, processes=processes)
            outcomes.append(vars(outcome_of(results, stream.getvalue())))
        path.with_name(f"{path.name}.{processes.rank}").write_bytes(pickle.dumps(outcomes))
    return 0


def child(arguments: list[str], environment: dict[str, str], said: int) -> NoReturn:
    os.environ.update(environment)
    signal.alarm(_SECONDS)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(said, stream.fileno())
    status = 1
    try:
        command, *rest = arguments
        status = train_configs(Path(rest[0])) if command == "configs" else lorax_train_main(rest)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def run(commands: list[list[str]], environment: dict[str, str]) -> list[tuple[int, str]]:
    """The status and output of each process."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    meeting = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(len(commands)),
    }
    children = []
    for rank, command in enumerate(commands):
        own = environment | meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        said = os.memfd_create("said")
        process = os.fork()
        if not process:
            child(command, own, said)
        children.append((process, said))
    found = []
    for process, said in children:
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        with os.fdopen(said, "rb") as file:
            file.seek(0)
            found.append((status, file.read().decode()))
    return found


def main() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        print(json.dumps(run(*json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
