"""What ``deploy/monitoring`` has: rules, alerts, and every query that somebody may run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

__all__ = ["ALERTS", "DASHBOARD", "MONITORING", "RECORDS", "ROOT", "RULES", "SHOWN", "documented"]

ROOT = Path(__file__).parents[2]
MONITORING = ROOT / "deploy/monitoring"
RULES = MONITORING / "rules/lorax.yaml"
DASHBOARD: dict[str, Any] = json.loads((MONITORING / "grafana/lorax.json").read_text("utf-8"))

_RULES = [
    rule
    for group in yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]
    for rule in group["rules"]
]
ALERTS: dict[str, dict[str, Any]] = {rule["alert"]: rule for rule in _RULES if "alert" in rule}
RECORDS: list[str] = [rule["expr"] for rule in _RULES if "record" in rule]
SHOWN: dict[str, list[str]] = {
    panel["title"]: [target["expr"] for target in panel["targets"]]
    for panel in DASHBOARD["panels"]
    if panel["type"] != "row"
}
"""PromQL of the dashboard, by panel."""


def documented(page: Path) -> list[str]:
    """PromQL in the fences of a page, one a line."""
    fences = re.findall(r"```promql\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
    return [line for fence in fences for line in fence.splitlines() if line]
