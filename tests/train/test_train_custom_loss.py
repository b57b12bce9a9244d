from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from lorax_serve.errors import TrainingError
from lorax_train.cli import parse
from lorax_train.config import InjectionConfig, ObjectiveConfig, TrainConfig
from lorax_train.console import Console
from lorax_train.data.batches import Share
from lorax_train.data.encode import Example
from lorax_train.loop.custom_loss import load_loss, try_loss
from lorax_train.loop.loss import TargetLoss
from lorax_train.model.base import load_model
from lorax_train.model.inject import inject
from lorax_train.run import train

CPU = torch.device("cpu")
Rows = list[dict[str, Any]]
WriteRows = Callable[..., Path]
Configure = Callable[..., TrainConfig]

SMOOTH = """
import torch.nn.functional as F

def smooth(logits, labels):
    return F.cross_entropy(logits, labels, reduction="none", label_smoothing=0.2)
"""


def silent() -> Console:
    return Console(io.StringIO())


@pytest.fixture
def losses(tmp_path: Path) -> Callable[[str], Path]:
    def write(code: str) -> Path:
        path = tmp_path / "losses.py"
        path.write_text(code)
        return path

    return write


def test_a_function_comes_from_a_file_or_a_module(
    losses: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = losses(SMOOTH)
    logits, labels = torch.randn(3, 7), torch.tensor([1, 2, 3])
    expected = F.cross_entropy(logits, labels, reduction="none", label_smoothing=0.2)
    assert torch.equal(load_loss(f"{path}:smooth")(logits, labels), expected)
    monkeypatch.syspath_prepend(path.parent)
    assert torch.equal(load_loss("losses:smooth")(logits, labels), expected)
    assert load_loss("lorax_train.loop.loss:cross_entropy")(logits, labels).shape == (3,)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("smooth", "give module:function, or file.py:function"),
        ("losses.py:", "give module:function, or file.py:function"),
        ("nowhere.py:smooth", "there is no file nowhere.py"),
        ("no_such_module.losses:smooth", "No module named .*; install it, set PYTHONPATH, or give"),
        ("{file}:smoth", r"has no smoth \(its functions: smooth\)"),
        ("{file}:F", "F is module, not a function"),
        (".relative:f", "importing .relative raised TypeError"),
    ],
)
def test_what_cannot_be_found_is_named(
    where: str, message: str, losses: Callable[[str], Path]
) -> None:
    where = where.format(file=losses(SMOOTH))
    with pytest.raises(TrainingError, match=message) as caught:
        load_loss(where)
    assert str(caught.value).startswith(f"--loss {where}: ")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def f(:", "raised SyntaxError"),
        ("1 / 0", "raised ZeroDivisionError: division by zero"),
        ("import no_such_thing", "raised ModuleNotFoundError: No module named 'no_such_thing'"),
    ],
)
def test_a_file_that_fails_is_named_with_its_error(
    code: str, message: str, losses: Callable[[str], Path]
) -> None:
    with pytest.raises(TrainingError, match=message):
        load_loss(f"{losses(code)}:f")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("F.cross_entropy(logits, labels)", r"float32 \[\]; do not take the mean"),
        ("F.cross_entropy(logits, labels, reduction='none')[:, None]", r"not torch.float32 \[5, 1"),
        ("labels", "not torch.int64"),
        ("0.5", "not float"),
        ("logits.nope", "raised AttributeError"),
        ("logits.sum(-1).detach()", "no gradient flows"),
        ("logits.sum(-1) * float('nan')", "not a finite number"),
        ("(logits * 0).sum(-1).clamp(min=0).sqrt()", "its gradient is not a finite number"),
        ("logits.sum(-1) * 0", "its gradient is 0"),
        (
            "F.cross_entropy(logits, labels).expand(len(labels))",
            "depends on the other targets",
        ),
    ],
)
def test_a_function_that_returns_something_else_is_refused(
    body: str, message: str, losses: Callable[[str], Path]
) -> None:
    code = f"import torch.nn.functional as F\ndef f(logits, labels): return {body}\n"
    where = f"{losses(code)}:f"
    with pytest.raises(TrainingError, match=message) as caught:
        try_loss(where, load_loss(where), 11, CPU)
    assert str(caught.value).startswith(f"--loss {where}: ")


@pytest.mark.parametrize("base", ["llama", "gemma2"], indirect=True)
@pytest.mark.parametrize("targets", ["all-linear", "q_proj,lm_head"])
def test_its_gradient_is_that_of_autograd_on_all_logits(
    base: Path, targets: str, losses: Callable[[str], Path]
) -> None:
    function = load_loss(f"{losses(SMOOTH)}:smooth")
    row = Example(tuple(range(1, 30)), (False,) * 9 + (True,) * 20, "row")
    model = load_model("tiny", base, torch.float32, CPU)
    loss = TargetLoss.prepare(model, row, function=function)
    adapter = inject(model, InjectionConfig(r=2, targets=targets), "tiny", 0)
    for pair in adapter.pairs().values():
        pair.b.data.normal_(std=0.05, generator=torch.Generator().manual_seed(1))
    loss.routing = adapter.routing
    total, each = loss(loss.collate([Share(0, [row], 1 / 20)], 0))
    found = torch.autograd.grad(total, adapter.parameters())

    tokens = torch.tensor([row.tokens])
    logits = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits[0, 8:-1]
    plain = F.cross_entropy(logits, tokens[0, 9:], reduction="none", label_smoothing=0.2)
    torch.testing.assert_close(each, plain.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(total, plain.mean(), rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(
        found, torch.autograd.grad(plain.mean(), adapter.parameters()), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)


def test_training_with_it_works_and_differs(
    llama: Path,
    configure: Configure,
    write_rows: WriteRows,
    pairs: Rows,
    losses: Callable[[str], Path],
) -> None:
    data = write_rows(pairs)
    objective = ObjectiveConfig(loss=f"{losses(SMOOTH)}:smooth")
    smooth = train(configure(llama, data, out="a", steps=20, objective=objective), silent())
    plain = train(configure(llama, data, out="b", steps=20), silent())
    first = next(iter(smooth.record.recent))
    assert smooth.record.step_loss < 0.8 * first[0] / first[1]
    assert smooth.record.step_loss > plain.record.step_loss  # smoothing keeps it from 0
    assert smooth.directory is not None


def test_a_wrong_function_stops_before_anything_is_trained(
    llama: Path,
    configure: Configure,
    write_rows: WriteRows,
    pairs: Rows,
    losses: Callable[[str], Path],
) -> None:
    where = f"{losses('def f(logits, labels): return logits.mean()')}:f"
    config = configure(llama, write_rows(pairs), objective=ObjectiveConfig(loss=where))
    with pytest.raises(TrainingError, match="one loss for each target"):
        train(config, silent())
    assert not config.output.directory.exists()


def test_the_flag() -> None:
    config = parse(["--data", "d", "--out", "o", "--loss", "losses.py:smooth"])
    assert config.objective.loss == "losses.py:smooth"
