"""Flags in a YAML file, sweeps, and the runs that compute nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorax_serve.adapter import read
from lorax_serve.errors import TrainingError
from lorax_train.cli import main, parse, read_command
from lorax_train.config import DataConfig, OutputConfig, TrainConfig, check_together
from lorax_train.run import train_all

Rows = list[dict[str, Any]]
WriteRows = Callable[..., Path]
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOMP_SPINCOUNT", "1000")  # which main() would set for good


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., list[str]]:
    """``config(text)``: the flags that name a file of it."""

    def write(text: str) -> list[str]:
        path = tmp_path / "train.yaml"
        path.write_text(text)
        return ["--config", str(path)]

    return write


NEEDED = "data: rows.jsonl\nout: out\n"


def test_a_file_is_flags_by_name(config: Callable[..., list[str]]) -> None:
    argv = ["--data", "rows.jsonl", "--out", "out", "--lr", "2e-4", "--batch-size", "3"]
    argv += ["--alpha", "5", "--rslora", "--targets", "q_proj,v_proj", "--eval-split", "0.5"]
    text = NEEDED + "lr: 2e-4\nbatch_size: 3\nalpha: 5\nrslora: true\neval-split: 0.5\n"
    assert parse(config(text + "targets: [q_proj, v_proj]\n")) == parse(argv)
    assert parse(config(text + "targets: q_proj,v_proj\nseed: null\n")) == parse(argv)


def test_switches_may_be_turned_either_way_and_layers_be_numbers(
    config: Callable[..., list[str]],
) -> None:
    argv = ["--data", "rows.jsonl", "--out", "out", "--layers", "1,3", "--no-report"]
    argv.append("--no-keep-best")
    for text in (
        "layers: [1, 3]\nreport: false\nkeep_best: false",
        "layers: 1,3\nno_report: true\nno_keep_best: true",
        "layers: ['1', 3-3]\nno-report: true\nkeep-best: false",
    ):
        assert parse(config(NEEDED + text)) == parse(argv)
    assert parse([*config(NEEDED + "report: false\nlayers: 1"), "--report"]).output.report


def test_flags_win_over_the_file_that_over_the_preset_and_that_over_defaults(
    config: Callable[..., list[str]],
) -> None:
    argv = config(NEEDED + "preset: elixir\nlr: 1e-3\nr: 5\nmodel: a\n")
    found = parse([*argv, "--r", "6", "--model", "b"])
    assert (found.lora.r, found.model) == (6, "b")
    assert found.optimizer.lr == 1e-3
    assert found.lora.init == "gaussian"
    assert found.optimizer.weight_decay == 0.0
    assert parse([*config(NEEDED + "r: 5\n"), "--preset", "elixir"]).lora.r == 5


@pytest.mark.parametrize(
    ("file", "flags", "expected"),
    [
        ("max_steps: 7", ["--epochs", "2"], (2, None)),
        ("epochs: 2", ["--max-steps", "7"], (3, 7)),
        ("preset: elixir", ["--epochs", "2"], (2, None)),
        ("preset: elixir\nepochs: 2", [], (2, None)),
    ],
)
def test_epochs_and_steps_put_each_other_aside(
    file: str, flags: list[str], expected: tuple[int, int | None], config: Callable[..., list[str]]
) -> None:
    loop = parse([*config(NEEDED + file), *flags]).loop
    assert (loop.epochs, loop.max_steps) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty; write flags into it"),
        ("[1]", "must be flags and their values, as lr: 2e-4, not a list"),
        ("lr: [", "train.yaml line 3: not valid YAML: "),
        ("a: &x [*x]", "not valid YAML|there is no flag a"),
        ("lr: !!python/object:os.system x", "not valid YAML: could not determine a constructor"),
        ("lr: 1\nr: 2\nlr: 3", "train.yaml line 5: lr is there twice"),
        ("batch_size: 1\nbatch-size: 1", "batch-size is there twice"),
        ("3: 1", "train.yaml line 3: a key must be the name of a flag"),
        ("learning_rate: 1", "there is no flag learning_rate"),
        ("batchsize: 1", "there is no flag batchsize; did you mean batch-size"),
        ("adapter: 1", r"there is no flag adapter; did you mean adapters"),
        ("config: x", "there is no flag config"),
        ("help: true", "there is no flag help"),
        ("r: 2.5", "r must be a whole number, not 2.5"),
        ("r: true", "r must be a whole number, not True"),
        ("lr: fast", "lr must be a number, not 'fast'"),
        ("rslora: 1", "rslora must be true or false, not 1"),
        ("no_report: 1", "no_report must be true or false, not 1"),
        ("report: true\nno_report: true", "no_report is there twice"),
        ("layers: [true]", "layers must be text, not"),
        ("objective: ppo", "objective must be one of sft, dpo, not 'ppo'"),
        ("objective: dpo\nloss: a:b", "--loss and --objective dpo exclude each other"),
        (
            "adapters: [{name: a}, {name: b, objective: dpo}]",
            "adapters: .* need one objective: a has --objective sft, b has --objective dpo",
        ),
        ("model: 1", "model must be text, not 1; put it in quotes"),
        ("init: zeros", "init must be one of kaiming, gaussian, pissa, not 'zeros'"),
        ("preset: erlang", "preset must be one of elixir, not 'erlang'"),
        ("r: 0", "--r must be at least 1"),
        ("epochs: 1\nmax_steps: 2", "--epochs and --max-steps exclude each other"),
        ("adapters: []", "adapters must be a list with an entry for each adapter"),
        ("adapters: [1]", r"adapters\[0\] must be flags and their values"),
        ("adapters: [{r: 1}]", r"adapters\[0\]: give it a name, or out"),
        (
            "adapters: [{name: a, model: b}]",
            r"adapters\[0\] \(a\): model is common to all adapters",
        ),
        ("adapters: [{name: a, quantize: nf4}]", r"\(a\): quantize is common to all adapters"),
        ("quantize: int4", "quantize must be one of none, nf4, int8, not 'int4'"),
        ("adapters: [{name: a, preset: elixir}]", r"\(a\): preset is common to all adapters"),
        ("adapters: [{name: a, rr: 1}]", r"adapters\[0\] \(a\): there is no flag rr"),
        ("adapters: [{name: a}, {name: b, r: 0}]", r"adapters\[1\] \(b\): --r must be at least 1"),
        ("adapters: [{name: a/b}]", r"adapters\[0\] \(a/b\): its name cannot be that of a dir"),
        ("adapters: [{name: a}, {name: a}]", "adapters: two adapters are named 'a'; rename one"),
        (
            "adapters: [{name: a, out: x}, {name: b, out: ./x}]",
            "adapters: b: --out x is that of a too; choose another",
        ),
    ],
)
def test_a_bad_file_is_refused_by_key(
    text: str, message: str, config: Callable[..., list[str]]
) -> None:
    with pytest.raises(TrainingError, match=message):
        read_command(config(text if not text or text[0] in "[" else NEEDED + text))


def test_a_file_that_is_not_there_or_not_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"--config .*none.yaml cannot be read: No such file"):
        read_command(["--config", str(tmp_path / "none.yaml")])
    (tmp_path / "bad.yaml").write_bytes(b"lr: \xff")
    with pytest.raises(TrainingError, match=r"--config .*bad.yaml.* not valid YAML"):
        read_command(["--config", str(tmp_path / "bad.yaml")])


def test_a_sweeps_entries_differ_in_any_key_of_an_adapter(
    config: Callable[..., list[str]],
) -> None:
    text = """
    model: m
    data: rows.jsonl
    out: sweep
    lr: 1e-3
    max_steps: 5
    adapters:
      - {name: small, r: 2}
      - {name: other, data: other.jsonl, lr: 1e-4, epochs: 2, schedule: linear, seed: 3}
      - {out: elsewhere/named}
    """
    small, other, named = read_command(config(text)).configs
    assert [c.name for c in (small, other, named)] == ["small", "other", "named"]
    assert [str(c.output.directory) for c in (small, other, named)] == [
        *("sweep/small", "sweep/other", "elsewhere/named"),
    ]
    assert {c.model for c in (small, other, named)} == {"m"}
    assert (small.lora.r, other.lora.r) == (2, 16)
    assert (small.optimizer.lr, other.optimizer.lr) == (1e-3, 1e-4)
    assert (small.loop.max_steps, other.loop.max_steps, other.loop.epochs) == (5, None, 2)
    assert (str(other.data.train), other.optimizer.schedule, other.loop.seed) == (
        *("other.jsonl", "linear", 3),
    )
    moved = read_command([*config(text), "--out", "x", "--lr", "1"]).configs
    assert [str(c.output.directory) for c in moved] == ["x/small", "x/other", "x/named"]
    assert {c.optimizer.lr for c in moved} == {1.0}


@pytest.mark.parametrize(
    "argv",
    [
        ["--data", "rows.jsonl", "--out", "out"],
        ["--data", "a b.txt", "--out", "out", "--preset", "elixir", "--rslora", "--alpha", "2.5"],
        ["--data", "x", "--out", "yes", "--name", "1", "--eval-data", "null", "--targets", "[a]"],
        ["--data", "x", "--out", "y", "--layers", "0,3-5", "--no-keep-best", "--no-report"],
        ["--data", "x", "--out", "y", "--layers", "2", "--loss", "a.py:b", "--tensorboard", "t"],
        ["--data", "x", "--out", "y", "--objective", "dpo", "--beta", "0.3", "--portable"],
        ["--data", "rows.jsonl", "--out", "out", "--quantize", "nf4"],
        ["--config", str(ROOT / "examples" / "sweep.yaml")],
        ["--config", str(ROOT / "examples" / "sweep.yaml"), "--preset", "elixir", "--r", "3"],
    ],
)
def test_a_printed_config_says_the_same(
    argv: list[str], config: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*argv, "--print-config"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert read_command(config(printed.out)).configs == read_command(argv).configs


def test_a_dry_run_does_everything_but_train(
    llama: Path,
    write_rows: WriteRows,
    pairs: Rows,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    argv = ["--model", str(llama), "--data", str(write_rows(pairs)), "--out", str(out)]
    assert main([*argv, "--device", "cpu", "--dry-run"]) == 0
    err = capsys.readouterr().err
    for line in (
        "rows       16 to train on",
        "steps      6 of 8",
        "memory     about",
        "dry run: no",
    ):
        assert line in err
    assert "step 1/" not in err
    assert not out.exists()
    board = tmp_path / "board"
    assert main([*argv, "--dry-run", "--eval-split", "0.2", "--tensorboard", str(board)]) == 0
    assert not out.exists()
    assert not board.exists()
    assert main([*argv, "--dry-run", "--targets", "nope"]) == 2


def test_a_sweep_trains_each_adapter_as_it_would_be_alone(
    llama: Path,
    write_rows: WriteRows,
    pairs: Rows,
    tmp_path: Path,
    config: Callable[..., list[str]],
) -> None:
    first, second = write_rows(pairs), write_rows(pairs[:7], "second.jsonl")
    out = tmp_path / "sweep"
    common = f"model: {llama}\ndevice: cpu\ndtype: float32\nlr: 1e-2\nmax_steps: 3\nbatch_size: 4\n"
    entries = [f"{{name: a, data: {first}, r: 2}}", f"{{name: b, data: {second}, seed: 5}}"]
    assert main(config(f"{common}out: {out}\nadapters: [{', '.join(entries)}]\n")) == 0
    for name, data, flags in (("a", first, ["--r", "2"]), ("b", second, ["--seed", "5"])):
        alone = tmp_path / f"{name} alone"
        argv = [*config(common), "--data", str(data), "--out", str(alone), *flags]
        assert main(argv) == 0
        ours, theirs = read(out / name).tensors, read(alone).tensors
        assert ours.keys() == theirs.keys()
        for key, tensor in ours.items():
            assert (tensor - theirs[key]).abs().max() < 1e-4


def test_what_is_wrong_with_a_sweeps_data_names_the_adapter(
    llama: Path,
    write_rows: WriteRows,
    pairs: Rows,
    config: Callable[..., list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    good, bad = write_rows(pairs), write_rows([{"text": 1}], "bad.jsonl")
    for data, message in (
        (bad, "bad.jsonl line 1: text must be a string"),
        (tmp_path / "none.jsonl", "none.jsonl cannot be read"),
    ):
        entries = f"[{{name: a, data: {good}}}, {{name: b, data: {data}}}]"
        text = f"model: {llama}\nout: {tmp_path / 'sweep'}\nadapters: {entries}\n"
        assert main(config(text)) == 2
        err = capsys.readouterr().err
        assert f"lorax-train: error: b: {tmp_path}" in err
        assert message in err
    assert not (tmp_path / "sweep").exists()


def test_adapters_for_unlike_models_are_not_trained_at_once() -> None:
    def make(name: str, **fields: Any) -> TrainConfig:
        return TrainConfig(DataConfig(Path("x")), OutputConfig(Path(name)), name=name, **fields)

    check_together([make("a"), make("b")])
    unlike = ({"model": "m"}, {"device": "cpu"}, {"dtype": "float32"}, {"quantize": "int8"})
    for fields in unlike:
        field = next(iter(fields))
        with pytest.raises(TrainingError, match=f"b: {field} must be the same for all adapters"):
            train_all([make("a"), make("b", **fields)])


def test_the_example_names_data_that_is_there() -> None:
    configs = read_command(["--config", str(ROOT / "examples" / "sweep.yaml")]).configs
    assert [c.name for c in configs] == ["triage", "dates"]
    for each in configs:
        assert each.data.eval_file is not None
        for path in (each.data.train, each.data.eval_file):
            assert (ROOT / path).is_file()
