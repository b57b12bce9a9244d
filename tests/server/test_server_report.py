"""Reports of loads over gRPC: whole in answers, cut in the trailing metadata of a refusal."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from lorax_serve.client import Client
from lorax_serve.client.results import load_report
from lorax_serve.errors import AdapterRejected, RejectReason
from lorax_serve.pb.lorax.v1 import adapter_pb2 as pb
from lorax_serve.report import LoadReport, ModuleReport, ProbeOutcome, ProbeReport
from lorax_serve.server.report import report_bytes, report_message
from lorax_serve.server.status import LOAD_REPORT
from tests.server.harness import Harness
from tests.server.test_server_status import failure

MOST = 3072

FULL = LoadReport(
    digest="d" * 64,
    base_model="org/base",
    variants=("dora", "rslora"),
    modules=(ModuleReport("layers.0.q", "linear", 4, 8.5, 2.125), ModuleReport("norm", "norm")),
    matched=("a", "b"),
    unmatched=("c",),
    missing=("d", "e"),
    num_modules=2,
    num_matched=2,
    num_unmatched=1,
    num_missing=2,
    file_bytes=5 << 32,
    host_bytes=6 << 32,
    warnings=("look",),
    probe=ProbeReport(ProbeOutcome.FAILED, 0.5, 0.25, 3.0, "differs"),
    reason=RejectReason.PROBE_FAILED,
    problems=("one", "two"),
)


def received(data: bytes) -> LoadReport:
    return load_report(pb.LoadReport.FromString(data))


@pytest.mark.parametrize("report", [FULL, LoadReport()])
def test_nothing_is_lost(report: LoadReport) -> None:
    assert load_report(report_message(report)) == report
    assert received(report_bytes(report)) == report


@pytest.mark.parametrize("outcome", ProbeOutcome)
def test_outcomes(outcome: ProbeOutcome) -> None:
    report = LoadReport(probe=ProbeReport(outcome))
    assert load_report(report_message(report)) == report


def test_lists_go_first_and_counts_stay() -> None:
    large = replace(FULL, matched=tuple(f"layer.{i}" for i in range(500)), num_matched=500)
    data = report_bytes(large)
    assert len(data) <= MOST
    assert received(data) == large.brief()


def test_then_warnings_and_further_problems() -> None:
    wide = "\N{EARTH GLOBE EUROPE-AFRICA}" * 4000
    probe = replace(FULL.probe, message=wide)
    large = replace(FULL, base_model=wide, warnings=(wide,), problems=(wide, wide), probe=probe)
    data = report_bytes(large)
    assert len(data) <= MOST
    cut = received(data)
    assert (cut.digest, cut.num_modules, cut.reason) == (FULL.digest, 2, FULL.reason)
    assert cut.warnings == ()
    (problem,) = cut.problems
    assert len(problem) == 400


def test_what_is_no_text_is_replaced() -> None:
    message = report_message(replace(FULL, base_model="a\ud800b", matched=("\udcff",)))
    assert (message.base_model, list(message.matched)) == ("a?b", ["?"])


def test_a_newer_servers_reason_is_a_refusal() -> None:
    report = load_report(pb.LoadReport(reject_reason="too_green", problems=["it is green"]))
    assert (report.applied, report.problems) == (False, ("it is green",))


async def test_a_load_answers_with_its_report(harness: Harness) -> None:
    harness.write_adapter("poet")
    loaded = await harness.client.load_adapter("poet")
    assert loaded.report == LoadReport(digest=loaded.digest, num_modules=14)
    (listed,) = await harness.client.list_adapters()
    assert listed.report is None


async def test_a_refusal_carries_its_report(harness: Harness) -> None:
    harness.write_adapter("poet", "bad")
    harness.engine.report = replace(FULL, matched=tuple(f"layer.{i}" for i in range(999)))
    with pytest.raises(AdapterRejected) as caught:
        await harness.client.load_adapter("poet")
    assert caught.value.reason is RejectReason.SHAPE_MISMATCH
    assert caught.value.report == harness.engine.report.brief()
    request = pb.LoadAdapterRequest(adapter_id="poet")
    error = await failure(harness.administration.LoadAdapter(request))
    assert received(dict(error.trailing_metadata())[LOAD_REPORT]) == caught.value.report


async def test_inspecting(harness: Harness) -> None:
    harness.write_adapter("poet")
    assert await harness.client.inspect_adapter("pilot", "poet") == LoadReport(digest="poet")
    harness.engine.report = FULL
    assert await harness.client.inspect_adapter("poet") == FULL
    assert harness.engine.loads == []
    with pytest.raises(AdapterRejected) as caught:
        await harness.client.inspect_adapter("nobody")
    assert (caught.value.reason, caught.value.report) == (RejectReason.MISSING_FILE, None)


async def test_inspecting_synchronously(harness: Harness) -> None:
    harness.write_adapter("poet")

    def ask() -> LoadReport:
        with Client(f"127.0.0.1:{harness.server.port}") as client:
            return client.inspect_adapter("poet")

    assert (await asyncio.to_thread(ask)).digest == "poet"
