"""The gateway's files without a cluster: what Envoy takes, and what the name server answers."""

from __future__ import annotations

import socket
import subprocess
from pathlib import Path

import pytest
import yaml

from deploy.local.gateway import CONFIG, Gateway, Ports, find_envoy
from deploy.local.name_server import answer
from lorax_serve.metrics import Metrics

QUERY = b"\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00"


def question(name: str, kind: int = 1) -> bytes:
    labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split("."))
    return QUERY + labels + b"\0" + kind.to_bytes(2, "big") + b"\0\x01"


def test_the_name_server_knows_one_name() -> None:
    addresses = ["127.0.0.11", "127.0.0.12"]
    found = answer(question("some-service"), "some-service", addresses)
    assert found[:2] == QUERY[:2]
    assert found[6:8] == b"\0\x02"
    assert all(socket.inet_aton(address) in found for address in addresses)
    for kind, name in ((28, "some-service"), (1, "other.example")):
        assert answer(question(name, kind), "some-service", addresses)[6:8] == b"\0\0"
    assert answer(question("other.example"), "some-service", addresses)[3] & 15 == 3  # NXDOMAIN


@pytest.mark.parametrize("round_robin", [False, True])
def test_envoy_takes_the_file(tmp_path: Path, round_robin: bool) -> None:
    envoy = find_envoy()
    if envoy is None:
        pytest.skip("there is no envoy: run make gateway-setup")
    Gateway("envoy", Ports(1, 2, 3, 4, 5), tmp_path, round_robin=round_robin)
    rendered = tmp_path / "envoy.yaml"
    for file in (CONFIG, rendered):
        command = [envoy, "--mode", "validate", "--disable-hot-restart", "-c", str(file)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    # Ports are all that differs, one of them in two places, and the policy where it is to.
    ours, theirs = CONFIG.read_text().splitlines(), rendered.read_text().splitlines()
    assert len([line for line in theirs if line not in ours]) == 5 + round_robin


def test_the_endpoint_picker_reads_what_there_is() -> None:
    files = {path.name: path for path in (CONFIG.parent / "inference-extension").glob("*.yaml")}
    objects = {name: yaml.safe_load(path.read_text()) for name, path in files.items()}
    assert {each["kind"] for each in objects.values()} == {
        "ConfigMap",
        "HTTPRoute",
        "InferencePool",
    }
    config = yaml.safe_load(objects["endpoint-picker.yaml"]["data"]["config.yaml"])
    plugins = {each["type"]: each.get("parameters", {}) for each in config["plugins"]}
    (engine,) = plugins["core-metrics-extractor"]["engineConfigs"]
    wanted = {value for key, value in engine.items() if key.endswith("Spec")}
    families = Metrics(vllm_names=True).registry.collect()
    assert wanted <= {family.name for family in families}
    used = [each["pluginRef"] for each in config["schedulingProfiles"][0]["plugins"]]
    assert set(used) <= plugins.keys()


def test_streams_are_never_made_again() -> None:
    listener, _ = yaml.safe_load(CONFIG.read_text())["static_resources"]["listeners"]
    manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
    routes = manager["route_config"]["virtual_hosts"][0]["routes"]
    *_, route = [each["route"] for each in routes if "route" in each]
    assert set(route["retry_policy"]["retry_on"].split(",")) == {
        "connect-failure",
        "refused-stream",
        "reset-before-request",
        "unavailable",
    }
