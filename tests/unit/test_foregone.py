"""What is foregone of a step: all that its decision will do to the state, before any report."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ps.config import RunConfig
from ps.coordinator.decision import TrainingState, decide, foregone
from ps.coordinator.loss_scaler import LossScaler
from ps.types import ContributionReport, Decision, Fence, Prepared

FENCE = Fence(3, 7)


def config(**sections: Any) -> RunConfig:
    return RunConfig.model_validate(
        {"batch": {"micro_batches_per_step": 4}, "precision": {"wire": "bf16"}, "optimizer": {"clip_norm": 0}}
        | sections
    )


def decided(job: RunConfig, state: TrainingState, squares: list[float]) -> Decision:
    reports = (ContributionReport(0, 2.5, 100, 0, 11), ContributionReport(1, 7.5, 28, 1, 12))
    return decide(job, state, [Prepared(FENCE, state.version, 0, tuple(squares), reports)], FENCE)


states = st.builds(
    lambda applied, skipped: TrainingState(applied + skipped, applied, skipped, LossScaler(1.0, 2, -1)),
    st.integers(0, 900),
    st.integers(0, 9),
)


@given(
    state=states,
    squares=st.lists(st.floats(0, 1e80), min_size=1, max_size=8),
    name=st.sampled_from(["adamw", "adam", "sgd"]),
    wire=st.sampled_from(["bf16", "fp32"]),
    schedule=st.sampled_from(["constant", "linear", "cosine"]),
    static=st.sampled_from([0, 64.0]),
)
def test_it_updates_as_the_decision_does(
    state: TrainingState, squares: list[float], name: str, wire: str, schedule: str, static: float
) -> None:
    job = config(
        optimizer={"name": name, "clip_norm": 0, "weight_decay": 0.1},
        precision={"wire": wire, "loss_scale": {"static": static}},
        schedule={"name": schedule},
        checkpoint={"every_steps": 5},
    )
    state = replace(state, scaler=LossScaler(static or 1.0, 2))
    found, decision = foregone(job, state, FENCE), decided(job, state, squares)
    assert found is not None
    assert decision.updates_as(found)
    described = {"loss": decision.loss, "tokens": decision.tokens, "gradient_norm": decision.gradient_norm}
    assert replace(found, **described) == decision


@pytest.mark.parametrize("square", [math.inf, math.nan])
def test_an_overflow_is_not_foreseen(square: float) -> None:
    state = TrainingState(3, 3, 0, LossScaler(1.0, 2))
    found, decision = foregone(config(), state, FENCE), decided(config(), state, [1.0, square])
    assert found is not None
    assert decision.skip
    assert not found.skip
    assert not decision.updates_as(found)


@pytest.mark.parametrize(
    "sections",
    [
        {"precision": {"wire": "fp16"}},
        {"precision": {"wire": "bf16", "compute": "fp16", "loss_scale": {"static": 64.0}}},
        {"optimizer": {"clip_norm": 1.0}},
        {"optimizer": {}},
        {"training": {"eager": False}},
    ],
    ids=["fp16 wire", "fp16 compute", "clipping", "clipping by default", "switched off"],
)
def test_where_it_depends_on_the_reports_nothing_is_foregone(sections: dict[str, Any]) -> None:
    job = config(**sections)
    assert foregone(job, TrainingState.start(job), FENCE) is None


def test_what_only_describes_a_step_does_not_change_what_it_does() -> None:
    state = TrainingState(3, 3, 0, LossScaler(1.0, 2))
    decision = decided(config(), state, [1.0])
    same = {"fence": Fence(9, 9), "loss": 0.0, "tokens": 1, "gradient_norm": 2.0, "snapshot": True, "loss_scale": 9.0}
    assert replace(decision, **same).updates_as(decision)  # type: ignore[arg-type]
    other: dict[str, Any] = {
        "step": 4,
        "skip": True,
        "applied": 9,
        "gradient_multiplier": 0.5,
        "groups": decision.groups[:1],
        "bias_correction1": 0.5,
        "bias_correction2": 0.5,
    }
    for name, value in other.items():
        assert not replace(decision, **{name: value}).updates_as(decision), name
