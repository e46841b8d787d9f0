"""What a worker takes for a contribution is what it took, and ages."""

from __future__ import annotations

import pytest

from ps.coordinator.pace import FORGET_STEPS, Pace


def test_nobody_is_known_before_anybody_was_measured() -> None:
    assert Pace().of([0, 1]) == {}


def test_who_was_not_measured_is_like_the_others() -> None:
    pace = Pace()
    for rank, seconds in enumerate([1.0, 2.0, 30.0]):
        pace.took(rank, seconds)
    assert pace.of([0, 2, 7]) == {0: 1.0, 2: 30.0, 7: 2.0}


def test_the_last_measurements_count_most() -> None:
    pace = Pace()
    pace.took(0, 1.0)
    for _ in range(6):
        pace.took(0, 3.0)
    assert pace.of([0])[0] == pytest.approx(3.0, rel=0.02)


def test_who_never_finishes_is_known_by_how_long_it_tried() -> None:
    pace = Pace()
    pace.took(0, 1.0)
    pace.at_least(1, 3.0)
    pace.at_least(1, 2.0)
    pace.at_least(0, 0.5)
    assert pace.of([0, 1]) == {0: 1.0, 1: 6.0}


def test_who_is_dealt_nothing_is_given_a_chance_after_a_while() -> None:
    pace = Pace()
    pace.at_least(1, 8.0)
    for _ in range(FORGET_STEPS):
        pace.took(0, 1.0)
        pace.next_step()
    assert pace.of([0, 1]) == {0: 1.0, 1: 16.0}
    pace.took(0, 1.0)
    pace.next_step()
    assert pace.of([0, 1]) == {0: 1.0, 1: 1.0}


def test_a_new_life_begins_anew() -> None:
    pace = Pace()
    pace.took(0, 1.0)
    pace.took(1, 9.0)
    pace.forget(1)
    pace.forget(2)
    assert pace.of([0, 1]) == {0: 1.0, 1: 1.0}
