"""The Helm chart: what it renders, what the server makes of it, and what it refuses."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.check import helm
from deploy.check.update import COPIES, GOLDEN, without_golden
from deploy.local.cluster import SERVICE
from deploy.local.gateway import CONFIG, DRAIN
from lorax_serve import __version__
from lorax_serve.cli import client, serve
from lorax_serve.config import EngineConfig, ServerConfig
from lorax_serve.server.app import SERVICES

HELM = helm.find()
READY = DRAIN.with_name("ready.sh")
needs_helm = pytest.mark.skipif(HELM is None, reason="there is no helm: make deploy-tools")
NAMES = [values.stem for values in helm.VARIANTS]


@pytest.fixture(scope="module")
def renders() -> dict[str, str]:
    assert HELM is not None
    return {values.stem: helm.render(HELM, values) for values in helm.VARIANTS}


def lines(text: str) -> list[str]:
    """Those that are not empty, which ``render`` leaves out."""
    return [line for line in text.splitlines() if line.strip()]


def objects(text: str, kind: str) -> list[Any]:
    return [each for each in yaml.safe_load_all(text) if each["kind"] == kind]


def deployments(text: str) -> dict[str, Any]:
    """By the name of their first container."""
    found = objects(text, "Deployment")
    return {each["spec"]["template"]["spec"]["containers"][0]["name"]: each for each in found}


def pod_of(text: str, container: str = "lorax-serve") -> Any:
    return deployments(text)[container]["spec"]["template"]["spec"]


def asked_by(pod: Any, services: Mapping[str, Any]) -> str:
    """The Service that helm test asks: the gateway's, if there is one without TLS."""
    own = str(pod["metadata"]["name"].removesuffix("-test"))
    gateway = services.get(f"{own}-gateway", {"ports": [{}]})
    plain = gateway["ports"][0].get("appProtocol") == "kubernetes.io/h2c"
    return f"{own}-gateway" if plain else own


def services_of(text: str) -> dict[str, Any]:
    """What is in each Service, by name."""
    return {each["metadata"]["name"]: each["spec"] for each in objects(text, "Service")}


def named(text: str, kind: str, name: str) -> Any:
    (found,) = (each for each in objects(text, kind) if each["metadata"]["name"] == name)
    return found


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
@pytest.mark.parametrize("name", NAMES)
def test_helm_test_asks_the_service(renders: dict[str, str], name: str) -> None:
    (pod,) = objects(renders[name], "Pod")
    services = services_of(renders[name])
    own = asked_by(pod, services)
    asked = f"{own}:{services[own]['ports'][0]['port']}"
    commands = []
    for container in (*pod["spec"]["initContainers"], *pod["spec"]["containers"]):
        program, *words = container["command"]
        assert program == "lorax"
        options = client._parser().parse_args(words)
        assert options.server == asked
        commands.append(options.run.__name__)
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
        assert container["image"] == pod_of(renders[name])["containers"][0]["image"]
    assert commands == ["_health", "_generate"]
    assert pod["spec"]["automountServiceAccountToken"] is False
    assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
    # It is no server, so no Service may send it calls.
    labels = pod["metadata"]["labels"].items()
    assert not any(each["selector"].items() <= labels for each in services.values())


@needs_helm
@pytest.mark.parametrize("name", NAMES)
def test_the_network_policy_lets_helm_test_in(renders: dict[str, str], name: str) -> None:
    (pod,) = objects(renders[name], "Pod")
    own = asked_by(pod, services_of(renders[name]))
    policies = objects(renders[name], "NetworkPolicy")
    (policy,) = (each for each in policies if each["metadata"]["name"] == own)
    (calls,) = (each for each in policy["spec"]["ingress"] if each["ports"] == [{"port": "grpc"}])
    ours = [each["podSelector"] for each in calls["from"] if each.keys() == {"podSelector"}]
    labels = pod["metadata"]["labels"].items()
    assert any(each.get("matchLabels", {}).items() <= labels for each in ours)
    # And out: to the servers it asks, and to nobody else.
    (out,) = (
        each for each in policies if each["spec"]["podSelector"]["matchLabels"].items() <= labels
    )
    dns, calls = out["spec"]["egress"]
    assert {each["port"] for each in dns["ports"]} == {53}
    assert calls["to"] == [{"podSelector": policy["spec"]["podSelector"]}]


@needs_helm
def test_new_pods_are_known_before_old_ones_go(renders: dict[str, str]) -> None:
    for name in NAMES:
        for spec in (each["spec"] for each in deployments(renders[name]).values()):
            # Name servers of clusters keep answers for 30 seconds.
            assert spec.get("progressDeadlineSeconds", 600) > spec["minReadySeconds"] >= 30


@needs_helm
@pytest.mark.parametrize("name", NAMES)
def test_only_the_server_has_its_identity(renders: dict[str, str], name: str) -> None:
    own = pod_of(renders[name])["serviceAccountName"]
    (test,) = objects(renders[name], "Pod")
    others = [test["spec"]["serviceAccountName"]]
    if "envoy" in deployments(renders[name]):
        others.append(pod_of(renders[name], "envoy")["serviceAccountName"])
    assert len({own, *others}) == 1 + len(others)
    for each in others:
        account = named(renders[name], "ServiceAccount", each)
        assert "annotations" not in account["metadata"]
        assert account["automountServiceAccountToken"] is False


@needs_helm
def test_autoscalers_wait_for_the_drain(renders: dict[str, str]) -> None:
    (scaler,) = objects(renders["everything"], "HorizontalPodAutoscaler")
    (scaled,) = objects(renders["keda"], "ScaledObject")
    keda = scaled["spec"]["advanced"]["horizontalPodAutoscalerConfig"]
    for behaviour in (scaler["spec"]["behavior"], keda["behavior"]):
        assert behaviour["scaleDown"]["stabilizationWindowSeconds"] >= 60
    for text in (renders["everything"], renders["keda"]):
        assert "replicas" not in deployments(text)["lorax-serve"]["spec"]


@needs_helm
def test_the_manifest_is_the_files(renders: dict[str, str]) -> None:
    (config,) = objects(renders["everything"], "ConfigMap")
    adapters = yaml.safe_load(config["data"]["adapters.yaml"])["adapters"]
    assert [each["name"] for each in adapters] == ["poet", "pilot", "local"]
    (flag,) = (a for a in pod_of(renders["everything"])["containers"][0]["args"] if "manifest" in a)
    assert Path(flag.partition("=")[2]).name in config["data"]


@needs_helm
def test_the_gateway_is_the_tested_one(renders: dict[str, str]) -> None:
    files = named(renders["gateway"], "ConfigMap", "lorax-lorax-serve-gateway")["data"]
    service = named(renders["gateway"], "Service", "lorax-lorax-serve-headless")
    known = CONFIG.read_text().replace(SERVICE, service["metadata"]["name"])
    assert lines(files["envoy.yaml"]) == lines(known)
    assert lines(files["drain.sh"]) == lines(DRAIN.read_text())

    pod = pod_of(renders["gateway"], "envoy")
    (container,) = pod["containers"]
    (mount,) = container["volumeMounts"]
    config = container["args"][container["args"].index("--config-path") + 1]
    _, script, seconds = container["lifecycle"]["preStop"]["exec"]["command"]
    assert {config, script} == {f"{mount['mountPath']}/{name}" for name in files}
    assert pod["terminationGracePeriodSeconds"] > int(seconds)
    listeners = yaml.safe_load(files["envoy.yaml"])["static_resources"]["listeners"]
    ports = {each["name"]: each["address"]["socket_address"]["port_value"] for each in listeners}
    assert ports == {each["name"]: each["containerPort"] for each in container["ports"]}


@needs_helm
def test_tls_is_all_that_differs_from_the_tested_gateway(renders: dict[str, str]) -> None:
    text = renders["gateway-tls"]
    files = named(text, "ConfigMap", "lorax-lorax-serve-gateway")["data"]
    headless = "lorax-lorax-serve-headless"
    config = yaml.safe_load(files["envoy.yaml"])
    (chain,) = config["static_resources"]["listeners"][0]["filter_chains"]
    socket = chain.pop("transport_socket")["typed_config"]
    assert config == yaml.safe_load(CONFIG.read_text().replace(SERVICE, headless))
    assert socket["require_client_certificate"] is True

    context = socket["common_tls_context"]
    secrets = context["tls_certificate_sds_secret_configs"]
    secrets.append(context["validation_context_sds_secret_config"])
    pod = pod_of(text, "envoy")
    (container,) = pod["containers"]
    mounts = {each["name"]: each["mountPath"] for each in container["volumeMounts"]}
    (volume,) = (each["secret"] for each in pod["volumes"] if each["name"] == "tls")
    mounted = {f"{mounts['tls']}/{each['path']}" for each in volume["items"]}
    used = set()
    for each in secrets:
        path = Path(each["sds_config"]["path_config_source"]["path"])
        assert str(path.parent) == mounts["config"]
        (secret,) = yaml.safe_load(files[path.name])["resources"]
        assert secret["name"] == each["name"]
        content = secret.get("tls_certificate") or secret["validation_context"]
        assert content.pop("watched_directory") == {"path": mounts["tls"]}
        used |= {file["filename"] for file in content.values()}
    assert used == mounted

    (program, script) = container["readinessProbe"]["exec"]["command"]
    assert (program, Path(script).parent) == ("bash", Path(mounts["config"]))
    assert lines(files[Path(script).name]) == lines(READY.read_text())

    for name, protocol in (("gateway", "kubernetes.io/h2c"), ("gateway-tls", "tls")):
        (port,) = services_of(renders[name])["lorax-lorax-serve-gateway"]["ports"]
        assert port["appProtocol"] == protocol


@needs_helm
def test_nothing_takes_a_gateway_for_a_replica(renders: dict[str, str]) -> None:
    text = renders["gateway"]
    labels = {
        name: each["spec"]["template"]["metadata"]["labels"]
        for name, each in deployments(text).items()
    }
    labels["test"] = objects(text, "Pod")[0]["metadata"]["labels"]
    selectors = [
        each["spec"].get("selector") or each["spec"]["podSelector"]
        for kind in ("Service", "PodDisruptionBudget", "NetworkPolicy", "PodMonitor", "Deployment")
        for each in objects(text, kind)
    ]
    for selector in selectors:
        wanted = selector.get("matchLabels", selector)
        selected = [name for name, having in labels.items() if wanted.items() <= having.items()]
        assert len(selected) == 1
    # The rules take every job that is named after lorax for one of replicas.
    (monitor,) = objects(text, "PodMonitor")
    assert labels["envoy"][monitor["spec"]["jobLabel"]] == "gateway"


@needs_helm
def test_calls_reach_replicas_through_the_gateway_alone(renders: dict[str, str]) -> None:
    policy = named(renders["gateway"], "NetworkPolicy", "lorax-lorax-serve")
    calls, _ = policy["spec"]["ingress"]
    (peer,) = calls["from"]
    labels = deployments(renders["gateway"])["envoy"]["spec"]["template"]["metadata"]["labels"]
    assert peer["podSelector"]["matchLabels"].items() <= labels.items()
    assert "namespaceSelector" not in peer


@needs_helm
def test_a_manifest_in_a_bucket_is_no_file_of_the_pod(renders: dict[str, str]) -> None:
    pod = pod_of(renders["keda"])
    config, _ = serve.parse(pod["containers"][0]["args"])
    assert config.manifest == "s3://adapters/production/adapters.yaml"
    assert objects(renders["keda"], "ConfigMap") == []
    assert {volume["name"] for volume in pod["volumes"]} == {"tmp", "cache", "state"}


@needs_helm
@pytest.mark.parametrize(
    "values",
    [
        "service.type=NodePort,networkPolicy.clients[0].ipBlock.cidr=10.0.0.0/8",
        "service.type=NodePort,networkPolicy.enabled=false",
        "service.type=NodePort,gateway.enabled=true",
    ],
)
def test_a_service_for_outside_is_taken_with_who_may_call(values: str) -> None:
    assert HELM is not None
    text = helm.render(HELM, helm.CHART / "ci" / "minimal.yaml", "--set", values)
    assert "NodePort" in {each["type"] for each in services_of(text).values() if "type" in each}


@needs_helm
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ("service.type=LoadBalancer", "ipBlock in networkPolicy.clients"),
        ("gateway.enabled=true,gateway.service.type=NodePort", "gateway.service.type NodePort"),
        ("image.tag=latest", "/image/tag"),
        ("fullnameOverride=1a", "must begin with a letter"),
        ("podLabels.app\\.kubernetes\\.io/name=other", "/podLabels"),
        ("monitoring.rules.labels.helm\\.sh/chart=other", "/monitoring/rules/labels"),
        (
            "adapters.manifest[0].name=a,adapters.manifest[0].source=b,adapters.manifest[0].weight=1.5",
            "/adapters/manifest/0/weight",
        ),
        ("credentials.s3.key=a/b", "/credentials/s3/key"),
        ("replica=3", "additional properties 'replica' not allowed"),
        ("env.LORAX_PORT=1", "/env"),
        ("settings.port=1", "the chart sets this flag"),
        ("terminationGraceSeconds=70", "must be more than preStopSeconds"),
        (
            "terminationGraceSeconds=90,settings.linger-seconds=80",
            r"settings.linger-seconds \(90\)",
        ),
        ("monitoring.rules.enabled=true,fullnameOverride=models", "which models lacks"),
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
        ("gateway.tls.requireClientCertificates=true", "needs gateway.tls.secret"),
        ("gateway.tls.secret=Not/AName", "/gateway/tls/secret"),
        ("autoscaling.kind=keda", "where Prometheus is"),
        ("autoscaling.kind=hpa,autoscaling.scaleDownSeconds=30", "at least drainSeconds"),
    ],
)
def test_what_does_not_go_together_is_refused(values: str, message: str) -> None:
    assert HELM is not None
    with pytest.raises(helm.HelmFailed, match=message):
        helm.render(HELM, helm.CHART / "ci" / "minimal.yaml", "--set", values)


@needs_helm
def test_the_grace_period_is_beyond_the_longest_end() -> None:
    assert HELM is not None
    for seconds, grace in (("2", 85), ("80.5", 106)):
        values = f"settings.linger-seconds={seconds}"
        text = helm.render(HELM, helm.CHART / "ci" / "minimal.yaml", "--set", values)
        assert pod_of(text)["terminationGracePeriodSeconds"] == grace


TEXTS = {
    *("name", "namespace", "kind", "image", "secretName", "claimName", "storageClassName", "key"),
    *("runtimeClassName", "priorityClassName", "serviceAccountName", "path", "serverAddress"),
}


def not_texts(found: Any, path: str = "") -> list[str]:
    """Where an object has something else than text in a place that takes nothing else."""
    wrong = []
    if isinstance(found, list):
        for index, each in enumerate(found):
            wrong += not_texts(each, f"{path}[{index}]")
    elif isinstance(found, dict):
        texts = path.endswith(("labels", "matchLabels", "annotations", ".data", ".spec.selector"))
        for name, value in found.items():
            here = f"{path}.{name}"
            plain = not isinstance(value, (dict, list))
            if not isinstance(name, str) or (
                plain and (texts or name in TEXTS) and not isinstance(value, str)
            ):
                wrong.append(f"{here}: {value!r}")
            wrong += not_texts(value, here)
    return wrong


@needs_helm
@pytest.mark.parametrize("name", ["names", "everything", "keda", "monitoring"])
def test_names_stay_texts(name: str) -> None:
    """The schemas (make deploy-check) see the variants, but of one release's name."""
    assert HELM is not None
    values = helm.CHART / "ci" / f"{name}.yaml"
    fullname = "lorax" if name == "monitoring" else "true"
    more = ("--set-string", f"fullnameOverride={fullname}")
    text = helm.render(HELM, values, *more, release="123", namespace="456")
    for each in yaml.safe_load_all(text):
        assert not_texts(each, each["kind"]) == []


def test_the_chart_is_of_this_version() -> None:
    chart = yaml.safe_load((helm.CHART / "Chart.yaml").read_text())
    assert chart["appVersion"] == __version__


@pytest.mark.parametrize("copy", COPIES, ids=lambda path: path.name)
def test_the_charts_copies_are_the_originals(copy: Path) -> None:
    assert copy.read_bytes() == COPIES[copy].read_bytes(), "run python -m deploy.check.update"
