"""A set of steps behaves as a set of numbers does, and is small where they follow each other."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ps.coordinator.step_set import StepSet

STEPS = st.integers(0, 30)


@given(st.lists(st.tuples(st.sampled_from(["add", "drop"]), STEPS), max_size=60))
def test_it_is_a_set(does: list[tuple[str, int]]) -> None:
    steps, expected = StepSet(), set[int]()
    for what, step in does:
        if what == "add":
            steps.add(step)
            expected.add(step)
        else:
            steps.drop_from(step)
            expected = {other for other in expected if other < step}
        assert list(steps) == sorted(expected)
        assert all((other in steps) == (other in expected) for other in range(-1, 32))
        assert list(StepSet(steps.runs())) == sorted(expected)
        assert all(last + 1 < first for (_, last), (first, _) in zip(steps.runs(), steps.runs()[1:], strict=False))


def test_steps_that_follow_each_other_are_one_run() -> None:
    steps = StepSet()
    for step in range(1000):
        steps.add(step)
    assert steps.runs() == [(0, 999)]
    assert "7" not in steps
