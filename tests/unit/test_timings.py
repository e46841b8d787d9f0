"""How fast the last steps were."""

from __future__ import annotations

from typing import Any

from ps.coordinator.timings import Speed


def line(**seconds: float | None) -> dict[str, Any]:
    """A step's line of metrics.jsonl, as far as it is about time."""
    names = ("step_seconds", "compute_seconds", "push_seconds", "pull_seconds", "wait_seconds")
    return {"tokens": 100, **dict.fromkeys(names), **seconds}


def test_what_a_step_does_not_know_is_that_of_an_earlier_one() -> None:
    """Workers that report after the step is over are not waited for."""
    speed = Speed()
    assert speed.seconds == {}
    speed.note(line(step_seconds=2.0, pull_seconds=0.5, wait_seconds=0.0))
    speed.note(line(step_seconds=4.0))
    assert speed.seconds == {"step_seconds": 4.0, "pull_seconds": 0.5, "wait_seconds": 0.0}


def test_the_speed_is_that_of_the_steps_that_know_their_time() -> None:
    speed = Speed()
    assert speed.tokens_per_s is None
    assert speed.left_s(3) is None
    for seconds in (1.0, None, 3.0):
        speed.note(line(step_seconds=seconds))
    assert speed.tokens_per_s == 50.0
    assert speed.left_s(3) == 6.0
