"""Write anew what is made of other files: the chart's ``files/`` and the golden renders.

``python -m deploy.check.update``; tests compare both with what this would write.
"""

from __future__ import annotations

import sys
from pathlib import Path

from deploy.check import helm

__all__ = ["COPIES", "GOLDEN", "without_golden"]

GOLDEN = helm.ROOT / "tests" / "deploy" / "golden"
_MONITORING = helm.ROOT / "deploy" / "monitoring"
_GATEWAY = helm.ROOT / "deploy" / "gateway"
COPIES = {
    helm.CHART / "files" / "rules.yaml": _MONITORING / "rules" / "lorax.yaml",
    helm.CHART / "files" / "dashboard.json": _MONITORING / "grafana" / "lorax.json",
    helm.CHART / "files" / "envoy.yaml": _GATEWAY / "envoy.yaml",
    helm.CHART / "files" / "drain.sh": _GATEWAY / "drain.sh",
    helm.CHART / "files" / "ready.sh": _GATEWAY / "ready.sh",
}
"""Helm reads nothing outside a chart, so it has copies of what is elsewhere."""


def without_golden(values: Path) -> bool:
    """Whether a variant's render is mostly a copy of files that have tests of their own."""
    return values.name == "monitoring.yaml"


def main() -> int:
    """Write both; returns the exit code."""
    binary = helm.find()
    if binary is None:
        print("there is no helm; make deploy-tools installs it", file=sys.stderr)
        return 1
    for copy, original in COPIES.items():
        copy.write_bytes(original.read_bytes())
    for values in helm.VARIANTS:
        if not without_golden(values):
            (GOLDEN / values.name).write_text(helm.render(binary, values))
    return 0


if __name__ == "__main__":
    sys.exit(main())
