"""What counts as a regression of a benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.support import baseline
from benchmarks.support.baseline import Baseline, Figure, Measured, bounds_of, compare, median_of, rises


def checks(**values: float) -> list[dict[str, Any]]:
    """`speed` has to be at least 2, `cost` at most 1.3."""
    said = {"speed": (2.0, lambda value: value >= 2.0), "cost": (1.3, lambda value: value <= 1.3)}
    return [
        {"name": name, "value": value, "bound": said[name][0], "ok": said[name][1](value)}
        for name, value in values.items()
    ]


@pytest.mark.parametrize(("speed", "cost"), [(3.0, 1.0), (1.5, 1.0), (3.0, 1.4), (1.5, 1.4)])
def test_the_direction_of_a_bound_shows_whether_it_was_met_or_not(speed: float, cost: float) -> None:
    assert [rises(check) for check in checks(speed=speed, cost=cost)] == [True, False]


@pytest.mark.parametrize(
    ("speed", "cost", "ok"),
    [
        (2.5, 1.0, [True, True]),
        (5.0, 0.5, [True, True]),
        (2.0, 1.25, [True, True]),
        (1.99, 1.0, [False, True]),
        (2.5, 1.26, [True, False]),
    ],
)
def test_a_ratio_may_fall_to_four_fifths(speed: float, cost: float, ok: list[bool]) -> None:
    figures = {"speed": Figure(2.5, True), "cost": Figure(1.0, False)}
    assert [outcome.ok for outcome in compare(figures, [checks(speed=speed, cost=cost)])] == ok


def test_a_second_run_may_save_each_ratio() -> None:
    figures = {"speed": Figure(2.5, True), "cost": Figure(1.0, False)}
    runs = [checks(speed=1.0, cost=1.0), checks(speed=2.4, cost=5.0)]
    outcomes = compare(figures, runs)
    assert [(outcome.name, outcome.measured, outcome.ok) for outcome in outcomes] == [
        ("speed", 2.4, True),
        ("cost", 1.0, True),
    ]


def test_what_is_not_measured_any_more_is_lost_and_what_is_new_has_nothing_to_keep() -> None:
    (lost,) = compare({"speed": Figure(2.5, True)}, [checks(cost=1.0), checks(cost=1.0)])
    assert (lost.measured, lost.kept, lost.ok) == (None, 0.0, False)


def test_elsewhere_the_bounds_stand_in() -> None:
    found = checks(speed=1.7, cost=2.0)
    assert bounds_of(found) == {"speed": Figure(2.0, True), "cost": Figure(1.3, False)}
    assert [outcome.ok for outcome in compare(bounds_of(found), [found])] == [True, False]


def test_figures_are_medians() -> None:
    runs = [checks(speed=speed, cost=1.0) for speed in (2.1, 9.0, 3.00049)]
    assert median_of(runs) == {"speed": Figure(3.0, True), "cost": Figure(1.0, False)}


def test_a_baseline_is_kept_for_each_kind_of_hardware(tmp_path: Path) -> None:
    path = tmp_path / "baseline.json"
    assert baseline.read(path) == []
    measured = Measured("2026-11-23", {"numba": "1"}, {"cost": Figure(1.0, False)})
    kinds = [Baseline(cpu, 2, {"optimizer": measured}) for cpu in ("a", "b")]
    baseline.write(path, kinds)
    assert baseline.read(path) == kinds
    assert kinds[0].is_of({"cpu": "a", "cores": 2, "system": "any"})
    assert not kinds[0].is_of({"cpu": "a", "cores": 4, "system": "any"})
