"""The manifests beside the chart: a wrong field in any of them is found."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.check import helm
from lorax_serve.config import ServerConfig

GATEWAY = helm.ROOT / "deploy" / "gateway" / "inference-extension"
TRAIN = helm.ROOT / "deploy" / "train"
PYTHON = helm.TOOLS / "python"
needs_tools = pytest.mark.skipif(
    not (helm.TOOLS.parent / "custom-schemas.json").exists(),
    reason="there are no schemas: make deploy-tools",
)
WRONG = [  # the file, what is changed in it, and what is said of it
    (GATEWAY / "route.yaml", "timeouts:", "timeout:", "'timeout' was unexpected"),
    (GATEWAY / "route.yaml", "PathPrefix", "Prefix", "'Prefix' is not one of"),
    (GATEWAY / "route.yaml", "  name: lorax-serve", "  nam: lorax-serve", "'nam' was unexpected"),
    (GATEWAY / "pool.yaml", "failureMode:", "failMode:", "'failMode' was unexpected"),
    (GATEWAY / "pool.yaml", "kubernetes.io/h2c", "h2c", "'h2c' is not one of"),
    (GATEWAY / "pool.yaml", "number: 50051", "number: 500510", "500510 is greater than"),
    (GATEWAY / "endpoint-picker.yaml", "data:", "content:", "content"),
    (GATEWAY / "endpoint-picker.yaml", "dataLayer:", "dataLayers:", "'dataLayers' was unexpected"),
    (GATEWAY / "endpoint-picker.yaml", "type: queue-scorer", "type: queues", "'queues' is not one"),
    (GATEWAY / "endpoint-picker.yaml", "pluginRef: queue-scorer", "pluginRef: q", "q is no"),
    (GATEWAY / "endpoint-picker.yaml", "port: 9090", "metricsPort: 9090", "'metricsPort' was"),
    (GATEWAY / "endpoint-picker.yaml", "kvUsageSpec", "kvSpec", "'kvSpec' was unexpected"),
    (GATEWAY / "endpoint-picker.yaml", "defaultEngine: lorax", "defaultEngine: x", "x is not in"),
    (TRAIN / "job.yaml", "backoffLimit:", "backOffLimit:", "backOffLimit"),
    (TRAIN / "pytorchjob.yaml", "nprocPerNode:", "processes:", "'processes' was unexpected"),
    (TRAIN / "pytorchjob.yaml", "mountPath:", "path:", "path"),
]


def check(*files: Path) -> subprocess.CompletedProcess[str]:
    command = [str(PYTHON), "-m", "deploy.check.manifests", *map(str, files)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=helm.ROOT)


@needs_tools
def test_the_manifests_are_right() -> None:
    done = check()
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    """What is said of each of ``WRONG``, all in one process: its imports take the time."""
    folder = tmp_path_factory.mktemp("wrong")
    files = []
    for number, (original, old, new, _) in enumerate(WRONG):
        text = original.read_text()
        assert old in text
        files.append(folder / f"{number}.yaml")
        files[-1].write_text(text.replace(old, new))
    done = check(*files)
    assert done.returncode == 1, done.stderr
    lines = done.stdout.splitlines()
    return [[line for line in lines if line.startswith(f"{file}: ")] for file in files]


@needs_tools
@pytest.mark.parametrize(
    "number", range(len(WRONG)), ids=[f"{each[0].name}-{each[2]}" for each in WRONG]
)
def test_a_wrong_field_is_found(said: list[list[str]], number: int) -> None:
    assert any(WRONG[number][3] in line for line in said[number]), said[number]


def test_the_gateway_asks_the_servers_ports() -> None:
    def read(name: str) -> Any:
        return yaml.safe_load((GATEWAY / name).read_text())

    pool, route, picker = read("pool.yaml"), read("route.yaml"), read("endpoint-picker.yaml")
    config = yaml.safe_load(picker["data"]["config.yaml"])
    (source,) = (each for each in config["plugins"] if each["type"] == "metrics-data-source")
    assert [each["number"] for each in pool["spec"]["targetPorts"]] == [ServerConfig().port]
    assert source["parameters"]["port"] == ServerConfig().metrics_port
    (rule,) = route["spec"]["rules"]
    assert [each["name"] for each in rule["backendRefs"]] == [pool["metadata"]["name"]]
