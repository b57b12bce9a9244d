"""The manifests outside the chart: ``python -m deploy.check.manifests [FILE]...``.

Prints what is wrong with them, and exits with 1 if anything is.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import yaml

from deploy.check import helm, picker, schemas

__all__ = ["FILES", "problems"]

_DEPLOY = helm.ROOT / "deploy"
FILES = (
    *sorted((_DEPLOY / "train").glob("*.yaml")),
    *sorted((_DEPLOY / "gateway" / "inference-extension").glob("*.yaml")),
)


def problems(found: Any) -> list[str]:
    """What is wrong with an object; a ConfigMap's files are configurations of the picker."""
    wrong = [
        f"Kubernetes {release}: {each}"
        for release in schemas.KUBERNETES
        for each in schemas.problems(found, release)
    ]
    if found["kind"] == "ConfigMap":
        for text in found.get("data", {}).values():
            wrong += picker.problems(yaml.safe_load(text))
    return wrong


def main(files: list[str]) -> int:
    """Check these files; returns the exit code."""
    wrong = [
        f"{file}: {each}"
        for file in files or FILES
        for found in yaml.safe_load_all(Path(file).read_text())
        for each in problems(found)
    ]
    print(*wrong, sep="\n", end="\n" * bool(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
