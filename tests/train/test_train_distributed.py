"""Several processes learn what one learns, and end together however one of them ends."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import pytest
import torch
from safetensors.torch import load_file

from lorax_serve.errors import TrainingError
from lorax_train.checkpoints.alike import check_alike
from lorax_train.cli import main
from lorax_train.config import (
    DataConfig,
    InjectionConfig,
    LoopConfig,
    ObjectiveConfig,
    OptimizerConfig,
    OutputConfig,
    TrainConfig,
)
from lorax_train.console import Console
from lorax_train.data.encode import Example
from lorax_train.distributed import Processes
from lorax_train.loop.dealing import deal
from lorax_train.loop.training_run import TrainingRun
from lorax_train.model.base import load_model
from lorax_train.model.inject import inject
from lorax_train.run import train, train_all
from tests.train.distributing import Outcome, outcome_of

ROWS = [{"prompt": f"{'ab' * (i % 5)}{i}:", "completion": f" {i * i}"} for i in range(16)]
PAIRS = [
    {"prompt": f"{i}+{i % 3}=", "chosen": f" {i + i % 3}", "rejected": " " + "no" * (i % 4 + 1)}
    for i in range(10)
]


class Ended(NamedTuple):
    """How a process ended: its status, and what it said."""

    status: int
    said: str


class Start(Protocol):
    def __call__(self, *commands: Sequence[str], **environment: str) -> list[Ended]:
        """Run command lines together, each in a process of one training."""


@pytest.fixture(scope="module")
def start() -> Iterator[Start]:
    with subprocess.Popen(
        [sys.executable, "-m", "tests.train.distributing"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        to, back = server.stdin, server.stdout

        def run(*commands: Sequence[str], **environment: str) -> list[Ended]:
            print(json.dumps([commands, environment]), file=to, flush=True)
            return [Ended(*each) for each in json.loads(back.readline())]

        yield run
        to.close()


def rows_in(directory: Path, rows: list[dict[str, Any]], name: str = "rows.jsonl") -> Path:
    path = directory / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Cases:
    """Lists of configs by name, each in a directory of its own."""

    def __init__(self, root: Path, llama: Path, gpt2: Path) -> None:
        self.root, self.llama, self.gpt2 = root, llama, gpt2
        self.rows, self.pairs = rows_in(root, ROWS), rows_in(root, PAIRS, "pairs.jsonl")

    def all(self, processes: str) -> dict[str, list[TrainConfig]]:
        self.where = self.root / processes
        accumulation = LoopConfig(epochs=2, batch_size=3, grad_accumulation=2, eval_every=1)
        few = LoopConfig(max_steps=3, batch_size=1)
        dpo = ObjectiveConfig("dpo", beta=0.5)
        again = dataclasses.replace(few, checkpointing=True, batch_size=3)
        return {
            "accumulation": [self.config(accumulation)],
            "fewer rows than processes": [self.config(few)],
            "two adapters": self.two(),
            "preferences": [self.config(few, objective=dpo)],
            "gpt2": [self.config(few, InjectionConfig(r=2, dora=True), model=self.gpt2)],
            "resumed": [self.config(LoopConfig(max_steps=5, batch_size=4), name="resumed")],
            "in pieces": [self.config(accumulation, fsdp=True)],
            "in pieces, computed again": [self.config(again, fsdp=True)],
            "in pieces, two adapters": self.two(fsdp=True),
            "in pieces, preferences": [self.config(few, objective=dpo, fsdp=True)],
            "in pieces, gpt2": [
                self.config(
                    few, InjectionConfig(r=2, dora=True, init="pissa"), model=self.gpt2, fsdp=True
                )
            ],
        }

    def two(self, **parts: Any) -> list[TrainConfig]:
        return [
            self.config(
                LoopConfig(max_steps=2, batch_size=2, checkpointing=True), name="two-a", **parts
            ),
            self.config(
                LoopConfig(max_steps=4, batch_size=1, seed=1),
                InjectionConfig(r=2, layers=(1,)),
                name="two-b",
                **parts,
            ),
        ]

    def config(
        self,
        loop: LoopConfig,
        lora: InjectionConfig | None = None,
        *,
        model: Path | None = None,
        name: str = "",
        objective: ObjectiveConfig | None = None,
        fsdp: bool = False,
    ) -> TrainConfig:
        self.where = self.where.with_name(self.where.name + "+")  # another one each time
        cache = self.root / f"cache of {self.where.name}" if fsdp else None
        data = DataConfig(self.pairs if objective else self.rows, eval_split=0.25, cache=cache)
        resumed = name == "resumed"
        return TrainConfig(
            data,
            OutputConfig(
                self.root / "resumed" if resumed else self.where, resume=resumed, report=False
            ),
            model=str(model or self.llama),
            device="cpu",
            dtype="float32",
            # One process alone cannot have it in pieces.
            fsdp=fsdp and not self.where.name.startswith("one"),
            lora=lora or InjectionConfig(r=4),
            optimizer=OptimizerConfig(lr=1e-2),
            loop=loop,
            objective=objective or ObjectiveConfig(),
            name=name,
        )


class Stopping(Console):
    def __init__(self, after: int) -> None:
        super().__init__(io.StringIO())
        self.after = after

    def stepped(self, runs: Any) -> None:
        if runs[0].record.steps == self.after:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def outcomes(
    tmp_path_factory: pytest.TempPathFactory, llama: Path, gpt2: Path, start: Start
) -> tuple[dict[str, Outcome], list[dict[str, Outcome]]]:
    """Of one process, and of each of two."""
    root = tmp_path_factory.mktemp("distributed")
    cases = Cases(root, llama, gpt2)
    one = {
        name: outcome_of(train_all(configs, Console(io.StringIO())))
        for name, configs in cases.all("one").items()
    }
    two = cases.all("two")
    # What one process has begun, two go on with.
    (root / "resumed").rename(root / "whole")
    assert train(two["resumed"][0], Stopping(2)).record.steps == 2
    jobs = root / "jobs"
    jobs.write_bytes(pickle.dumps(list(two.values())))
    for ended in start(*[["configs", str(jobs)]] * 2):
        assert ended.status == 0, ended.said
    found = [pickle.loads((root / f"jobs.{rank}").read_bytes()) for rank in range(2)]
    return one, [
        {name: Outcome(**fields) for name, fields in zip(two, each, strict=True)} for each in found
    ]


@pytest.mark.parametrize(
    "name",
    [
        "accumulation",
        "fewer rows than processes",
        "two adapters",
        "preferences",
        "gpt2",
        "resumed",
        "in pieces",
        "in pieces, computed again",
        "in pieces, two adapters",
        "in pieces, preferences",
        "in pieces, gpt2",
    ],
)
def test_two_processes_learn_what_one_learns(name: str, outcomes: Any) -> None:
    alone, (first, second) = outcomes[0][name], (each[name] for each in outcomes[1])
    assert len(first.tensors) == len(alone.tensors)
    for ours, others, theirs in zip(first.tensors, second.tensors, alone.tensors, strict=True):
        assert ours.keys() == others.keys() == theirs.keys()
        for key, tensor in ours.items():
            assert torch.equal(tensor, others[key])
            torch.testing.assert_close(tensor, theirs[key], atol=2e-4, rtol=1e-3)
    for ours, theirs in zip(first.records, alone.records, strict=True):
        assert ours.keys() == theirs.keys()
        for key, figures in ours.items():
            assert figures == pytest.approx(theirs[key], rel=1e-4, abs=1e-5), key
    assert second.records == first.records
    assert first.said
    assert not second.said


def test_that_other_processes_go_on_is_said(outcomes: Any) -> None:
    said = outcomes[1][0]["resumed"].said
    assert "not with the same bits: processes was 1 and is 2" in said
    assert "resume     after step 2" in said
    assert "processes  2, which share the rows of each step" in said


def test_the_layers_of_a_base_in_pieces_are_shared_out(outcomes: Any) -> None:
    for name, first in outcomes[1][0].items():
        own = [each[name].sharded[0] for each in outcomes[1]]
        whole = first.sharded[1]
        assert bool(whole) == name.startswith("in pieces")
        assert sum(own) == whole
        assert max(own) <= 0.51 * whole
    said = outcomes[1][0]["in pieces"].said
    assert "sharded    the " in said
    assert "probe      " in said


TRICKS = """
import os, pathlib, resource, signal
import torch.nn.functional as F

calls = 0

def loss(logits, labels):
    global calls
    calls += 1
    trick, rank, at = (os.environ.get(name) for name in ("TRICK", "RANK", "AT"))
    if trick == "kill" and rank == at and calls == 15:
        os.kill(os.getpid(), signal.SIGKILL)
    if trick in ("term", "memory") and rank == "1" and calls == 6:
        raise MemoryError
    if trick == "term" and rank == "1" and calls == 15:
        os.kill(os.getppid(), signal.SIGTERM)
    if trick == "raise" and rank == at and calls == 9:
        raise ValueError("a loss that fails")
    if trick == "disk" and rank == "0" and calls == 9:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    return F.cross_entropy(logits, labels, reduction="none")
"""


@pytest.fixture
def tricked(tmp_path: Path, llama: Path) -> Callable[..., list[str]]:
    """A command line for a training with a loss that plays tricks."""
    (tmp_path / "tricks.py").write_text(TRICKS)
    rows = rows_in(tmp_path, ROWS)

    def command(out: str = "out", *more: str) -> list[str]:
        return [
            *("lorax_train", "--model", str(llama), "--data", str(rows)),
            *("--out", str(tmp_path / out)),
            *("--device", "cpu", "--dtype", "float32", "--lr", "1e-2", "--eval-split", "0.25"),
            *("--batch-size", "4", "--max-steps", "20", "--log-every", "1", "--no-report"),
            *("--loss", f"{tmp_path / 'tricks.py'}:loss", *more),
        ]

    return command


def weights_in(directory: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(directory / "adapter_model.safetensors")
    return found


def steps_of(directory: Path) -> list[int]:
    lines = map(json.loads, (directory / "log.jsonl").read_text().splitlines())
    return [line["step"] for line in lines if line["event"] == "step"]


def test_what_is_killed_or_terminated_goes_on_in_any_number_of_processes(
    tricked: Callable[..., list[str]], tmp_path: Path, start: Start
) -> None:
    flags = ("--save-every", "2", "--resume")
    first, second = start(*[tricked("out", *flags)] * 2, TRICK="kill", AT="1")
    assert (first.status, second.status) == (2, -signal.SIGKILL)
    assert first.said.count("lorax-train: error: process 0 of 2 has lost another one") == 1
    assert "Traceback" not in first.said
    before = steps_of(tmp_path / "out")[-1]
    assert 2 <= before < 20
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone")
    ended = subprocess.run(
        [*torchrun, "--nproc-per-node", "2", "-m", *tricked("out", *flags)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "TRICK": "term"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode != 0
    assert f"resume     after step {before - before % 2}" in ended.stderr
    assert ended.stderr.count("out of memory; going on with batches of 2 rows") == 1
    assert ended.stderr.count("interrupted; saved what there is:") == 1
    assert ended.stderr.count("--resume goes on from it") == 1
    assert before < steps_of(tmp_path / "out")[-1] < 20
    assert main(tricked("out", *flags)[1:]) == 0
    assert main(tricked("whole")[1:]) == 0
    theirs = weights_in(tmp_path / "whole")
    for key, tensor in weights_in(tmp_path / "out").items():
        torch.testing.assert_close(tensor, theirs[key], atol=2e-3, rtol=1e-2)


def test_that_the_first_process_was_killed_is_said_by_another(
    tricked: Callable[..., list[str]], start: Start
) -> None:
    first, second = start(*[tricked()] * 2, TRICK="kill", AT="0")
    assert (first.status, second.status) == (-signal.SIGKILL, 2)
    assert "lorax-train: error: process 1 of 2 has lost another one" in second.said


@pytest.mark.parametrize(("at", "flags"), [(0, ()), (1, ()), (1, ("--fsdp",))])
def test_an_error_of_one_process_ends_all_with_one_message(
    at: int,
    flags: tuple[str, ...],
    tricked: Callable[..., list[str]],
    tmp_path: Path,
    start: Start,
) -> None:
    ended = start(*[tricked("out", *flags)] * 2, TRICK="raise", AT=str(at))
    assert [ended[at].status, ended[1 - at].status] == [1, 2]
    assert "ValueError: a loss that fails" in ended[at].said
    assert "lorax-train: error" not in ended[1 - at].said
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_torchrun_ending_the_others_is_no_interruption(tricked: Callable[..., list[str]]) -> None:
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone")
    ended = subprocess.run(
        [*torchrun, "--nproc-per-node", "2", "-m", *tricked("out", "--lr", "1e30")],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode != 0
    assert ended.stderr.count("not a finite number") == 1
    assert ended.stderr.count("lorax-train: error:") == 1
    assert "interrupted" not in ended.stderr


def test_a_lack_of_memory_amid_pieces_ends_all(
    tricked: Callable[..., list[str]], start: Start
) -> None:
    first, second = start(*[tricked("out", "--fsdp")] * 2, TRICK="memory")
    assert (first.status, second.status) == (2, 2)
    assert "lorax-train: error: process 1 of 2: out of memory; lower --batch-size" in second.said
    assert "lorax-train: error" not in first.said


def test_a_full_disk_ends_all_with_one_message(
    tricked: Callable[..., list[str]], tmp_path: Path, start: Start
) -> None:
    first, second = start(*[tricked()] * 2, TRICK="disk")
    assert (first.status, second.status) == (2, 2)
    assert first.said.count("lorax-train: error:") == 1
    assert f"--out {tmp_path / 'out'} cannot be written" in first.said
    assert not second.said


def test_other_rows_in_another_process_are_refused(
    tricked: Callable[..., list[str]], tmp_path: Path, start: Start
) -> None:
    rows = rows_in(tmp_path, ROWS[:-1], "other.jsonl")
    ended = start(tricked(), tricked("out", "--data", str(rows)))
    assert [each.status for each in ended] == [2, 2]
    said = "".join(each.said for each in ended)
    assert said.count("lorax-train: error:") == 1
    assert "processes 0 and 1 are to train different things: --data has other rows" in said
    ended = start(tricked(), tricked("out", "--lr", "0.5"))
    said = "".join(each.said for each in ended)
    assert "different things: --lr is 0.01 and 0.5. Give all of them the same flags" in said
    ended = start(tricked("out", "--cache", str(tmp_path)), tricked("out", "--dry-run"))
    said = "".join(each.said for each in ended)
    assert "different things: --dry-run is False and True. Give all of them" in said


def test_processes_that_cannot_meet_are_told_what_is_wrong(
    tricked: Callable[..., list[str]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "localhost")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", "some")
    assert main(tricked()[1:]) == 2
    said = capsys.readouterr().err
    assert "the processes do not find each other (RANK=0, WORLD_SIZE=1, MASTER_ADDR=loc" in said
    assert "MASTER_PORT must be a free port" in said


def test_a_wrong_flag_is_said_once(tricked: Callable[..., list[str]], start: Start) -> None:
    first, second = start(*[tricked("out", "--epoch", "3")] * 2)
    assert (first.status, second.status) == (2, 2)
    assert first.said.count("lorax-train: error:") == 1
    assert not second.said


def test_one_process_of_torchrun_does_as_one_without(
    tricked: Callable[..., list[str]], tmp_path: Path, start: Start
) -> None:
    (done,) = start(tricked("torchrun", "--fsdp"))
    assert done.status == 0, done.said
    assert main(tricked("alone")[1:]) == 0
    theirs = weights_in(tmp_path / "alone")
    for key, tensor in weights_in(tmp_path / "torchrun").items():
        torch.testing.assert_close(tensor, theirs[key])


@pytest.mark.gpu
@pytest.mark.parametrize("flags", [(), ("--fsdp",), ("--fsdp", "--checkpointing")])
def test_cuda_learns_the_same_in_processes(
    flags: tuple[str, ...], tricked: Callable[..., list[str]], tmp_path: Path, start: Start
) -> None:
    processes = min(2, torch.cuda.device_count())
    ended = start(*[tricked("together", "--device", "cuda", *flags)] * processes)
    assert [each.status for each in ended] == [0] * processes, ended
    assert main(tricked("alone", "--device", "cuda")[1:]) == 0
    theirs = weights_in(tmp_path / "alone")
    for key, tensor in weights_in(tmp_path / "together").items():
        torch.testing.assert_close(tensor, theirs[key], atol=2e-3, rtol=1e-2)


def test_pieces_need_processes_and_a_dense_base(
    tricked: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(tricked("out", "--fsdp")[1:]) == 2
    assert "start them with torchrun" in capsys.readouterr().err
    assert main(tricked("out", "--fsdp", "--quantize", "int8")[1:]) == 2
    assert "--fsdp and --quantize exclude each other" in capsys.readouterr().err


def example(length: int) -> Example:
    return Example((3,) * length, (False,) + (True,) * (length - 1), f"row {length}")


def test_rows_are_dealt_by_their_tokens() -> None:
    step = [[example(n) for n in (2, 9, 3)], [example(n) for n in (4, 5)]]
    other = [[example(7)]]
    assert deal([step, other], 1) == [[step, other]]
    dealt = deal([step, other, [[]]], 2)
    lengths = [
        [[len(row.tokens) for batch in batches for row in batch] for batches in part]
        for part in dealt
    ]
    assert lengths == [[[9, 3], [], []], [[2, 4, 5], [7], []]]


def test_processes_that_come_apart_are_an_error(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model("tiny", llama, torch.float32, torch.device("cpu"))
    adapter = inject(model, InjectionConfig(r=2), "tiny", seed=0)
    run = TrainingRun(adapter, [example(5)], [], OptimizerConfig(), LoopConfig())
    processes = Processes()
    monkeypatch.setattr(processes, "world", 2)
    digests: list[str] = []

    def gather(value: str) -> list[str]:
        digests.append(value)
        return [digests[0], value]

    monkeypatch.setattr(processes, "gather", gather)
    check_alike(processes, [run])
    with torch.no_grad():
        run.parameters[-1][0, 0] += 1e-7
    with pytest.raises(TrainingError, match="process 1 has other values of A and B than process 0"):
        check_alike(processes, [run])


def test_a_process_alone_needs_nobody() -> None:
    processes = Processes()
    assert processes.agree(None, 2) is None
    assert processes.total([1.0, 2.0]) == [1.0, 2.0]
    assert processes.gather("x") == ["x"]
    assert processes.first(lambda: 3) == 3
    with pytest.raises(TrainingError), processes.machine_first(), processes.signals_held():
        raise TrainingError("as it is")
