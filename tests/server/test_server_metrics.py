"""What Prometheus sees: names, values, and labels that stay bounded."""

from __future__ import annotations

import asyncio
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from lorax_serve import __version__, errors
from lorax_serve import metrics as metrics_module
from lorax_serve.errors import (
    AdapterNotFound,
    AdapterRejected,
    EngineFailed,
    LoraxError,
    RejectReason,
    SourceFailed,
    SourceReason,
)
from lorax_serve.metrics import Metrics
from lorax_serve.server.status import status_of
from tests.server.harness import Harness, serving, stream_request, text_request, until


async def scrape(harness: Harness) -> dict[str, float]:
    """Samples by name and labels, as ``name{label="value"}``."""

    def get() -> str:
        url = f"http://127.0.0.1:{harness.server.metrics_port}/metrics"
        with urllib.request.urlopen(url, timeout=5) as answer:
            return str(answer.read(), "utf-8")

    text = await asyncio.to_thread(get)
    return {
        sample.name
        + "".join(
            f"{{{key}={value}}}" for key, value in sorted(sample.labels.items())
        ): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def test_a_request_leaves_its_traces(tokenizer_dir: Path, tmp_path: Path) -> None:
    async with serving(tokenizer_dir, tmp_path, metrics_port=0) as harness:
        before = await scrape(harness)
        assert before[f"lorax_build_info{{version={__version__}}}"] == 1
        assert before["lorax_kv_tokens_capacity"] == 789
        await harness.generation.Generate(text_request(max_new_tokens=5))
        with pytest.raises(AdapterNotFound):
            await harness.client.generate("one", adapter="nobody")
        after = await scrape(harness)
        expected = {
            "lorax_prompt_tokens_total{adapter=_base}": 3,
            "lorax_generated_tokens_total{adapter=_base}": 5,
            "lorax_requests_total{adapter=_base}{stop_reason=max_tokens}": 1,
            "lorax_errors_total{code=NOT_FOUND}": 1,
            "lorax_time_to_first_token_seconds_count": 1,
            "lorax_inter_token_latency_seconds_count": 4,
            "lorax_queue_time_seconds_count": 1,
            "lorax_queue_time_seconds_sum": 0.25,
            "lorax_batch_size_count": 5,
            "lorax_step_seconds_count": 5,
        }
        assert {name: after.get(name) for name in expected} == expected
        assert not any("nobody" in name for name in after)


async def test_gauges_follow_the_engine(tokenizer_dir: Path, tmp_path: Path) -> None:
    async with serving(tokenizer_dir, tmp_path, metrics_port=0) as harness:
        harness.engine.paused = True
        call = harness.generation.GenerateStream(stream_request())
        await until(lambda: harness.engine.in_flight == 1)
        harness.engine.step()
        assert (await scrape(harness))["lorax_requests_running"] == 1
        call.cancel()
        await until(lambda: harness.engine.in_flight == 0)
        harness.engine.step()
        assert (await scrape(harness))["lorax_requests_running"] == 0


async def test_a_request_that_the_engine_fails_on_is_counted(harness: Harness) -> None:
    def value(name: str) -> float | None:
        return harness.server.metrics.registry.get_sample_value(name)

    assert value("lorax_requests_failed_total") == value("lorax_requests_in_flight") == 0
    harness.engine.paused = True
    asking = asyncio.create_task(harness.client.generate("one"))
    await until(lambda: harness.engine.in_flight == 1)
    assert value("lorax_requests_in_flight") == 1
    harness.engine.fail()
    with pytest.raises(EngineFailed):
        await asking
    assert value("lorax_requests_failed_total") == 1
    assert value("lorax_requests_in_flight") == 0


async def test_whether_it_serves_is_told(tokenizer_dir: Path, tmp_path: Path) -> None:
    async with serving(tokenizer_dir, tmp_path) as harness:
        registry = harness.server.metrics.registry
        assert registry.get_sample_value("lorax_serving") == 1
        harness.engine.die()
        await harness.server.failed.wait()
        assert registry.get_sample_value("lorax_serving") == 0
    assert Metrics().registry.get_sample_value("lorax_serving") == 0
    async with serving(tokenizer_dir, tmp_path) as harness:
        registry = harness.server.metrics.registry
    assert registry.get_sample_value("lorax_serving") == 0


def test_what_may_be_counted_begins_with_zero() -> None:
    """So that Prometheus sees the first one as an increase."""
    plain = (getattr(errors, name) for name in errors.__all__)
    failures: list[LoraxError] = [
        kind("")
        for kind in plain
        if issubclass(kind, LoraxError) and kind not in (LoraxError, AdapterRejected, SourceFailed)
    ]
    failures += [AdapterRejected(reason, "") for reason in RejectReason]
    failures += [SourceFailed(reason, "") for reason in SourceReason]
    registry = Metrics().registry
    for error in failures:
        labels = {"code": status_of(error)[0].name}
        assert registry.get_sample_value("lorax_errors_total", labels) == 0
    for reason in (*RejectReason, *SourceReason, "overloaded", "store_failed"):
        assert registry.get_sample_value("lorax_adapter_rejects_total", {"reason": reason}) == 0


async def test_an_adapter_s_series_go_with_its_last_version(
    tokenizer_dir: Path, tmp_path: Path
) -> None:
    async with serving(tokenizer_dir, tmp_path, metrics_port=0) as harness:
        # Names that look like our own labels cannot be confused with them.
        for name in ("base", "other"):
            harness.write_adapter(name, name)
            await harness.client.load_adapter(name)
            await harness.client.generate("one </s>", adapter=name)
        harness.write_adapter("base", "new content")
        await harness.client.load_adapter("base")
        await until(lambda: harness.engine.dropped == [1])
        await harness.client.generate("one </s>")
        samples = await scrape(harness)
        for label in ("base", "other", "_base"):
            assert samples[f"lorax_generated_tokens_total{{adapter={label}}}"] == 2
        await harness.client.unload_adapter("base")
        samples = await scrape(harness)
        assert not any("{adapter=base}" in name for name in samples)
        assert "lorax_generated_tokens_total{adapter=other}" in samples
        assert (samples["lorax_adapter_loads_total"], samples["lorax_adapter_unloads_total"]) == (
            3,
            2,
        )


async def test_labels_are_bounded(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_module, "MAX_ADAPTER_LABELS", 2)
    for name in ("a", "b", "c", "d"):
        harness.write_adapter(name, name)
        await harness.client.load_adapter(name)
        await harness.client.generate("one </s>", adapter=name)

    def generated(label: str) -> float | None:
        registry = harness.server.metrics.registry
        return registry.get_sample_value("lorax_generated_tokens_total", {"adapter": label})

    assert [generated(label) for label in ("a", "b", "c", "_other")] == [2, 2, None, 4]
    await harness.client.unload_adapter("a")
    await harness.client.generate("one </s>", adapter="c")
    assert [generated(label) for label in ("a", "b", "c", "_other")] == [None, 2, 2, 4]
