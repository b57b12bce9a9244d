"""Damaged adapters are loaded beside running streams, which do not notice."""

from __future__ import annotations

import asyncio
import contextlib
import random
import shutil
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import LlamaConfig

from lorax_serve.client import AsyncClient, GenerateOptions, Generation
from lorax_serve.errors import AdapterConflict, AdapterRejected, EngineFailed, SourceFailed
from tests.adapter.damage import MUTATIONS, VARIANTS
from tests.e2e.conftest import StartServer
from tests.e2e.test_serving import client_of, integrity
from tests.fidelity.variants import UNTIED, write_variant
from tests.helpers import TINY_LLAMA, needs_kernels, save_peft_adapter, save_tiny_model

MAX_GROWTH = 300 << 20
PROMPTS = [f"w{n} w{n + 1} w{n + 2}" for n in range(10, 14)]


async def answers(client: AsyncClient) -> list[tuple[str, ...]]:
    """What the good adapters and the base model say to the prompts, all at once."""
    long: GenerateOptions = {"max_new_tokens": 40, "ignore_eos": True, "return_tokens": True}
    draws: tuple[GenerateOptions, ...] = (long, {**long, "seed": 7, "top_p": 0.9})
    asked = [
        client.generate(prompt, adapter=adapter, **draw)
        for prompt in PROMPTS
        for adapter in ("good0", "good1", None)
        for draw in draws
    ]
    return [pieces_of(each) for each in await asyncio.gather(*asked)]


def pieces_of(generation: Generation) -> tuple[str, ...]:
    return tuple(token.piece for token in generation.tokens)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of sizes that the bfloat16 kernels take."""
    config: Any = LlamaConfig
    sizes = {"hidden_size": 96, "head_dim": 32}
    directory: Path = tmp_path_factory.mktemp("model")
    save_tiny_model(directory, config(**{**TINY_LLAMA.to_diff_dict(), **sizes}))
    return directory


@needs_kernels
@pytest.mark.parametrize(
    "loads", [60, pytest.param(2000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])]
)
async def test_damaged_adapters_disturb_no_stream(
    start_server: StartServer, model: Path, tmp_path: Path, loads: int
) -> None:
    valid = []
    for seed, variant in enumerate(VARIANTS):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on merging, which is not for these tests
            write_variant(variant, model, UNTIED, tmp_path / f"valid{seed}", seed)
        valid.append(tmp_path / f"valid{seed}")
    root = tmp_path / "served"
    root.mkdir()
    for n in range(2):
        torch.manual_seed(n)
        save_peft_adapter(model, root / f"good{n}", r=2 + n, target_modules="all-linear")
    server = await start_server(
        root, model, tmp_path / "state", batch_invariant=True, dtype="bfloat16"
    )
    process = psutil.Process(server._engine._process.pid)
    ends: Counter[str] = Counter()
    async with client_of(server) as client:
        expected = await answers(client)
        before = 0
        done = asyncio.Event()

        async def stream_on() -> int:
            rounds = 0
            while not done.is_set():
                assert await answers(client) == expected
                rounds += 1
            return rounds

        streams = asyncio.create_task(stream_on())
        for seed in range(loads):
            rng = random.Random(seed)
            directory = tmp_path / "damaged"
            shutil.copytree(rng.choice(valid), directory)
            MUTATIONS[seed % len(MUTATIONS)](rng, directory)
            ends[await load(client, directory, root)] += 1
            shutil.rmtree(directory)
            if seed == loads // 5:
                before = process.memory_info().rss
        done.set()
        assert await streams > 3
        assert process.memory_info().rss - before < MAX_GROWTH
        assert await integrity(server) == ()
        ready = [each for each in await client.list_adapters() if each.name.startswith("good")]
        assert len(ready) == 2
    assert ends["refused"] > loads // 2
    assert ends["applied"] > 0
    assert list((tmp_path / "state" / "staging").iterdir()) == []


async def load(client: AsyncClient, directory: Path, root: Path) -> str:
    """Load it, use it, and unload it; returns what became of it."""
    served = root / "victim"
    await asyncio.to_thread(directory.rename, served)
    try:
        while True:
            try:
                await client.load_adapter("victim")
                break
            except AdapterConflict:  # the watch looks at it, too
                await asyncio.sleep(0.01)
    except AdapterRejected:
        return "refused"
    except SourceFailed:
        return "not fetched"
    finally:
        await asyncio.to_thread(served.rename, directory)
    with contextlib.suppress(EngineFailed):  # it may hold numbers that overflow
        await client.generate("w1 w2", adapter="victim", max_new_tokens=2)
    await client.unload_adapter("victim")
    return "applied"
