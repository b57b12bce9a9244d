from __future__ import annotations

import importlib.util
import io
import json
import math
import sys
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open

from lorax_serve.errors import TrainingError
from lorax_train import memory
from lorax_train.adapters.export import model_card
from lorax_train.cli import parse
from lorax_train.config import DataConfig, LoopConfig, ObjectiveConfig, OutputConfig, TrainConfig
from lorax_train.console import Console
from lorax_train.data.encode import Example
from lorax_train.loop.training_run import Evaluation, TrainingRun
from lorax_train.records.curves import smoothed, to_png, to_svg
from lorax_train.records.files import write_whole
from lorax_train.records.log import Curves, JsonLog, read_curves
from lorax_train.records.page import Report, render_page
from lorax_train.records.summary import Summary, hub_id
from lorax_train.run import TrainResult, train, train_all

Rows = list[dict[str, Any]]
WriteRows = Callable[..., Path]
Configure = Callable[..., TrainConfig]
EVIL = '<script>alert(1)</script> & | `x` "q" $\\n'


def hide(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a package be not installed."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, parent=None: None if name == package else find(name, parent),
    )


def lines_of(path: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


@pytest.fixture
def trained(
    llama: Path, configure: Configure, write_rows: WriteRows, pairs: Rows
) -> tuple[TrainConfig, TrainResult, str]:
    data = DataConfig(write_rows(pairs), eval_split=0.25)
    loop = LoopConfig(epochs=2, batch_size=4)
    config = configure(llama, data, loop=loop, command="lorax-train --data 'my rows'")
    stream = io.StringIO()
    return config, train(config, Console(stream)), stream.getvalue()


def test_the_log_has_every_step_and_evaluation(
    trained: tuple[TrainConfig, TrainResult, str],
) -> None:
    config, result, _ = trained
    lines = lines_of(config.output.directory / "log.jsonl")
    assert [line["event"] for line in lines] == [
        *("evaluation", "start", "step", "step", "step", "evaluation"),
        *("step", "step", "step", "evaluation", "end"),
    ]
    steps = [line for line in lines if line["event"] == "step"]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert [line["epoch"] for line in steps] == [0.3333, 0.6667, 1.0, 1.3333, 1.6667, 2.0]
    last = steps[-1]
    assert last["loss"] == result.record.step_loss
    assert last["tokens"] == result.record.tokens
    assert last["seconds"] == pytest.approx(result.record.seconds, abs=1e-3)
    assert all(line["gradient_norm"] > 0 and line["lr"] > 0 for line in steps)
    assert all(line["tokens_per_second"] > 0 for line in steps)
    assert all(line["memory_bytes"] > 1 << 20 for line in steps)
    held_out = [line["loss"] for line in lines if line["event"] == "evaluation"]
    assert held_out == result.record.eval_losses
    assert lines[-1] == {
        **{"event": "end", "step": 6, "epoch": 2.0},
        **{"interrupted": False, "stopped_early": False, "failure": ""},
    }


@pytest.fixture
def run(trained: tuple[TrainConfig, TrainResult, str]) -> TrainingRun:
    """A run that has made one step."""
    config, result, _ = trained
    row = Example((1, 2, 3), (False, True, True), "row")
    loop = LoopConfig(max_steps=9, batch_size=1)
    run = TrainingRun(result.adapter, [row] * 3, [row], config.optimizer, loop)
    step(run)
    return run


def step(run: TrainingRun, loss: float = 4.0) -> None:
    run.record.steps += 1
    run.record.tokens += 3
    run.record.seconds += 0.5
    run.record.recent.append((loss, 2))


def test_a_number_that_is_none_is_null(run: TrainingRun, tmp_path: Path) -> None:
    log = JsonLog([tmp_path / "log.jsonl"])
    run.record.recent.append((math.nan, 1))
    run.gradient_norm = math.inf
    run.figures = {"reward_margin": -math.inf}
    log.stepped([run])
    (line,) = lines_of(tmp_path / "log.jsonl")  # flushed, though nothing was closed
    assert [line[key] for key in ("loss", "gradient_norm", "reward_margin")] == [None] * 3
    assert read_curves(tmp_path / "log.jsonl") == Curves([], [])
    log.ended([run])


def test_a_resumed_run_appends_and_a_new_one_replaces(run: TrainingRun, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "log.jsonl"
    for _ in range(3):  # up to step 4, of which a checkpoint has the first 2
        step(run)
    first = JsonLog([path])
    for at, loss in ((1, 9.0), (2, 8.0), (3, 7.0), (4, 6.0)):
        run.record.steps = at
        run.record.recent.append((loss, 1))
        first.stepped([run])
    first.ended([run])
    path.write_bytes(path.read_bytes() + b'{"event": "st')  # killed while it wrote
    run.record.steps = 2
    second = JsonLog([path])
    second.started([run])
    run.record.steps = 3
    run.record.recent.append((5.0, 1))
    second.stepped([run])
    second.ended([run])
    assert read_curves(path).train == [(1, 9.0), (2, 8.0), (3, 5.0)]
    assert len(path.read_bytes().splitlines()) == 5 + 1 + 3

    run.record.steps = 0
    third = JsonLog([path])
    third.started([run])
    assert len(path.read_bytes().splitlines()) == 9  # nothing is written before the first step
    step(run)
    third.stepped([run])
    third.ended([run])
    assert [line["event"] for line in lines_of(path)] == ["start", "step", "end"]


def test_no_log_is_no_curve(tmp_path: Path) -> None:
    assert read_curves(tmp_path / "none.jsonl") == Curves()


class Failing(Console):
    """Takes the log's directory away in the first step."""

    def __init__(self, directory: Path) -> None:
        self.out = io.StringIO()
        super().__init__(self.out)
        self.directory = directory

    def started(self, runs: Sequence[TrainingRun]) -> None:
        self.directory.mkdir(parents=True)
        (self.directory / "log.jsonl").mkdir()
        (self.directory / "report.html").mkdir()
        (self.directory / "loss.png").mkdir()


def test_what_cannot_be_written_does_not_keep_the_adapter_from_being_saved(
    llama: Path, configure: Configure, write_rows: WriteRows, pairs: Rows
) -> None:
    config = configure(llama, write_rows(pairs))
    console = Failing(config.output.directory)
    result = train(config, console)
    assert result.directory is not None
    assert (result.directory / "adapter_model.safetensors").exists()
    said = console.out.getvalue()
    assert said.count("log.jsonl cannot be written any more, training goes on") == 1
    assert said.count("report.html could not be written") == 1
    assert said.count("loss.png could not be written") == 1
    assert not list(result.directory.glob(".*"))  # nothing half written stays


def test_a_log_left_by_a_failed_run_is_not_in_the_way(
    llama: Path, configure: Configure, write_rows: WriteRows, pairs: Rows
) -> None:
    config = configure(llama, write_rows(pairs))
    config.output.directory.mkdir()
    (config.output.directory / "log.jsonl").write_text("{}\n")
    assert train(config, Console(io.StringIO())).directory is not None


class Page(HTMLParser):
    """Collects tags, references to other files, and the text; checks that tags are closed."""

    VOID = ("meta",)

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.references: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [f"{k}={v}" for k, v in attrs if k in ("src", "href", "xlink:href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_says_what_was_trained_on_what(
    trained: tuple[TrainConfig, TrainResult, str], llama: Path
) -> None:
    config, result, _ = trained
    out = config.output.directory
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    page = Page((out / "report.html").read_text())
    assert page.references == []
    assert "script" not in page.tags
    assert "svg" in page.tags
    assert result.summary is not None
    for said in (
        str(llama),
        str(config.data.train),
        result.summary.data["SHA-256"],
        "optimizer.lr0.01",
        f"{result.record.train_loss:.4f}",
        *(f"{loss:.4f}" for loss in result.record.eval_losses),
        "these weights were saved",
        "<|im_end|>",
        f"lorax-serve --model {llama} --adapters {out.parent}",
        "lorax-train --data 'my rows'",
    ):
        assert said in page.text


def test_pages_of_adapters_trained_at_once_compare_them(
    llama: Path, configure: Configure, write_rows: WriteRows, pairs: Rows
) -> None:
    data = write_rows(pairs)
    configs = [
        configure(llama, data, out=name, name=name, lr=lr)
        for name, lr in (("a", 1e-3), ("b", 1e-2))
    ]
    results = train_all(configs, Console(io.StringIO()))
    for name, result in zip(("a", "b"), results, strict=True):
        assert result.directory is not None
        text = Page((result.directory / "report.html").read_text()).text
        assert "Trained together" in text
        assert f"{result.record.train_loss:.4f}" in text
        assert text.startswith(name) or name in text
        lines = lines_of(result.directory / "log.jsonl")
        assert [line["step"] for line in lines if line["event"] == "step"] == [1, 2, 3]


def summary(**changes: Any) -> Summary:
    facts: dict[str, Any] = {
        "name": EVIL,
        "directory": Path("out") / "x",
        "base": EVIL,
        "base_id": None,
        "data": {"file": EVIL},
        "settings": {EVIL: EVIL, "optimizer.lr": "1"},
        "figures": {
            EVIL: EVIL,
            **dict.fromkeys(
                ("rank, alpha", "steps", "loss, latest steps", "held-out loss after"), EVIL
            ),
        },
        "evaluations": (Evaluation(0, 2.0), Evaluation(5, 1.0)),
        "saved": Evaluation(5, 1.0),
        "command": f"lorax-train {EVIL} ```",
    }
    return Summary(**(facts | changes))


def test_text_from_outside_is_escaped_on_the_page() -> None:
    curves = Curves([(1, 2.0), (2, 1.5)], [(2, 1.7)])
    report = Report(summary(), curves, [(EVIL, True), (EVIL, False)], 3, served=True)
    text = render_page(report, [report, report])
    page = Page(text)
    assert "<script" not in text
    assert "script" not in page.tags
    assert page.text.count("<script>alert(1)</script>") > 10
    assert "(3 more tokens)" in page.text
    assert "does not serve" in Page(render_page(Report(summary(), Curves(), [], 0, False))).text


@pytest.mark.parametrize(
    "curves",
    [
        Curves(),
        Curves([(1, 0.0)]),
        Curves([], [(0, 3.0)]),
        Curves([(i, 1 / (i + 1)) for i in range(5000)], [(0, 1.0), (4999, 0.1)]),
    ],
)
def test_any_curve_can_be_drawn(curves: Curves) -> None:
    pytest.importorskip("matplotlib")
    assert to_png(curves, "$\\bad{").startswith(b"\x89PNG")
    drawing = to_svg([("a", curves)])
    assert bool(drawing) == bool(curves.train or curves.held_out)
    assert "nan" not in drawing
    assert "inf" not in drawing
    assert len(drawing) < 60_000


def test_a_curve_is_smoothed_by_the_mean_of_the_points_before() -> None:
    points = [(i, float(i % 3)) for i in range(10)]
    assert smoothed(points, 3) == [
        (0, 0.0),
        (1, 0.5),
        *((i, pytest.approx(1.0)) for i in range(2, 10)),
    ]


def test_without_matplotlib_the_page_comes_alone(
    llama: Path,
    configure: Configure,
    write_rows: WriteRows,
    pairs: Rows,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hide("matplotlib", monkeypatch)
    stream = io.StringIO()
    data = write_rows(pairs)
    configs = [configure(llama, data, out=out, name=out) for out in ("a", "b")]
    for result in train_all(configs, Console(stream)):
        assert result.directory is not None
        assert (result.directory / "report.html").exists()
        assert not (result.directory / "loss.png").exists()
    assert stream.getvalue().count("pip install lorax-serve[report]") == 1


def test_a_run_can_do_without_a_report(
    llama: Path, tmp_path: Path, configure: Configure, write_rows: WriteRows, pairs: Rows
) -> None:
    output = OutputConfig(tmp_path / "out", report=False)
    result = train(configure(llama, write_rows(pairs), output=output), Console(io.StringIO()))
    assert result.directory is not None
    assert {path.name for path in result.directory.iterdir()} == {
        *("README.md", "adapter_config.json", "adapter_model.safetensors", "log.jsonl"),
    }
    assert not parse(["--data", "d", "--out", "o", "--no-report"]).output.report


def test_a_file_is_replaced_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "page"
    write_whole(path, b"one")

    def fail(self: Path, target: Path) -> Path:
        raise OSError("no space")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        write_whole(path, b"two")
    assert [(each.name, each.read_bytes()) for each in tmp_path.iterdir()] == [("page", b"one")]


def test_the_card_has_the_hubs_front_matter_and_the_runs_figures(
    trained: tuple[TrainConfig, TrainResult, str],
) -> None:
    config, result, _ = trained
    card: Any = ModelCard.load(config.output.directory / "README.md")
    assert card.data.to_dict() == {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "lorax-train"],
    }  # and no base_model, since the base is a directory
    record = result.record
    assert f"| steps | {record.steps} |" in card.text
    assert f"| held-out loss before | {record.eval_losses[0]:.4f} |" in card.text
    assert f"| held-out loss after | {min(record.eval_losses):.4f} (step " in card.text
    assert f"| tokens a second | {record.tokens_per_second:,.0f} |" in card.text
    assert "| peak memory | " in card.text
    assert r"| loop.batch\_size | 4 |" in card.text
    assert "lorax-train --data 'my rows'" in card.text


def test_the_card_of_a_base_on_the_hub_names_it() -> None:
    card: Any = ModelCard(model_card(summary(base="smollm2-135m", base_id=hub_id("smollm2-135m"))))
    assert card.data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert "--model HuggingFaceTB/SmolLM2-135M-Instruct" in card.text


def test_nothing_from_outside_breaks_the_card() -> None:
    text = model_card(summary(base_id='a"b: {'))
    card: Any = ModelCard(text)
    assert card.data.base_model == 'a"b: {'
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert all(line.replace(r"\|", "").count("|") == 3 for line in rows)
    assert r"\<script\>" in text
    assert "````sh\nlorax-train" in text  # a longer fence than what is in it


@pytest.mark.parametrize(
    ("spec", "found"),
    [
        ("org/model", "org/model"),
        ("org/model@v1", "org/model"),
        ("model.gguf", None),
        ("/data/model", None),
        ("./model", None),
    ],
)
def test_files_have_no_id_on_the_hub(spec: str, found: str | None) -> None:
    assert hub_id(spec) == found


def test_the_weights_of_the_lowest_loss_are_what_the_files_speak_of(
    llama: Path,
    configure: Configure,
    write_rows: WriteRows,
    pairs: Rows,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    losses = iter([4.0, 3.0, 2.0, 2.5])
    monkeypatch.setattr("lorax_train.loop.trainer.summed_loss", lambda *_: (next(losses), 1))
    data = DataConfig(write_rows(pairs), eval_split=0.25)
    loop = LoopConfig(max_steps=3, batch_size=4, eval_every=1)
    result = train(configure(llama, data, loop=loop), Console(io.StringIO()))
    assert result.record.eval_losses == [4.0, 3.0, 2.0, 2.5]
    assert result.directory is not None
    with safe_open(result.directory / "adapter_model.safetensors", "pt") as file:
        header = file.metadata()
    assert (header["eval_loss"], header["step"], header["steps"]) == ("2.000000", "2", "3")
    card = (result.directory / "README.md").read_text()
    assert "| held-out loss after | 2.0000 (step 2) |" in card


def test_tensorboard_shows_every_run(
    llama: Path, tmp_path: Path, configure: Configure, write_rows: WriteRows
) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = tmp_path / "board"
    rows = [{"prompt": f"{i}", "chosen": " yes", "rejected": " no"} for i in range(8)]
    data = DataConfig(write_rows(rows), eval_split=0.25)
    configs = [
        configure(
            llama,
            data,
            name=name,
            output=OutputConfig(tmp_path / name, tensorboard=board),
            objective=ObjectiveConfig(name="dpo"),
        )
        for name in ("a", "b")
    ]
    for result in train_all(configs, Console(io.StringIO())):
        assert result.directory is not None
        found = events.EventAccumulator(str(board / result.directory.name))
        found.Reload()
        tags = set(found.Tags()["scalars"])
        assert {"train/loss", "train/learning_rate", "train/gradient_norm"} <= tags
        assert {"train/reward_margin", "held_out/reward_accuracy", "memory/GB"} <= tags
        assert [each.step for each in found.Scalars("train/loss")] == [1, 2, 3]
        held_out = [each.value for each in found.Scalars("held_out/loss")]
        assert held_out == pytest.approx(result.record.eval_losses)


def test_tensorboard_that_is_not_there_is_named_at_once(
    tmp_path: Path, configure: Configure, write_rows: WriteRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    hide("tensorboard", monkeypatch)
    output = OutputConfig(tmp_path / "out", tensorboard=tmp_path / "board")
    config = configure(tmp_path / "no-model", write_rows([]), output=output)
    with pytest.raises(TrainingError, match=r"--tensorboard .*pip install lorax-serve\[tensorb"):
        train(config, Console(io.StringIO()))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_bar_shows_losses_speed_and_memory(
    llama: Path, configure: Configure, write_rows: WriteRows, pairs: Rows
) -> None:
    data = DataConfig(write_rows(pairs), eval_split=0.25)
    stream = Terminal()
    train(configure(llama, data), Console(stream))
    bar = stream.getvalue().split("\r")[-1].split("\n")[0]
    assert "3/3" in bar
    assert " (held out " in bar
    assert " tok/s, " in bar
    assert bar.rstrip("] ").endswith("B")


@pytest.mark.parametrize("count", [2, 5])
def test_one_bar_shows_several_adapters(
    count: int, llama: Path, configure: Configure, write_rows: WriteRows, pairs: Rows
) -> None:
    data = write_rows(pairs)
    names = [f"n{i}" for i in range(count)]
    stream = Terminal()
    train_all([configure(llama, data, out=n, name=n) for n in names], Console(stream))
    last = stream.getvalue()
    if count == 2:
        assert "loss n0 " in last
        assert "; n1 " in last
    else:
        assert " of 5 adapters" in last


def test_without_a_terminal_there_is_a_line_every_so_often(
    llama: Path, configure: Configure, write_rows: WriteRows, pairs: Rows
) -> None:
    stream = io.StringIO()
    loop = LoopConfig(max_steps=9, batch_size=4, log_every=4)
    train(configure(llama, write_rows(pairs), loop=loop), Console(stream))
    lines = [line for line in stream.getvalue().splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == ["1/9", "4/9", "8/9", "9/9"]
    assert all(" tok/s  " in line and line.endswith("B") for line in lines)


def test_memory_is_told_where_there_is_no_proc(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cpu = torch.device("cpu")
    held, peak = memory.memory_used(cpu), memory.peak_memory(cpu)
    assert held is not None
    assert peak is not None
    assert 1 << 24 < held <= peak
    monkeypatch.setattr(memory, "_PROCESS", tmp_path)
    usage = memory.memory_used(cpu)
    assert usage is not None
    assert usage > 1 << 24
    monkeypatch.setitem(sys.modules, "resource", None)
    assert memory.peak_memory(cpu) is None


def test_ctrl_c_before_an_evaluation_saves_what_was_learned_since_the_first_one(
    llama: Path, configure: Configure, write_rows: WriteRows, pairs: Rows
) -> None:
    class Impatient(Console):
        def stepped(self, runs: Sequence[TrainingRun]) -> None:
            if runs[0].record.steps == 2:
                raise KeyboardInterrupt

    data = DataConfig(write_rows(pairs), eval_split=0.25)
    loop = LoopConfig(max_steps=9, batch_size=4, eval_every=5)
    result = train(configure(llama, data, loop=loop), Impatient(io.StringIO()))
    assert result.record.interrupted
    assert all(pair.b.abs().max() > 0 for pair in result.adapter.pairs().values())
    assert result.summary is not None
    assert result.summary.saved is None  # the only evaluation was of other weights
