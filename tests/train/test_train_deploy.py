"""The manifests in ``deploy/train`` say what torchrun and ``lorax-train`` understand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed.run import get_args_parser

from lorax_train.cli import parse

MANIFESTS = sorted((Path(__file__).parents[2] / "deploy" / "train").glob("*.yaml"))


def pods(manifest: Any) -> list[Any]:
    if manifest["kind"] == "Job":
        return [manifest["spec"]["template"]["spec"]]
    if manifest["kind"] == "PyTorchJob":
        replicas = manifest["spec"]["pytorchReplicaSpecs"].values()
        return [each["template"]["spec"] for each in replicas]
    assert manifest["kind"] == "Service"
    return []


def test_there_is_a_job_and_a_pytorchjob() -> None:
    assert [path.name for path in MANIFESTS] == ["job.yaml", "pytorchjob.yaml"]


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_flags_are_accepted(path: Path) -> None:
    text = path.read_text()
    optional = re.findall(r"^ *# - (--\S+)", text, re.MULTILINE)
    assert optional == ["--fsdp"]
    found = [pod for each in yaml.safe_load_all(text) for pod in pods(each)]
    assert len(found) == (2 if "pytorch" in path.name else 1)
    for pod in found:
        assert pod["enableServiceLinks"] is False
        (container,) = pod["containers"]
        command: list[str] = container["command"] + container["args"]
        torchrun, *launching = command
        assert torchrun == "torchrun"
        launched = get_args_parser().parse_args(launching)
        assert launched.module
        assert launched.training_script == "lorax_train"
        config = parse([*launched.training_script_args, *optional])
        assert config.fsdp
        assert config.output.resume is True
        assert config.loop.save_every == 100
        claimed = {volume["name"] for volume in pod["volumes"]}
        assert claimed == {mount["name"] for mount in container["volumeMounts"]}
        mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
        for needed in (config.data.train, config.output.directory):
            assert str(needed.parent) in mounts


def test_the_pods_of_the_job_meet_at_the_first_one() -> None:
    service, job = yaml.safe_load_all(MANIFESTS[0].read_text())
    pod, port = job["spec"]["template"]["spec"], service["spec"]["ports"][0]["port"]
    name = job["metadata"]["name"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": name}
    assert pod["subdomain"] == service["metadata"]["name"]
    launched = get_args_parser().parse_args([*pod["containers"][0]["command"][1:], "--out=x"])
    assert launched.rdzv_endpoint == f"{name}-0.{pod['subdomain']}:{port}"
    assert int(launched.nnodes) == job["spec"]["completions"] == job["spec"]["parallelism"]
