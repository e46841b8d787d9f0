"""Makes the dashboards: `python -m compose.grafana.build` writes dashboards/*.json, which are committed.

Where a panel stands and what all panels have in common is here; what they show is in training.py, cluster.py and
shard.py. A test holds that the files are what this makes, and another that every query returns data in a real run.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

from compose.grafana import cluster, shard, training
from compose.grafana.panel import Panel

FOLDER = Path(__file__).parent / "dashboards"
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
#: The grid is 24 wide.
WIDTH = 24

DASHBOARDS: dict[str, tuple[str, ModuleType]] = {
    "training": ("Windlass: training", training),
    "cluster": ("Windlass: cluster", cluster),
    "shard": ("Windlass: shards", shard),
}


def _panel_json(number: int, panel: Panel, x: int, y: int) -> dict[str, Any]:
    custom: dict[str, Any] = {}
    options: dict[str, Any] = {}
    if panel.kind == "timeseries":
        custom = {
            "drawStyle": "line",
            "fillOpacity": 30 if panel.stacked else 0,
            "lineWidth": 1,
            "showPoints": "auto",
            "spanNulls": False,
            "stacking": {"group": "A", "mode": "normal" if panel.stacked else "none"},
            "scaleDistribution": {"type": "log", "log": 2} if panel.log_scale else {"type": "linear"},
        }
        options = {
            "legend": {"calcs": ["lastNotNull"], "displayMode": "table", "placement": "bottom", "showLegend": True},
            "tooltip": {"mode": "multi", "sort": "desc"},
        }
    elif panel.kind == "stat":
        options = {
            "colorMode": "value",
            "graphMode": "area",
            "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
            "textMode": "auto",
        }
    else:
        options = {
            "calculate": False,
            "cellGap": 1,
            "color": {"mode": "scheme", "scheme": "Oranges", "steps": 64},
            "tooltip": {"mode": "single", "yHistogram": True},
            "yAxis": {"unit": panel.unit, "axisPlacement": "left"},
        }
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": DATASOURCE,
        "gridPos": {"x": x, "y": y, "w": panel.width, "h": panel.height},
        "fieldConfig": {
            "defaults": {
                "color": {"mode": "thresholds" if "thresholds" in panel.defaults else "palette-classic"},
                **panel.defaults,
                "unit": panel.unit,
                "custom": custom,
            },
            "overrides": [],
        },
        "options": options,
        "targets": [
            {
                "refId": chr(ord("A") + index),
                "datasource": DATASOURCE,
                "editorMode": "code",
                "expr": query.expr,
                "format": "heatmap" if query.heatmap else "time_series",
                "legendFormat": query.legend,
                "range": True,
            }
            for index, query in enumerate(panel.queries)
        ],
    }


def _panels_json(panels: tuple[Panel, ...]) -> list[dict[str, Any]]:
    """Fill rows from left to right; a row is as high as its first panel."""
    placed, x, y, row = [], 0, 0, 0
    for number, panel in enumerate(panels, start=1):
        if x + panel.width > WIDTH:
            x, y = 0, y + row
        if x == 0:
            row = panel.height
        placed.append(_panel_json(number, panel, x, y))
        x += panel.width
    return placed


def _variables() -> list[dict[str, Any]]:
    runs = "label_values(windlass_run_info, run)"
    return [
        {
            "name": "datasource",
            "label": "Prometheus",
            "type": "datasource",
            "query": "prometheus",
            "refresh": 1,
            "multi": False,
            "includeAll": False,
            "hide": 0,
        },
        {
            "name": "run",
            "label": "Run",
            "type": "query",
            "datasource": DATASOURCE,
            "definition": runs,
            "query": {"qryType": 1, "query": runs, "refId": "run"},
            # When the time range changes: it says which runs there were.
            "refresh": 2,
            "regex": "",
            # Descending: run folders are named by time, and the newest is chosen first.
            "sort": 2,
            "multi": True,
            "includeAll": False,
            "hide": 0,
        },
    ]


def dashboard(name: str) -> dict[str, Any]:
    """One dashboard, as Grafana's JSON model."""
    title, module = DASHBOARDS[name]
    return {
        "uid": f"windlass-{name}",
        "title": title,
        "description": module.__doc__,
        "tags": ["windlass"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "timezone": "browser",
        "annotations": {"list": []},
        "links": [
            {
                "type": "dashboards",
                "title": "Windlass",
                "tags": ["windlass"],
                "asDropdown": False,
                "includeVars": True,
                "keepTime": True,
                "targetBlank": False,
                "icon": "external link",
            }
        ],
        "templating": {"list": _variables()},
        "panels": _panels_json(module.PANELS),
    }


def rendered(name: str) -> str:
    """The text of dashboards/NAME.json."""
    return json.dumps(dashboard(name), indent=2) + "\n"


if __name__ == "__main__":
    for each in DASHBOARDS:
        (FOLDER / f"{each}.json").write_text(rendered(each), encoding="utf-8")
