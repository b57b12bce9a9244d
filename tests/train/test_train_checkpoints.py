"""Checkpoints: what is kept, what is skipped, what is refused, and disks that are full."""

from __future__ import annotations

import dataclasses
import errno
import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lorax_serve.adapter import read
from lorax_serve.errors import TrainingError
from lorax_train.checkpoints.files import (
    Checkpoint,
    Damaged,
    list_checkpoints,
    read_checkpoint,
    write_checkpoint,
)
from lorax_train.checkpoints.identity import identity
from lorax_train.cli import main, parse
from lorax_train.config import (
    DataConfig,
    InjectionConfig,
    LoopConfig,
    OptimizerConfig,
    OutputConfig,
    TrainConfig,
)
from lorax_train.console import Console
from lorax_train.run import TrainResult, train

Rows = list[dict[str, Any]]
Configure = Callable[..., TrainConfig]
WriteRows = Callable[..., Path]
Run = Callable[..., tuple[TrainResult, str]]


@pytest.fixture
def run(llama: Path, configure: Configure, write_rows: WriteRows, pairs: Rows) -> Run:
    """``run(steps=..., every=..., **output)``: train and return what was said."""
    data = write_rows(pairs)

    def train_it(
        steps: int = 6, every: int | None = 2, *, console: Console | None = None, **output: Any
    ) -> tuple[TrainResult, str]:
        config = configure(
            llama, data, loop=LoopConfig(max_steps=steps, batch_size=4, save_every=every)
        )
        output = {"directory": config.output.directory} | output
        stream = io.StringIO()
        config = dataclasses.replace(config, output=OutputConfig(**output))
        result = train(config, console or Console(stream))
        return result, stream.getvalue()

    return train_it


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


RECORDS = ("README.md", "log.jsonl", "loss.png", "report.html")
"""They tell of times, which no two runs share."""


def steps_in(out: Path) -> list[int]:
    return [step for step, _ in list_checkpoints(out / "checkpoints")]


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name not in RECORDS
    }


def test_the_newest_are_kept_and_no_code_is_in_them(run: Run, out: Path) -> None:
    run(steps=7)
    assert steps_in(out) == [6, 7]
    assert {path.suffix for path in (out / "checkpoints").rglob("*") if path.is_file()} == {
        ".json",
        ".safetensors",
        "",
    }
    sums = out / "checkpoints" / "step-7" / "SHA256SUMS"
    assert [line.split()[1] for line in sums.read_text().splitlines()] == [
        "state.json",
        "adapter-0.safetensors",
    ]
    run(steps=7, every=1, keep_checkpoints=4, overwrite=True)
    assert steps_in(out) == [4, 5, 6, 7]


def test_checkpoints_from_before_a_setting_existed_can_be_gone_on_from(
    run: Run, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def earlier(*args: Any) -> dict[str, Any]:
        found = identity(*args)
        del found["--compile"]
        return found

    with monkeypatch.context() as patched:
        patched.setattr("lorax_train.checkpoints.checkpoint.identity", earlier)
        run(steps=6)
    shutil.rmtree(out / "checkpoints" / "step-6")
    _, said = run(steps=6, resume=True)
    assert "resume     after step 4" in said


def test_without_the_flag_there_are_none(run: Run, out: Path) -> None:
    run(every=None)
    assert not (out / "checkpoints").exists()


def test_what_would_lose_a_checkpoint_is_refused(run: Run, out: Path) -> None:
    run()
    before = contents(out)
    with pytest.raises(TrainingError, match=r"of step 6; add --resume .*--overwr"):
        run()
    assert contents(out) == before


def test_to_begin_anew_is_said_and_ends_with_checkpoints_of_its_own(run: Run, out: Path) -> None:
    result, said = run(resume=True)
    assert "no checkpoint in" in said
    assert result.record.steps == 6
    run(steps=5, every=None, overwrite=True)
    assert steps_in(out) == [5]  # and no longer those of another training


def test_a_checkpoint_can_be_named(run: Run, out: Path, tmp_path: Path) -> None:
    run()
    for where in (out, out / "checkpoints", out / "checkpoints" / "step-4"):
        elsewhere = tmp_path / f"from {where.name}"
        result, said = run(resume=where, directory=elsewhere)
        assert result.record.steps == 6
        assert ("after step 4" in said) == (where.name == "step-4")
        assert steps_in(elsewhere) == [6]
    for where in (tmp_path, out / "checkpoints" / "step-2"):
        with pytest.raises(TrainingError, match=f"--resume {where}: there is no checkpoint"):
            run(resume=where)
    (out / "checkpoints" / "step-4" / "state.json").unlink()
    with pytest.raises(TrainingError, match="step-4: no checkpoint there is whole"):
        run(resume=out / "checkpoints" / "step-4")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"optimizer": OptimizerConfig(lr=0.5)}, "--lr was 0.01 and is 0.5"),
        ({"optimizer": OptimizerConfig(name="adam", lr=0.01)}, "--optimizer was adamw and is adam"),
        ({"lora": InjectionConfig(r=3)}, "--r was 16 and is 3"),
        ({"lora": InjectionConfig(alpha=3)}, "--alpha was not given and is 3"),
        ({"loop": LoopConfig(max_steps=5, batch_size=4)}, "--max-steps was 4 and is 5"),
        ({"loop": LoopConfig(max_steps=4, batch_size=4, seed=1)}, "--seed was 0 and is 1"),
        (
            {"loop": LoopConfig(max_steps=4, batch_size=3)},
            "--batch-size x --grad-accumulation was 4 and is 3",
        ),
        ({"quantize": "int8"}, "--quantize was none and is int8"),
        ({"dtype": "bfloat16"}, "--dtype was float32 and is bfloat16"),
        ({"data": "other"}, "--data has other rows"),
        ({"data": "held out"}, r"other rows are held out \(--eval-data, --eval-split\)"),
        ({"model": "gpt2"}, "--model has other weights"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_another_training_is_refused_by_what_has_changed(
    change: dict[str, Any],
    said: str,
    llama: Path,
    gpt2: Path,
    configure: Configure,
    write_rows: WriteRows,
    pairs: Rows,
    out: Path,
) -> None:
    data, held_out = write_rows(pairs), write_rows(pairs[:2], "held-out.jsonl")
    loop = LoopConfig(max_steps=4, batch_size=4, save_every=2)
    output = OutputConfig(out, resume=True)
    config = configure(llama, DataConfig(data, eval_file=held_out), loop=loop, output=output)
    train(config, Console(io.StringIO()))
    before = contents(out)
    match change.get("data"):
        case "other":
            write_rows([*pairs[:-1], {"prompt": "15:", "completion": "no"}])
            change = {}
        case "held out":
            write_rows(pairs[1:3], "held-out.jsonl")
            change = {}
    if "model" in change:
        change = {"model": str(gpt2)}
    with pytest.raises(TrainingError, match=f"step-4 is of another training: .*{said}") as caught:
        train(dataclasses.replace(config, **change), Console(io.StringIO()))
    assert "--overwrite to begin anew" in str(caught.value)
    assert contents(out) == before


def test_what_does_not_matter_may_change(
    llama: Path, configure: Configure, write_rows: WriteRows, pairs: Rows, tmp_path: Path
) -> None:
    class Stop(Console):
        def stepped(self, runs: Any) -> None:
            raise KeyboardInterrupt

    def one(console: Console, data: Path, **loop: Any) -> TrainResult:
        output = OutputConfig(tmp_path / "out", resume=True, save_dtype="bfloat16")
        config = configure(llama, data, loop=LoopConfig(max_steps=4, **loop), output=output)
        return train(config, console)

    one(Stop(io.StringIO()), write_rows(pairs), batch_size=4)
    stream = io.StringIO()
    moved = write_rows(pairs, "moved.jsonl")
    again = one(
        Console(stream), moved, batch_size=2, grad_accumulation=2, log_every=1, save_every=3
    )
    assert again.record.steps == 4
    assert "after step 1" in stream.getvalue()


@pytest.mark.parametrize("name", ["state.json", "adapter-0.safetensors", "SHA256SUMS"])
@pytest.mark.parametrize("how", ["cut short", "empty", "flipped", "missing"])
def test_a_damaged_checkpoint_is_skipped_with_a_warning(
    name: str, how: str, run: Run, out: Path
) -> None:
    expected = contents(run()[0].directory or out)
    file = out / "checkpoints" / "step-6" / name
    data = bytearray(file.read_bytes())
    if how == "missing":
        file.unlink()
    else:
        data[len(data) // 2] ^= 1
        damaged = {"cut short": bytes(data[:-1]), "empty": b"", "flipped": bytes(data)}
        file.write_bytes(damaged[how])
    result, said = run(resume=True)
    assert "step-6 is damaged and left out" in said
    assert "after step 4" in said
    assert result.record.steps == 6
    ours = contents(out)
    assert {key: ours[key] for key in ours if key.startswith("adapter")} == {
        key: expected[key] for key in expected if key.startswith("adapter")
    }
    assert steps_in(out) == [4, 6]
    read_checkpoint(out / "checkpoints" / "step-6")


def test_no_bit_of_a_checkpoint_can_be_flipped_unnoticed(tmp_path: Path) -> None:
    tensors = [{"a": torch.arange(3.0)}, {"b": torch.zeros(1)}]
    path = write_checkpoint(tmp_path, 1, Checkpoint({"x": [0.1]}, tensors))
    found = read_checkpoint(path)
    assert found.state == {"x": [0.1], "adapters": 2}
    assert torch.equal(found.tensors[0]["a"], tensors[0]["a"])
    for file in path.iterdir():
        whole = file.read_bytes()
        for place in range(len(whole)):
            for bit in (0, 5, 7):
                data = bytearray(whole)
                data[place] ^= 1 << bit
                file.write_bytes(data)
                with pytest.raises(Damaged):
                    read_checkpoint(path)
        for length in range(len(whole)):
            file.write_bytes(whole[:length])
            with pytest.raises(Damaged):
                read_checkpoint(path)
        file.write_bytes(whole)
    read_checkpoint(path)


def test_if_all_are_damaged_it_begins_anew(run: Run, out: Path) -> None:
    run()
    for _, path in list_checkpoints(out / "checkpoints"):
        (path / "state.json").write_bytes(b"{}")
    result, said = run(resume=True)
    assert said.count("is damaged and left out") == 2
    assert "beginning anew" in said
    assert result.record.steps == 6


class FullAt:
    """A disk on which the calls of these numbers fail, of those that may need space."""

    def __init__(self, patch: pytest.MonkeyPatch, numbers: range) -> None:
        self.numbers, self.count, self.below = numbers, 0, ""
        for where, name in ((os, "fsync"), (Path, "replace"), (Path, "mkdir"), (Path, "open")):
            patch.setattr(where, name, self.wrap(getattr(where, name)))

    def wrap(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            reading = real.__name__ == "open" and "w" not in "".join(map(str, args[1:]))
            if not reading:
                self.count += 1
                if self.count in self.numbers:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*args, **options)

        return call


def test_a_disk_that_is_full_at_any_write_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    def checkpoint(value: float) -> Checkpoint:
        return Checkpoint({}, [{"a": torch.full((3,), value)}])

    for number in range(1, 100):
        root = tmp_path / str(number)
        write_checkpoint(root, 1, checkpoint(1.0))
        write_checkpoint(root, 2, checkpoint(2.0))
        with pytest.MonkeyPatch.context() as patch:
            disk = FullAt(patch, range(number, number + 1))
            failures = 0
            for step, value in ((2, 3.0), (4, 4.0)):
                try:
                    write_checkpoint(root, step, checkpoint(value))
                except OSError:
                    failures += 1
        assert read_checkpoint(root / "step-1").tensors[0]["a"][0] == 1
        assert read_checkpoint(root / "step-2").tensors[0]["a"][0] in (2, 3)
        assert failures == (disk.count >= number)
        for _, path in list_checkpoints(root):
            read_checkpoint(path)
        if not failures:
            assert number > 15
            return
    pytest.fail("no write was the last")


@pytest.mark.parametrize("stride", [9, pytest.param(1, marks=pytest.mark.slow)])
def test_on_a_full_disk_the_training_goes_on_and_what_was_there_stays_whole(
    stride: int, run: Run, out: Path
) -> None:
    run(steps=2, every=1)
    adapter = read(out)
    shutil.copytree(out, out.with_name("kept"))
    for number in range(1, 200, stride):
        shutil.rmtree(out)
        shutil.copytree(out.with_name("kept"), out)
        stream = io.StringIO()
        with pytest.MonkeyPatch.context() as patch:
            disk = FullAt(patch, range(number, 1 << 30))  # and it stays full
            error = None
            try:
                run(steps=4, every=2, overwrite=True, console=Console(stream))
            except TrainingError as caught:
                error = str(caught)
        files = read(out)  # whole, whichever it is
        assert list_checkpoints(out / "checkpoints")
        for _, path in list_checkpoints(out / "checkpoints"):
            read_checkpoint(path)
        if disk.count < number:
            assert error is None
            assert files.metadata["steps"] == "4"
            return
        if error is None:
            assert "warning" in stream.getvalue()
        elif "the tokens of the data cannot be written" not in error:  # before anything else is
            assert "No space left on device; an adapter that was there before is still" in error
            assert "Make room" in error
            assert files.digest == adapter.digest or files.metadata["steps"] == "4"
        if number == 1 and error is None:
            assert "no checkpoint of step 2" in stream.getvalue()
            assert "make room there, the training goes on" in stream.getvalue()
    pytest.fail("no write was the last")


def test_what_a_killed_process_left_is_taken_away(run: Run, out: Path) -> None:
    run()
    for name in (".step-8.new", ".step-2.old"):
        (out / "checkpoints" / name).mkdir()
        (out / "checkpoints" / name / "state.json").write_text("{")
    (out / ".adapter_model.safetensors.123.tmp").write_text("x")
    run(resume=True)
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step-4", "step-6"]
    assert not list(out.glob(".*"))


def test_a_checkpoint_of_another_format_names_who_wrote_it(
    run: Run, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorax_train.checkpoints.checkpoint._FORMAT", 0)
    run()
    monkeypatch.undo()
    with pytest.raises(TrainingError, match=r"step-6 was written by lorax-train \d.*another form"):
        run(resume=True)


def test_what_changes_the_order_of_additions_is_warned_of(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    _, said = run(resume=True)
    assert "not with the same bits: threads was 1 and is 2" in said


def test_the_flags() -> None:
    base = ["--data", "d", "--out", "o"]
    assert parse(base).output.resume is False
    assert parse([*base, "--resume"]).output.resume is True
    assert parse(["--resume", "there", *base]).output.resume == Path("there")
    config = parse([*base, "--save-every", "5", "--keep-checkpoints", "3"])
    assert (config.loop.save_every, config.output.keep_checkpoints) == (5, 3)
    for flag in ("--save-every", "--keep-checkpoints"):
        with pytest.raises(TrainingError, match=f"{flag} must be at least 1, not 0"):
            parse([*base, flag, "0"])


def test_the_command_goes_on_and_says_when_it_is_done(
    llama: Path, write_rows: WriteRows, pairs: Rows, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--model", str(llama), "--data", str(write_rows(pairs)), "--out", str(out)]
    argv += ["--max-steps", "3", "--save-every", "2", "--device", "cpu", "--dtype", "float32"]
    assert main(argv) == 0
    before = contents(out)
    assert main([*argv, "--resume"]) == 0
    assert "done already, after step 3" in capsys.readouterr().err
    assert contents(out) == before
    assert main(argv) == 2
    assert "add --resume" in capsys.readouterr().err


def test_files_are_synced_before_they_get_their_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[int] = set()
    real_sync, real_replace = os.fsync, Path.replace

    def fsync(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)
        real_sync(descriptor)

    def replace(self: Path, target: Path) -> Path:
        assert {self.stat().st_ino, *(each.stat().st_ino for each in self.iterdir())} <= synced
        return real_replace(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    write_checkpoint(tmp_path, 1, Checkpoint({}, [{"a": torch.zeros(2)}]))
    assert tmp_path.stat().st_ino in synced
