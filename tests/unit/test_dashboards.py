"""The committed dashboards: made of the modules beside them, each panel complete, each query for chosen runs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from compose.grafana.build import DASHBOARDS, DATASOURCE, FOLDER, WIDTH, rendered

NAMES = sorted(DASHBOARDS)
GRAFANA = FOLDER.parent
RULES = GRAFANA.parent / "prometheus" / "rules"


def read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())
    return found


def panels(name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = read(name)["panels"]
    return found


@pytest.mark.parametrize("name", NAMES)
def test_the_file_is_what_the_modules_make(name: str) -> None:
    assert (FOLDER / f"{name}.json").read_text() == rendered(name), "run python -m compose.grafana.build"


def test_there_is_no_other_file() -> None:
    assert sorted(path.name for path in FOLDER.iterdir()) == [f"{name}.json" for name in NAMES]


@pytest.mark.parametrize("name", NAMES)
def test_a_dashboard_is_found_by_its_uid_and_has_both_variables(name: str) -> None:
    model = read(name)
    assert model["uid"] == f"windlass-{name}"
    assert "id" not in model, "Grafana gives ids"
    datasource, run = model["templating"]["list"]
    assert (datasource["name"], datasource["type"], datasource["query"]) == ("datasource", "datasource", "prometheus")
    assert (run["name"], run["type"], run["datasource"]) == ("run", "query", DATASOURCE)
    assert run["query"]["query"] == "label_values(windlass_run_info, run)"


@pytest.mark.parametrize("name", NAMES)
def test_every_panel_says_what_it_shows(name: str) -> None:
    for panel in panels(name):
        title = panel["title"]
        assert panel["datasource"] == DATASOURCE == {"type": "prometheus", "uid": "${datasource}"}, title
        assert panel["description"].endswith("."), title
        assert panel["fieldConfig"]["defaults"]["unit"], title
        assert panel["targets"], title
        for target in panel["targets"]:
            assert target["datasource"] == DATASOURCE, title
            assert target["legendFormat"], title
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"]), title


@pytest.mark.parametrize("name", NAMES)
def test_every_selector_is_of_the_chosen_runs(name: str) -> None:
    """Also on the right of a division: otherwise it would divide by another run's."""
    for panel in panels(name):
        for target in panel["targets"]:
            expr = target["expr"]
            selectors = re.findall(r"\{[^}]*\}", expr)
            assert selectors, expr
            assert all('run=~"$run"' in selector for selector in selectors), expr
            # No name stands without a selector.
            outside = re.sub(r"\{[^}]*\}", "{", expr)
            names = re.findall(r"(?<![\w:])(?:windlass[_:][\w:]*\w|process_\w+|ALERTS)(?![\w:{])", outside)
            assert names == [], expr


@pytest.mark.parametrize("name", NAMES)
def test_panels_fill_the_grid_and_do_not_overlap(name: str) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in panels(name):
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= WIDTH
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells
    assert len(taken) == WIDTH * (1 + max(y for _, y in taken)), "a gap in the layout"


def test_provisioning_names_what_the_dashboards_use() -> None:
    datasources = yaml.safe_load((GRAFANA / "provisioning" / "datasources" / "prometheus.yml").read_text())
    assert [source["uid"] for source in datasources["datasources"]] == ["windlass-prometheus"]
    providers = yaml.safe_load((GRAFANA / "provisioning" / "dashboards" / "windlass.yml").read_text())["providers"]
    assert [provider["options"]["path"] for provider in providers] == ["/var/lib/grafana/dashboards"]


def test_every_alert_says_what_to_do() -> None:
    groups = yaml.safe_load((RULES / "alerts.yml").read_text())["groups"]
    alerts = [rule for group in groups for rule in group["rules"]]
    tests = (Path(RULES.parent) / "tests" / "alerts.yml").read_text()
    for alert in alerts:
        assert alert["labels"]["severity"] in ("warning", "critical")
        assert "{{ $labels.run }}" in alert["annotations"]["summary"]
        assert len(alert["annotations"]["description"]) > 80
        # It is seen to fire; that it does not fire beside that is in the same test.
        assert f'alertname="{alert["alert"]}"' in tests
    assert len({alert["alert"] for alert in alerts}) == len(alerts)


def test_every_recorded_name_is_of_a_run() -> None:
    groups = yaml.safe_load((RULES / "recording.yml").read_text())["groups"]
    for rule in (rule for group in groups for rule in group["rules"]):
        assert re.fullmatch(r"windlass:\w+:\w+", rule["record"])
        assert "by (run" in rule["expr"] or "windlass:" in rule["expr"]
