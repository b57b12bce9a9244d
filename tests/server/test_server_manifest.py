"""A server that serves what a manifest says, over a fake engine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from lorax_serve.cli.client import main
from lorax_serve.cli.serve import parse
from lorax_serve.errors import AdapterConflict, InvalidRequest
from lorax_serve.server.app import Server
from lorax_serve.sources import CONFIG_FILE, WEIGHTS_FILE
from tests.server.harness import Harness, config, serving, text_request, until
from tests.server.test_server_metrics import scrape


def write_adapter(adapters: Path, name: str, content: str = "good") -> None:
    (adapters / name).mkdir(parents=True, exist_ok=True)
    (adapters / name / CONFIG_FILE).write_text(content)
    (adapters / name / WEIGHTS_FILE).write_bytes(name.encode())


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    """Two good adapters and one that is refused; the manifest wants one of each."""
    for name, content in (("poet", "good"), ("pilot", "good"), ("broken", "bad")):
        write_adapter(tmp_path / "adapters", name, content)
    settings = {
        "adapters": tmp_path / "adapters",
        "state": tmp_path / "state",
        "manifest": str(tmp_path / "manifest.yaml"),
        "watch_seconds": 0.05,
        "metrics_port": 0,
    }
    write(settings, wanted("poet", "broken"))
    return settings


def write(settings: dict[str, Any], manifest: str) -> None:
    Path(settings["manifest"]).write_text(manifest)


def wanted(*names: str) -> str:
    return "adapters:\n" + "".join(f"- {{name: {name}, source: {name}}}\n" for name in names)


async def names(harness: Harness) -> set[str]:
    return {each.name for each in await harness.client.list_adapters() if each.state == "ready"}


async def test_it_serves_what_the_manifest_says(
    tokenizer_dir: Path, settings: dict[str, Any]
) -> None:
    async with serving(tokenizer_dir, **settings) as harness:
        # It is ready, since all were tried; the broken one is told of.
        health = health_pb2_grpc.HealthStub(harness.channel)
        answer = await health.Check(health_pb2.HealthCheckRequest())
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        assert await names(harness) == {"poet"}
        (failed,) = await harness.client.list_failed_adapters()
        assert (failed.name, failed.reason) == ("broken", "shape_mismatch")
        assert "rank 5" in failed.message
        samples = await scrape(harness)
        assert samples["lorax_manifest_adapters"] == 2
        assert samples["lorax_adapters_failed"] == 1
        write(settings, wanted("pilot"))
        await until(lambda: [each.name for each in harness.server.adapters] == ["pilot"])
        write(settings, "adapters: {")
        await until(lambda: settings["manifest"] in harness.server.refused)
        samples = await scrape(harness)
        assert samples["lorax_manifest_read_errors_total"] >= 1
        assert samples["lorax_manifest_adapters"] == 1
        assert await names(harness) == {"pilot"}


async def test_what_is_decided_there_is_not_decided_by_calls(
    tokenizer_dir: Path, settings: dict[str, Any]
) -> None:
    async with serving(tokenizer_dir, **settings) as harness:
        client, poet = harness.client, settings["adapters"] / "poet"
        calls: list[Callable[[], Any]] = [
            lambda: client.load_adapter("pilot"),
            lambda: client.upload_adapter("pilot", poet),
            lambda: client.update_adapter("poet", weight=2),
            lambda: client.roll_back_adapter("poet"),
            lambda: client.unload_adapter("poet"),
        ]
        for call in calls:
            with pytest.raises(AdapterConflict, match=r"what --manifest .* says: change it there"):
                await call()
        assert (await client.inspect_adapter("pilot")).digest
        assert await names(harness) == {"poet"}


async def test_the_command_line_tells_of_what_failed(
    tokenizer_dir: Path, settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    async with serving(tokenizer_dir, **settings) as harness:
        server = f"127.0.0.1:{harness.server.port}"
        assert await asyncio.to_thread(main, ["adapters", "list", "--server", server]) == 0
    assert "not loaded: broken: lora_A of layer 3 has rank 5" in capsys.readouterr().out


async def test_a_first_start_needs_a_manifest(
    tokenizer_dir: Path, settings: dict[str, Any]
) -> None:
    settings["manifest"] += ".gone"
    with pytest.raises(InvalidRequest, match=r"manifest .* cannot be read: No such file"):
        await Server(config(**settings)).start()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--manifest", "m.yaml"], "manifest needs --state DIR"),
        (
            ["--manifest", "m.yaml", "--state", "s", "--source", "s3://b"],
            "manifest and source exclude each other.*leave out --source",
        ),
        (
            ["--manifest", "m.yaml", "--state", "s", "--load-on-demand", "on"],
            "manifest and load_on_demand exclude each other.*leave out --load-on-demand",
        ),
        (["--replica-name", "a b"], "replica_name must be 1 to 253 visible ASCII characters"),
    ],
)
def test_flags_that_contradict_each_other(flags: list[str], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        parse(flags)


async def test_every_answer_names_the_replica(tokenizer_dir: Path, tmp_path: Path) -> None:
    async with serving(tokenizer_dir, tmp_path, replica_name="lorax-serve-0") as harness:

        async def replica(call: Any) -> tuple[grpc.StatusCode, Any]:
            code = await call.code()
            return code, dict(await call.trailing_metadata() or ()).get("lorax-replica")

        name = "lorax-serve-0"
        good, bad = text_request(max_new_tokens=1), text_request(max_new_tokens=1)
        bad.adapter_id = "nobody"
        generate = harness.generation.Generate
        assert await replica(generate(good)) == (grpc.StatusCode.OK, name)
        assert await replica(generate(bad)) == (grpc.StatusCode.NOT_FOUND, name)
        harness.server._guard.close("it stops")
        assert await replica(generate(good)) == (grpc.StatusCode.UNAVAILABLE, name)
