"""What a panel is: a title, a sentence, a unit and queries; and the kinds that come up again and again."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

RUN = '{run=~"$run"}'
RATE = "[$__rate_interval]"


@dataclass(frozen=True)
class Query:
    """One query of a panel."""

    expr: str
    legend: str = "{{run}}"
    heatmap: bool = False


@dataclass(frozen=True)
class Panel:
    """One panel; its place follows from the order."""

    title: str
    description: str
    unit: str
    queries: tuple[Query, ...]
    kind: str = "timeseries"
    width: int = 12
    height: int = 8
    #: Further keys of fieldConfig.defaults.
    defaults: dict[str, Any] = field(default_factory=dict)
    stacked: bool = False
    log_scale: bool = False


def stat(title: str, description: str, unit: str, expr: str, **defaults: Any) -> Panel:
    """One number for each run."""
    return Panel(title, description, unit, (Query(expr),), "stat", width=4, height=4, defaults=defaults)


def heatmap(title: str, description: str, histogram: str) -> Panel:
    """How a histogram of seconds moves, over all processes of the chosen runs."""
    expr = f"sum by (le) (increase({histogram}_bucket{RUN}{RATE}))"
    return Panel(title, description, "s", (Query(expr, "{{le}}", heatmap=True),), "heatmap")


def thresholds(*steps: tuple[str, float | None]) -> dict[str, Any]:
    return {"mode": "absolute", "steps": [{"color": color, "value": value} for color, value in steps]}


RED_ABOVE_0 = thresholds(("green", None), ("red", 1))
FIRING = stat(
    "Firing alerts",
    "Alerts of these runs that are firing now; Prometheus' page of alerts says what to do about each.",
    "none",
    'count(ALERTS{run=~"$run", alertstate="firing"}) or vector(0)',
    thresholds=RED_ABOVE_0,
)
