from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lorax_serve.adapter import read
from lorax_serve.errors import TrainingError
from lorax_train.cli import main, parse
from lorax_train.config import DataConfig, OutputConfig, TrainConfig

Rows = list[dict[str, Any]]
WriteRows = Callable[..., Path]
NEEDED = ["--data", "rows.jsonl", "--out", "out"]


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOMP_SPINCOUNT", "1000")  # which main() would set for good


def test_defaults_need_only_data_and_a_place() -> None:
    config = TrainConfig(DataConfig(Path("rows.jsonl")), OutputConfig(Path("out")))
    assert parse(NEEDED) == config
    assert (config.model, config.lora.r, config.lora.lora_alpha) == ("smollm2-135m", 16, 32)


def test_alpha_follows_the_rank_unless_given() -> None:
    assert parse([*NEEDED, "--r", "4"]).lora.lora_alpha == 8
    assert parse([*NEEDED, "--r", "4", "--alpha", "2.5"]).lora.lora_alpha == 2.5


def test_each_flag_of_the_new_kinds_reaches_its_field() -> None:
    argv = ["--layers", "0,3-5, 4", "--dora", "--init", "pissa", "--loraplus-ratio", "16"]
    argv += ["--eval-split", "0.1", "--eval-every", "7", "--patience", "2", "--no-keep-best"]
    config = parse([*NEEDED, *argv, "--checkpointing"])
    assert (config.lora.layers, config.lora.dora, config.lora.init) == ((0, 3, 4, 5), True, "pissa")
    assert config.optimizer.loraplus_ratio == 16
    assert (config.loop.eval_every, config.loop.patience) == (7, 2)
    assert (config.loop.keep_best, config.loop.checkpointing) == (False, True)
    assert parse([*NEEDED, "--keep-best"]).loop.keep_best


def test_the_preset_is_the_ancestors_recipe_and_flags_win_over_it() -> None:
    config = parse([*NEEDED, "--preset", "elixir"])
    assert (config.lora.r, config.lora.lora_alpha, config.lora.dropout) == (2, 4, 0.05)
    assert (config.data.text_mode, config.data.window) == ("windows", 256)
    assert (config.loop.batch_size, config.loop.max_steps, config.loop.seed) == (2, 300, 1337)
    assert (config.lora.targets, config.lora.init) == ("qkv", "gaussian")
    assert (config.optimizer.name, config.optimizer.lr) == ("adam", 3e-4)
    assert (config.optimizer.weight_decay, config.optimizer.schedule) == (0.0, "constant")
    for argv in (["--preset", "elixir", "--r", "4"], ["--r", "4", "--preset", "elixir"]):
        config = parse([*NEEDED, *argv])
        assert (config.lora.r, config.lora.lora_alpha, config.lora.init) == (4, 8, "gaussian")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--r", "0"], "--r must be at least 1, not 0"),
        (["--r", "x"], "argument --r: invalid int value: 'x'"),
        (["--alpha", "0"], "--alpha must be a number above 0, not 0.0"),
        (["--dropout", "1"], "--dropout must be a number at least 0 and below 1, not 1.0"),
        (["--lr", "nan"], "--lr must be a number above 0, not nan"),
        (["--lr", "0"], "--lr must be a number above 0, not 0.0"),
        (["--weight-decay", "-1"], "--weight-decay must be a number at least 0, not -1.0"),
        (["--warmup-ratio", "1"], "--warmup-ratio must be a number at least 0 and below 1"),
        (["--max-grad-norm", "inf"], "--max-grad-norm must be a number at least 0, not inf"),
        (["--epochs", "0"], "--epochs must be at least 1"),
        (["--max-steps", "0"], "--max-steps must be at least 1"),
        (["--batch-size", "0"], "--batch-size must be at least 1"),
        (["--grad-accumulation", "0"], "--grad-accumulation must be at least 1"),
        (["--log-every", "0"], "--log-every must be at least 1"),
        (["--max-length", "1"], "--max-length must be at least 2"),
        (["--seed", "-1"], "--seed must be at least 0"),
        (["--seed", str(1 << 63)], "--seed must be below 2**63"),
        (["--eval-split", "1"], "--eval-split must be a number at least 0 and below 1"),
        (["--eval-split", "0.1", "--eval-data", "x"], "--eval-data and --eval-split exclude each"),
        (["--epochs", "2", "--max-steps", "5"], "not allowed with argument"),
        (["--init", "zeros"], "invalid choice: 'zeros'"),
        (["--preset", "erlang"], "invalid choice: 'erlang'"),
        (["--layers", "0,x"], "--layers '0,x': expected numbers and ranges"),
        (["--layers", "5-3"], "--layers '5-3': expected numbers and ranges"),
        (["--loraplus-ratio", "0"], "--loraplus-ratio must be a number above 0"),
        (["--eval-every", "0", "--eval-split", "0.1"], "--eval-every must be at least 1"),
        (["--eval-every", "5"], "--eval-every needs rows to evaluate on; give --eval-split or"),
        (["--patience", "2"], "--patience needs rows to evaluate on; give --eval-split or"),
        (["--nope"], "unrecognized arguments: --nope"),
        (["--model", "/nowhere"], "rows.jsonl cannot be read"),
    ],
)
def test_a_bad_flag_is_one_line_and_exit_code_2(
    argv: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*NEEDED, *argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("lorax-train: error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err


def test_what_is_needed_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "the following arguments are required: --data, --out" in capsys.readouterr().err


def test_a_model_that_is_not_there_is_named(
    write_rows: WriteRows, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = str(write_rows([{"text": "x"}]))
    argv = ["--model", "/nowhere", "--data", data, "--out", str(tmp_path / "out")]
    assert main(argv) == 2
    assert "lorax-train: error: model /nowhere: no such directory" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_is_refused(
    write_rows: WriteRows, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = str(write_rows([{"text": "x"}]))
    assert main(["--device", "cuda", "--data", data, "--out", str(tmp_path / "out")]) == 2
    assert "--device cuda: torch finds no CUDA device here" in capsys.readouterr().err


def test_values_from_python_are_checked_too() -> None:
    with pytest.raises(TrainingError, match="--device must be one of auto, cpu, cuda, not 'tpu'"):
        TrainConfig(
            DataConfig(Path("x")),
            OutputConfig(Path("y")),
            device="tpu",  # type: ignore[arg-type]
        )


def test_one_command_trains_and_says_how_to_serve(
    llama: Path,
    write_rows: WriteRows,
    pairs: Rows,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "adapters" / "squares"
    data = str(write_rows(pairs))
    argv = ["--model", str(llama), "--data", data, "--out", str(out), "--eval-split", "0.2"]
    argv += ["--preset", "elixir", "--epochs", "2", "--batch-size", "8", "--device", "cpu"]
    assert main(argv) == 0
    err = capsys.readouterr().err
    for line in (
        "adapter    rank 2, alpha 4, scale 2, on 6 modules: k_proj, q_proj, v_proj",
        "rows       13 to train on, 3 held out; ",
        "steps      4 of 8 rows (2 an epoch)",
        "what is in ⟦⟧ is read, the rest is learned:\n⟦",
        "memory     about ",
        "held-out loss ",
        "step 4/4  loss ",
        "done: 4 steps in ",
        f"  lorax-serve --model {llama} --adapters {out.parent}\n",
        '  lorax generate --adapter squares "PROMPT"\n',
    ):
        assert line in err
    assert [err.count(f"({when})") for when in ("before training", "epoch 1", "at the end")] == [
        1
    ] * 3
    assert read(out).config.r == 2
    assert json.loads((out / "adapter_config.json").read_text())["init_lora_weights"] == "gaussian"
    assert main(argv) == 0  # an adapter may be trained anew in its place


def test_the_module_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lorax_train", "--r", "0", *NEEDED],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (
        2,
        "lorax-train: error: --r must be at least 1, not 0\n",
    )
