"""What a report says of adapters that PEFT wrote, good and bad."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lorax_serve.adapter import CONFIG_FILE, WEIGHTS_FILE, read, save
from lorax_serve.adapter.probe import PROBE_KEY, Probe
from lorax_serve.adapter.report import inspect
from lorax_serve.errors import AdapterRejected, RejectReason
from lorax_serve.report import LoadReport, ModuleReport, ProbeOutcome
from tests.adapter.peft_side import tiny_modules

MakeAdapter = Callable[..., Path]
Q, V = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"
PROBE = Probe((5, 6, 7, 8), ((9, 2.0), (10, 1.0)), (0.5, 1.0), 1.5, "ab" * 32, "float32")


def change_config(directory: Path, **fields: object) -> None:
    path = directory / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_a_good_adapter(make_adapter: MakeAdapter, tiny_model: Path) -> None:
    directory = make_adapter(
        "good",
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj"],
        layers_to_transform=[0],
        rank_pattern={"v_proj": 16},
        use_rslora=True,
    )
    report = inspect(directory, tiny_modules())
    assert report.applied
    assert report.digest == read(directory).digest
    assert report.base_model == str(tiny_model)
    assert report.variants == ("lora", "rslora")
    assert report.modules == (
        ModuleReport(Q, "linear", 4, 8, 4),
        ModuleReport(V, "linear", 16, 8, 2),
    )
    assert (report.num_modules, report.num_matched) == (2, 4)
    assert report.matched[0] == f"base_model.model.{Q}.lora_A.weight"
    assert (report.unmatched, report.missing, report.problems) == ((), (), ())
    sizes = [(directory / name).stat().st_size for name in (CONFIG_FILE, WEIGHTS_FILE)]
    assert report.file_bytes == sum(sizes)
    assert report.probe.outcome is ProbeOutcome.NONE
    assert pickle.loads(pickle.dumps(report)) == report


def test_what_replaces_the_base_has_no_rank(make_adapter: MakeAdapter) -> None:
    directory = make_adapter(
        "whole", target_modules=["q_proj"], modules_to_save=["lm_head"], use_dora=True
    )
    report = inspect(directory, tiny_modules())
    assert report.variants == ("dora", "modules_to_save")
    assert report.modules[-1] == ModuleReport("lm_head", "output")


def test_a_refusal_tells_every_problem(make_adapter: MakeAdapter) -> None:
    directory = make_adapter("bad", r=4, target_modules=["q_proj", "v_proj"])
    files = read(directory)
    tensors = dict(files.tensors)
    lost = next(name for name in sorted(tensors) if "layers.1.self_attn.q_proj.lora_B" in name)
    tensors.pop(lost)
    tensors[f"base_model.model.{Q}.lora_B.bias"] = torch.zeros(96)
    save(directory, files.config, tensors)
    report = inspect(directory, tiny_modules())
    assert report.reason is RejectReason.UNEXPECTED_TENSOR
    assert report.unmatched == (f"base_model.model.{Q}.lora_B.bias",)
    assert report.missing == (lost,)
    assert [name in said for name, said in zip((Q, lost), report.problems, strict=True)] == [
        True,
        True,
    ]
    assert report.num_modules == 4
    assert report.brief() == LoadReport(
        digest=report.digest,
        base_model=report.base_model,
        variants=("lora",),
        num_modules=4,
        num_matched=7,
        num_unmatched=1,
        num_missing=1,
        file_bytes=report.file_bytes,
        reason=report.reason,
        problems=report.problems,
    )


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"r": 0}, RejectReason.BAD_CONFIG),
        ({"target_modules": ["nothing"]}, RejectReason.NO_MATCH),
        ({"peft_type": "IA3"}, RejectReason.UNSUPPORTED),
    ],
)
def test_a_refused_config(
    make_adapter: MakeAdapter, fields: dict[str, object], reason: RejectReason
) -> None:
    directory = make_adapter("config", target_modules=["q_proj"])
    change_config(directory, **fields)
    report = inspect(directory, tiny_modules())
    assert (report.reason, report.modules) == (reason, ())
    assert report.file_bytes > 0


def test_no_files(tmp_path: Path) -> None:
    report = inspect(tmp_path / "nowhere", tiny_modules())
    assert (report.reason, report.file_bytes) == (RejectReason.MISSING_FILE, 0)
    assert "adapter_config.json" in report.problems[0]


def test_a_probe_is_read_but_not_computed(make_adapter: MakeAdapter) -> None:
    directory = make_adapter("probed", target_modules=["q_proj"])
    files = read(directory)
    save(directory, files.config, files.tensors, PROBE.to_metadata())
    report = inspect(directory, tiny_modules())
    assert (report.applied, report.warnings) == (True, ())
    assert (report.probe.outcome, report.probe.effect) == (ProbeOutcome.UNCHECKED, PROBE.effect)
    change_config(directory, init_lora_weights="olora")
    (warning,) = inspect(directory, tiny_modules()).warnings
    assert "olora" in warning
    save(directory, files.config, files.tensors, {PROBE_KEY: "{"})
    assert inspect(directory, tiny_modules()).reason is RejectReason.BAD_FILE


def test_an_error_keeps_its_report_on_its_way() -> None:
    bare = pickle.loads(pickle.dumps(AdapterRejected(RejectReason.NO_MATCH, "none")))
    assert (bare.reason, str(bare), bare.report) == (RejectReason.NO_MATCH, "none", None)
    report = LoadReport(digest="d").refused(RejectReason.NO_MATCH, "none")
    error = pickle.loads(pickle.dumps(AdapterRejected(RejectReason.NO_MATCH, "none", report)))
    assert error.report == report
