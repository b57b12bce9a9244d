"""Rules whose durations are divided, for tests in which alerts fire."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from deploy.monitoring.durations import shortened
from tests.monitoring.prometheus import needs_prometheus, promtool
from tests.monitoring.shipped import RULES

TEXT = RULES.read_text(encoding="utf-8")


def test_only_durations_change() -> None:
    rule = "  interval: 30s\n- record: a:ratio5m\n  expr: rate(b[5m] offset 1h) > 5\n  for: 2m\n"
    assert shortened(rule, 60) == (
        "  interval: 500ms\n- record: a:ratio5m\n  expr: rate(b[5000ms] offset 60000ms) > 5\n"
        "  for: 2000ms\n"
    )


def test_all_durations_of_the_shipped_rules_change() -> None:
    short = shortened(TEXT, 60)
    assert not re.search(r"\[\d+(s|m|h|d)\]", short)
    before, after = yaml.safe_load(TEXT), yaml.safe_load(short)
    durations = 0
    for old, new in zip(before["groups"], after["groups"], strict=True):
        durations += "interval" in old
        assert new.get("interval") != old.get("interval") or "interval" not in old
        for rule, changed in zip(old["rules"], new["rules"], strict=True):
            different = {key for key in rule if rule[key] != changed[key]}
            ranged = {"expr"} if "[" in rule["expr"] else set()
            assert different == ranged | ({"for"} & rule.keys())
            durations += len(different)
    assert durations > 20


@needs_prometheus
def test_short_rules_are_rules(tmp_path: Path) -> None:
    (tmp_path / "short.yaml").write_text(shortened(TEXT, 60), encoding="utf-8")
    assert "SUCCESS" in promtool("check", "rules", tmp_path / "short.yaml")
