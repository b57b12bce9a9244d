"""The rules file: promtool's checks and tests, and a section of the runbook for each alert."""

from __future__ import annotations

import re
from typing import Any
from unittest.mock import Mock

import pytest
import yaml
from prometheus_client.core import Metric

from lorax_serve.metrics import Metrics
from tests.monitoring.prometheus import needs_prometheus, promtool
from tests.monitoring.shipped import ALERTS, MONITORING, RECORDS, ROOT, RULES, SHOWN, documented

RUNBOOKS = ROOT / "docs/runbooks.md"
UNIT_TESTS = sorted((MONITORING / "rules/tests").glob("*.yaml"))
# What Prometheus itself makes of every scrape, and what Envoy exports: tests/cluster asks it.
OF_OTHERS = {
    *("up", "ALERTS", "envoy_cluster_membership_healthy", "envoy_sds_key_rotation_failed"),
    "envoy_server_days_until_first_cert_expiring",
    "envoy_listener_server_ssl_socket_factory_ssl_context_update_by_sds",
}


@needs_prometheus
def test_promtool_takes_the_rules() -> None:
    assert "SUCCESS" in promtool("check", "rules", RULES)


@needs_prometheus
@pytest.mark.parametrize("file", UNIT_TESTS, ids=lambda file: file.stem)
def test_promtool_s_unit_tests(file: Any) -> None:
    assert "SUCCESS" in promtool("test", "rules", file)


def test_each_alert_is_tested_both_ways() -> None:
    cases = [
        case
        for file in UNIT_TESTS
        for test in yaml.safe_load(file.read_text(encoding="utf-8"))["tests"]
        for case in test.get("alert_rule_test", [])
    ]
    fires = {case["alertname"] for case in cases if case.get("exp_alerts")}
    silent = {case["alertname"] for case in cases if not case.get("exp_alerts")}
    assert fires == silent == set(ALERTS)


@pytest.mark.parametrize("name", ALERTS)
def test_each_alert_says_what_it_is(name: str) -> None:
    alert = ALERTS[name]
    assert alert["labels"]["severity"] in ("critical", "warning", "info")
    assert set(alert["annotations"]) == {"summary", "description", "runbook_url"}
    assert alert["annotations"]["runbook_url"] == f"docs/runbooks.md#{name.lower()}"


def test_each_alert_has_its_section_and_each_section_its_alert() -> None:
    text = RUNBOOKS.read_text(encoding="utf-8")
    assert re.findall(r"^### (\w+)$", text, re.M) == list(ALERTS)
    for section in re.split(r"^### ", text, flags=re.M)[1:]:
        for part in ("**Means.**", "**Confirm.**", "**Do.**"):
            assert section.count(part) == 1, section.splitlines()[0]


def exported() -> list[Metric]:
    """All families of metrics of a server that follows a manifest."""
    metrics = Metrics()
    metrics.watch_manifest(Mock(wanted=0, read_errors=0))
    return list(metrics.registry.collect())


def test_each_metric_has_one_name_and_one_meaning() -> None:
    names = [family.name for family in exported()]
    meanings = [family.documentation for family in exported()]
    assert len(set(names)) == len(names)
    assert len(set(meanings)) == len(meanings)


def test_every_metric_that_is_asked_for_exists() -> None:
    """Also where no Prometheus is: a metric that is renamed takes its alerts with it."""
    there = {
        sample
        for family in exported()
        for sample in (
            [f"{family.name}_{end}" for end in ("bucket", "count", "sum")]
            if family.type == "histogram"
            else [f"{family.name}_total" if family.type == "counter" else family.name]
        )
    }
    recorded = set(re.findall(r"record: (\S+)", RULES.read_text(encoding="utf-8")))
    queries = [*RECORDS, *(alert["expr"] for alert in ALERTS.values())]
    queries += [query for panel in SHOWN.values() for query in panel]
    queries += [*documented(RUNBOOKS), *documented(MONITORING / "README.md")]
    for query in queries:
        names = set(re.findall(r"\b(?:lorax[:_]|process_|envoy_)[\w:]+|\bup\b", query))
        names.discard("envoy_cluster_name")  # a label
        assert names or query == "vector(0.01)", query
        assert names <= there | recorded | OF_OTHERS, query
