"""The learning rate's factor: its shape, its edges, always finite."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ps.config import ScheduleConfig
from ps.coordinator.schedule import learning_rate_factor


def factors(steps: int, name: str = "cosine", warmup: int = 0, min_ratio: float = 0.1) -> list[float]:
    config = ScheduleConfig(name=name, warmup_steps=warmup, min_ratio=min_ratio)  # type: ignore[arg-type]
    return [learning_rate_factor(config, applied, steps) for applied in range(steps)]


def test_the_warmup_rises_in_equal_parts_and_its_last_step_has_the_peak() -> None:
    assert factors(6, "constant", warmup=4) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_without_a_warmup_the_first_step_has_the_peak() -> None:
    assert [factors(5, name)[0] for name in ("constant", "linear", "cosine")] == [1.0, 1.0, 1.0]


def test_linear_falls_in_equal_parts_to_the_minimum() -> None:
    assert factors(7, "linear", warmup=2, min_ratio=0.0) == pytest.approx([0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0])


def test_cosine_falls_as_half_a_cosine() -> None:
    found = factors(5, "cosine", min_ratio=0.2)
    assert found == pytest.approx([0.2 + 0.8 * (1 + math.cos(math.pi * i / 4)) / 2 for i in range(5)], abs=1e-15)
    assert found[2] == pytest.approx(0.6)


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("min_ratio", [0.0, 0.1, 1.0])
def test_the_last_step_has_the_minimum(name: str, min_ratio: float) -> None:
    assert factors(30, name, warmup=5, min_ratio=min_ratio)[-1] == pytest.approx(min_ratio, abs=1e-15)


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
def test_a_run_of_one_step_has_the_peak(name: str) -> None:
    assert factors(1, name) == [1.0]


def test_a_run_shorter_than_its_warmup_only_rises() -> None:
    assert factors(3, warmup=10) == pytest.approx([0.1, 0.2, 0.3])


@given(
    name=st.sampled_from(["constant", "linear", "cosine"]),
    warmup=st.integers(0, 50),
    steps=st.integers(1, 60),
    applied=st.integers(0, 200),
    min_ratio=st.floats(0, 1),
)
def test_it_is_finite_and_between_nothing_and_the_peak(
    name: str, warmup: int, steps: int, applied: int, min_ratio: float
) -> None:
    """Also beyond the last step: where a run was resumed with fewer steps."""
    config = ScheduleConfig(name=name, warmup_steps=warmup, min_ratio=min_ratio)  # type: ignore[arg-type]
    factor = learning_rate_factor(config, applied, steps)
    assert math.isfinite(factor)
    assert 0.0 <= factor <= 1.0
    if applied >= warmup:
        assert factor >= min_ratio - 1e-15
        assert learning_rate_factor(config, applied + 1, steps) <= factor
