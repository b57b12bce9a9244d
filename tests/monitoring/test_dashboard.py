"""The dashboard's JSON, as far as it can be checked without Grafana."""

from __future__ import annotations

import itertools
from typing import Any

from deploy.monitoring.grafana import generate
from tests.monitoring.shipped import DASHBOARD

PANELS: list[dict[str, Any]] = DASHBOARD["panels"]
GRAPHS = [panel for panel in PANELS if panel["type"] == "timeseries"]


def test_it_is_what_its_description_says() -> None:
    assert generate.dashboard() == DASHBOARD


def test_panels_have_ids_and_places_of_their_own() -> None:
    ids = [panel["id"] for panel in PANELS]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in PANELS:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        cells = set(
            itertools.product(range(at["x"], at["x"] + at["w"]), range(at["y"], at["y"] + at["h"]))
        )
        assert not cells & taken, panel["title"]
        taken |= cells


def test_every_query_asks_the_source_that_was_chosen() -> None:
    source = {"type": "prometheus", "uid": "${datasource}"}
    variables = {each["name"]: each for each in DASHBOARD["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert list(variables) == ["datasource", "job", "instance"]
    assert all(each["datasource"] == source for each in variables.values() if "refresh" in each)
    assert DASHBOARD["annotations"]["list"][0]["datasource"] == source
    for panel in GRAPHS:
        assert panel["title"]
        assert panel["description"].endswith(".")
        assert panel["datasource"] == source
        references = [target["refId"] for target in panel["targets"]]
        assert len(set(references)) == len(references) > 0
        for target in panel["targets"]:
            assert target["datasource"] == source
            assert 'job=~"$job"' in target["expr"]
            assert target["legendFormat"]
