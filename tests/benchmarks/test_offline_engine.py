"""The benchmarks' own machinery, on a tiny model: that it runs and counts, not how fast."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest

from benchmarks.adapters import adapter_bytes, random_adapters
from benchmarks.measure import Run, Trace, Turn, alternate, percentile
from benchmarks.ours import OfflineEngine
from benchmarks.workloads import Request, fixed_shape
from lorax_serve.adapter import WEIGHTS_FILE, read
from lorax_serve.config import EngineConfig
from tests.helpers import TINY_LLAMA, save_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place: Path = tmp_path_factory.mktemp("model")
    save_tiny_model(place, TINY_LLAMA)
    return place


async def test_cases_alternate_on_a_real_engine(model: Path, tmp_path: Path) -> None:
    adapters = random_adapters(tmp_path, model, [4, 8])
    config = EngineConfig(model=str(model), dtype="float32", kernels="torch", threads=1)
    async with await OfflineEngine.start(config, adapters) as engine:

        def turn(*names: str | None) -> Turn:
            return Turn(
                engine,
                lambda n: fixed_shape(4, 8, 5, vocab_size=128, seed=n + 1, adapters=names),
            )

        runs = await alternate({"base": turn(None), "lora": turn(None, *adapters)}, 2)
        assert engine.stats.adapters.known == 2
        assert engine.memory_bytes > 0
    assert {name: len(some) for name, some in runs.items()} == {"base": 2, "lora": 2}
    for run in (*runs["base"], *runs["lora"]):
        assert [len(trace.tokens) for trace in run.traces] == [5] * 4
        assert all(figure > 0 for figure in run.figures().values())


def test_random_adapters_differ_in_digest_and_share_disk_space(model: Path, tmp_path: Path) -> None:
    adapters = random_adapters(tmp_path, model, [4] * 6, weight_files=2)
    assert len({read(path).digest for path in adapters.values()}) == 6
    assert len({(path / WEIGHTS_FILE).stat().st_ino for path in adapters.values()}) == 2
    first = next(iter(adapters.values()))
    assert adapter_bytes(model, 4) == sum(t.nbytes for t in read(first).tensors.values())
    assert random_adapters(tmp_path, model, [4] * 6, weight_files=2) == adapters


def test_figures_of_known_times() -> None:
    request = Request((1,), 3)
    run = Run(0.0, [Trace(request, 0.0, [1.0, 1.5, 2.0]), Trace(request, 1.0, [2.0, 3.0, 4.0])])
    figures = run.figures()
    assert figures["output_tokens_per_second"] == pytest.approx(6 / 4)
    assert figures["requests_per_second"] == pytest.approx(2 / 4)
    assert figures["ttft_ms_p50"] == pytest.approx(1000)
    assert figures["itl_ms_p50"] == pytest.approx(500)
    assert figures["itl_ms_p99"] == pytest.approx(1000)


def test_percentiles_are_values_that_occurred() -> None:
    values = [float(i) for i in range(1, 102)]
    assert percentile(values, 50) == statistics.median(values)
    assert percentile(values, 99) == 100
    assert percentile([7.0], 99) == 7
