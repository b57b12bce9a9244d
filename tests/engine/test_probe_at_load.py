"""Golden probes of PEFT's adapters, computed by a real engine when they are loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lorax_serve.adapter import CONFIG_FILE, read, save
from lorax_serve.adapter.probe import PROBE_KEY, Probe
from lorax_serve.checkpoint.fingerprint import base_fingerprint
from lorax_serve.config import EngineConfig
from lorax_serve.core import AdapterInfo
from lorax_serve.engine.messages import InspectAdapter, LoadAdapter
from lorax_serve.errors import AdapterRejected, InvalidRequest, RejectReason
from lorax_serve.report import LoadReport, ProbeOutcome
from tests.engine.test_engine import Local, prompt
from tests.helpers import TINY_LLAMA, each_kernels, save_tiny_model

MakeAdapter = Callable[..., Path]
TOKENS = (5, 17, 30, 99, 41, 8)


def write_probe(model: Path, directory: Path) -> Probe:
    """Compute the adapter's probe as PEFT answers, and store it in its file."""
    from peft import PeftModel

    auto: Any = AutoModelForCausalLM
    peft = PeftModel.from_pretrained(auto.from_pretrained(model, dtype=torch.float32), directory)
    ids = torch.tensor([TOKENS])
    with torch.no_grad():
        tuned = peft(input_ids=ids).logits[0, -1]
        with peft.disable_adapter():
            base = peft(input_ids=ids).logits[0, -1]
    logits, top = tuned.topk(16)
    probe = Probe(
        TOKENS,
        tuple(zip(top.tolist(), logits.tolist(), strict=True)),
        tuple(base[top].tolist()),
        tuned.std().item(),
        base_fingerprint(model),
        "float32",
    )
    files = read(directory)
    save(directory, files.config, files.tensors, probe.to_metadata())
    return probe


@pytest.fixture
def probed(make_adapter: MakeAdapter, tiny_model: Path) -> Path:
    """An adapter of PEFT's with its probe."""
    directory = make_adapter("probed", r=8, lora_alpha=16, target_modules=["q_proj", "down_proj"])
    write_probe(tiny_model, directory)
    return directory


def load(local: Local, path: Path) -> AdapterInfo | AdapterRejected:
    local.engine.handle(LoadAdapter(1, 1, str(path)))
    local.engine.handle(local.inbox.get(timeout=60))
    (reply,) = local.report()
    answer = reply.error or reply.value
    assert isinstance(answer, AdapterInfo | AdapterRejected)
    return answer


def inspect(local: Local, path: Path) -> LoadReport:
    local.engine.handle(InspectAdapter(2, str(path)))
    local.engine.handle(local.inbox.get(timeout=60))
    (reply,) = local.report()
    assert isinstance(reply.value, LoadReport)
    return reply.value


def change_config(directory: Path, **fields: object) -> None:
    path = directory / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def permute_layers(directory: Path) -> None:
    """Give the first layer what the second was trained for, and the other way round."""
    files = read(directory)
    swap = {"layers.0": "layers.1", "layers.1": "layers.0"}
    tensors = {
        name.replace(own, swap[own]): tensor
        for name, tensor in files.tensors.items()
        for own in swap
        if own in name
    }
    save(directory, files.config, tensors, {PROBE_KEY: files.metadata[PROBE_KEY]})


def refused(answer: AdapterInfo | AdapterRejected) -> AdapterRejected:
    assert isinstance(answer, AdapterRejected)
    assert answer.reason is RejectReason.PROBE_FAILED
    assert answer.report is not None
    assert answer.report.reason is RejectReason.PROBE_FAILED
    assert answer.report.probe.outcome is ProbeOutcome.FAILED
    return answer


def accepted(answer: AdapterInfo | AdapterRejected) -> LoadReport:
    assert isinstance(answer, AdapterInfo)
    assert answer.report.host_bytes == answer.nbytes
    return answer.report


@each_kernels
def test_the_right_adapter_passes(tiny_model: Path, probed: Path, kernels: str) -> None:
    report = accepted(load(Local(tiny_model, kernels=kernels), probed))
    assert report.probe.outcome is ProbeOutcome.PASSED
    assert report.probe.difference < 1e-3 < report.probe.tolerance < report.probe.effect
    assert (report.warnings, report.problems) == ((), ())


def test_a_doubled_alpha_is_refused(tiny_model: Path, probed: Path) -> None:
    change_config(probed, lora_alpha=32)
    local = Local(tiny_model)
    error = refused(load(local, probed))
    assert "lora_alpha" in str(error)
    assert local.stats.adapters.known == 0


def test_permuted_layers_are_refused(tiny_model: Path, probed: Path) -> None:
    permute_layers(probed)
    assert "adapter answers differently" in str(refused(load(Local(tiny_model), probed)))


def test_another_base_is_refused(probed: Path, tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "other", TINY_LLAMA, seed=8)
    error = refused(load(Local(tmp_path / "other"), probed))
    assert "base model is not the one" in str(error)
    assert "its weights are others" in str(error)


def test_a_token_that_the_base_lacks(tiny_model: Path, probed: Path) -> None:
    files = read(probed)
    probe = Probe.from_metadata(files.metadata)
    assert probe is not None
    strange = replace(probe, token_ids=(128, *probe.token_ids))
    save(probed, files.config, files.tensors, strange.to_metadata())
    assert "token 128" in str(refused(load(Local(tiny_model), probed)))


def test_a_prompt_beyond_the_longest_sequence(tiny_model: Path, probed: Path) -> None:
    error = refused(load(Local(tiny_model, max_sequence_length=5), probed))
    assert "max_sequence_length" in str(error)


def test_warn_applies_it_and_says_so(tiny_model: Path, probed: Path) -> None:
    change_config(probed, lora_alpha=32)
    report = accepted(load(Local(tiny_model, probe="warn"), probed))
    assert report.probe.outcome is ProbeOutcome.FAILED
    (warning,) = report.warnings
    assert "lora_alpha" in warning


def test_off_computes_nothing(tiny_model: Path, probed: Path) -> None:
    change_config(probed, lora_alpha=32)
    report = accepted(load(Local(tiny_model, probe="off"), probed))
    assert report.probe.outcome is ProbeOutcome.UNCHECKED
    assert report.warnings == ()


@pytest.mark.parametrize("policy", ["refuse", "warn", "off"])
def test_a_probe_that_cannot_be_read(tiny_model: Path, probed: Path, policy: str) -> None:
    files = read(probed)
    save(probed, files.config, files.tensors, {PROBE_KEY: "{"})
    answer = load(Local(tiny_model, probe=policy), probed)
    if policy == "refuse":
        assert isinstance(answer, AdapterRejected)
        assert answer.reason is RejectReason.BAD_FILE
    else:
        assert PROBE_KEY in accepted(answer).warnings[0]


@pytest.mark.parametrize("policy", ["refuse", "warn", "off"])
def test_an_init_that_changes_the_base_needs_a_probe_that_passes(
    tiny_model: Path, probed: Path, policy: str
) -> None:
    """The tensors are a plain adapter's here, so they are right on the base as it is."""
    change_config(probed, init_lora_weights="olora")
    local = Local(tiny_model, probe=policy)
    answer = load(local, probed)
    if policy != "refuse":
        assert isinstance(answer, AdapterRejected)
        assert answer.reason is RejectReason.UNSUPPORTED
        return
    assert accepted(answer).probe.outcome is ProbeOutcome.PASSED
    change_config(probed, lora_alpha=32)
    refused(load(local, probed))
    files = read(probed)
    save(probed, files.config, files.tensors)
    bare = load(local, probed)
    assert isinstance(bare, AdapterRejected)
    assert bare.reason is RejectReason.UNSUPPORTED


def test_without_a_probe(tiny_model: Path, make_adapter: MakeAdapter) -> None:
    report = accepted(load(Local(tiny_model), make_adapter("bare", target_modules=["q_proj"])))
    assert report.probe.outcome is ProbeOutcome.NONE


def test_inspecting_loads_nothing(tiny_model: Path, probed: Path) -> None:
    local = Local(tiny_model)
    report = inspect(local, probed)
    assert (report.applied, report.probe.outcome) == (True, ProbeOutcome.PASSED)
    assert report.host_bytes > 0
    change_config(probed, lora_alpha=32)
    assert inspect(local, probed).reason is RejectReason.PROBE_FAILED
    change_config(probed, r=0)
    assert inspect(local, probed).reason is RejectReason.BAD_CONFIG
    assert local.stats.adapters.known == 0
    assert local.engine.check_integrity() == ()


@each_kernels
def test_running_requests_go_on(
    tiny_model: Path, make_adapter: MakeAdapter, probed: Path, kernels: str
) -> None:
    """Good and bad adapters are probed while requests of the base and of another decode."""
    other = make_adapter("other", seed=3, r=4, target_modules="all-linear")
    bad = make_adapter("bad", r=8, lora_alpha=16, target_modules=["q_proj", "down_proj"])
    write_probe(tiny_model, bad)
    change_config(bad, lora_alpha=32)

    def run(*disturbing: Path) -> dict[int, list[int | None]]:
        local = Local(tiny_model, kernels=kernels)
        local.load(7, other)
        for request_id, adapter in ((1, None), (2, 7), (3, None)):
            local.submit(request_id, prompt(12, request_id), adapter, new=12)
        for path in disturbing:
            local.step()
            inspect(local, path)
        return local.run()

    assert run(probed, bad, probed) == run()


def test_the_policy_is_checked() -> None:
    with pytest.raises(InvalidRequest, match="probe must be one of"):
        EngineConfig(probe="maybe")
