"""Trainings in several processes: ``python -m torch.distributed.run ... -m tests.train.distributing
JOBS``.

JOBS is a pickle of lists of configs, which are trained one after another by the same processes.
Each process leaves what it has come to in JOBS.RANK, a pickle of one ``Outcome``'s fields
for each list.
"""

from __future__ import annotations

import io
import json
import pickle
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from lorax_train.config import TrainConfig
from lorax_train.console import Console
from lorax_train.distributed import join_processes
from lorax_train.records.log import LOG_FILE
from lorax_train.run import TrainResult, train_all


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


def main() -> None:
    torch.set_num_threads(1)
    path = Path(sys.argv[1])
    jobs: list[list[TrainConfig]] = pickle.loads(path.read_bytes())
    outcomes = []
    with join_processes() as processes:
        for configs in jobs:
            stream = io.StringIO()
            console = Console(stream) if processes.is_first else None
            results = train_all(configs, console, processes=processes)
            outcomes.append(vars(outcome_of(results, stream.getvalue())))
        path.with_name(f"{path.name}.{processes.rank}").write_bytes(pickle.dumps(outcomes))


if __name__ == "__main__":
    main()
