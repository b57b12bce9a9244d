"""The Helm chart: what it renders, what the server makes of it, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.check import helm
from deploy.check.update import COPIES, GOLDEN, without_golden
from lorax_serve import __version__
from lorax_serve.cli import serve
from lorax_serve.config import EngineConfig, ServerConfig
from lorax_serve.server.app import SERVICES

HELM = helm.find()
needs_helm = pytest.mark.skipif(HELM is None, reason="there is no helm: make deploy-tools")
NAMES = [values.stem for values in helm.VARIANTS]


@pytest.fixture(scope="module")
def renders() -> dict[str, str]:
    assert HELM is not None
    return {values.stem: helm.render(HELM, values) for values in helm.VARIANTS}


def objects(text: str, kind: str) -> list[Any]:
    return [each for each in yaml.safe_load_all(text) if each["kind"] == kind]


def pod_of(text: str) -> Any:
    (deployment,) = objects(text, "Deployment")
    return deployment["spec"]["template"]["spec"]


@needs_helm
@pytest.mark.parametrize("name", [v.stem for v in helm.VARIANTS if not without_golden(v)])
def test_renders_are_as_they_were(renders: dict[str, str], name: str) -> None:
    golden = (GOLDEN / f"{name}.yaml").read_text()
    assert renders[name] == golden, "if it should be so: python -m deploy.check.update"


@needs_helm
@pytest.mark.parametrize("name", NAMES)
def test_the_server_takes_the_flags(renders: dict[str, str], name: str) -> None:
    pod = pod_of(renders[name])
    (container,) = pod["containers"]
    fields = {*EngineConfig.__dataclass_fields__, *ServerConfig.__dataclass_fields__}
    config, _ = serve.parse(container["args"])
    assert config.port == 50051
    assert config.metrics_port == 9090
    grace = pod["terminationGracePeriodSeconds"]
    stop = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert grace > stop + config.drain_seconds
    for variable in container["env"]:
        prefix, _, field = variable["name"].partition("LORAX_")
        assert prefix or field.lower() in fields
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    assert config.state is None or str(config.state.parent) in mounts
    assert config.adapters is None or mounts[str(config.adapters)]["readOnly"]
    assert sorted(mount["name"] for mount in mounts.values()) == sorted(
        volume["name"] for volume in pod["volumes"]
    )


@needs_helm
@pytest.mark.parametrize("name", NAMES)
def test_pods_are_restricted_and_probed(renders: dict[str, str], name: str) -> None:
    pod = pod_of(renders[name])
    (container,) = pod["containers"]
    assert pod["enableServiceLinks"] is False
    assert pod["automountServiceAccountToken"] is False
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["grpc"].get("service", "") in ("", *SERVICES)
    assert not container["image"].endswith(":latest")


@needs_helm
def test_autoscalers_wait_for_the_drain(renders: dict[str, str]) -> None:
    (scaler,) = objects(renders["everything"], "HorizontalPodAutoscaler")
    (scaled,) = objects(renders["keda"], "ScaledObject")
    keda = scaled["spec"]["advanced"]["horizontalPodAutoscalerConfig"]
    for behaviour in (scaler["spec"]["behavior"], keda["behavior"]):
        assert behaviour["scaleDown"]["stabilizationWindowSeconds"] >= 60
    for text in (renders["everything"], renders["keda"]):
        (deployment,) = objects(text, "Deployment")
        assert "replicas" not in deployment["spec"]


@needs_helm
def test_the_manifest_is_the_files(renders: dict[str, str]) -> None:
    (config,) = objects(renders["everything"], "ConfigMap")
    adapters = yaml.safe_load(config["data"]["adapters.yaml"])["adapters"]
    assert [each["name"] for each in adapters] == ["poet", "pilot", "local"]
    (flag,) = (a for a in pod_of(renders["everything"])["containers"][0]["args"] if "manifest" in a)
    assert Path(flag.partition("=")[2]).name in config["data"]


@needs_helm
def test_a_manifest_in_a_bucket_is_no_file_of_the_pod(renders: dict[str, str]) -> None:
    pod = pod_of(renders["keda"])
    config, _ = serve.parse(pod["containers"][0]["args"])
    assert config.manifest == "s3://adapters/production/adapters.yaml"
    assert objects(renders["keda"], "ConfigMap") == []
    assert {volume["name"] for volume in pod["volumes"]} == {"tmp", "cache", "state"}


@needs_helm
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ("image.tag=latest", "/image/tag"),
        ("replica=3", "additional properties 'replica' not allowed"),
        ("env.LORAX_PORT=1", "/env"),
        ("settings.port=1", "the chart sets this flag"),
        ("terminationGraceSeconds=70", "must be more than preStopSeconds"),
        ("state.kind=none,adapters.source=s3://a", "reads adapters where they are"),
        ("state.kind=existingClaim,state.existingClaim=a", "one server uses a state directory"),
        ("adapters.source=s3://a,adapters.existingClaim=b", "excludes"),
        ("adapters.loadOnDemand=true", "needs adapters.source"),
        ("adapters.manifestUri=https://a/b.yaml", "/adapters/manifestUri"),
        ("adapters.manifestUri=s3://a", "/adapters/manifestUri"),
        (
            "adapters.manifestUri=s3://a/b,adapters.manifest[0].name=c,adapters.manifest[0].source=d",
            "adapters.manifest and adapters.manifestUri exclude each other",
        ),
        ("adapters.manifestUri=s3://a/b,adapters.source=s3://a", "adapters.source excludes"),
        ("adapters.manifestUri=s3://a/b,adapters.loadOnDemand=true", "loadOnDemand excludes"),
        ("adapters.manifestUri=s3://a/b,state.kind=none", "reads adapters where they are"),
        ("autoscaling.kind=keda", "where Prometheus is"),
        ("autoscaling.kind=hpa,autoscaling.scaleDownSeconds=30", "at least drainSeconds"),
    ],
)
def test_what_does_not_go_together_is_refused(values: str, message: str) -> None:
    assert HELM is not None
    with pytest.raises(helm.HelmFailed, match=message):
        helm.render(HELM, helm.CHART / "ci" / "minimal.yaml", "--set", values)


def test_the_chart_is_of_this_version() -> None:
    chart = yaml.safe_load((helm.CHART / "Chart.yaml").read_text())
    assert chart["appVersion"] == __version__


@pytest.mark.parametrize("copy", COPIES, ids=lambda path: path.name)
def test_the_charts_copies_are_the_originals(copy: Path) -> None:
    original = COPIES[copy]
    if not original.exists():
        pytest.skip(f"there is no {original.relative_to(helm.ROOT)} yet")
    assert copy.read_bytes() == original.read_bytes(), "run python -m deploy.check.update"
