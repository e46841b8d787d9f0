"""The decision: a pure function of what the shards report, however it is spread over them."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ps.config import RunConfig
from ps.coordinator.decision import TrainingState, after, decide, is_snapshot_due, same_content
from ps.coordinator.loss_scaler import LossScaler
from ps.types import ContributionReport, Decision, Fence, Prepared

FENCE = Fence(3, 7)
SCALE = 1024.0
STATE = TrainingState(10, 8, 2, LossScaler(SCALE, 2, 4))
REPORTS = (ContributionReport(0, 2.5, 100, 0, 11), ContributionReport(1, 7.5, 28, 1, 12))

squares = st.floats(0, 1e300, allow_subnormal=True)


def config(**sections: Any) -> RunConfig:
    return RunConfig.model_validate({"batch": {"micro_batches_per_step": 4}, **sections})


def prepared(shard: int, values: Sequence[float], contributions: Sequence[ContributionReport] = REPORTS) -> Prepared:
    return Prepared(FENCE, STATE.version, shard, tuple(values), tuple(contributions))


def decide_on(*values: float, state: TrainingState = STATE, **sections: Any) -> Decision:
    """Decide on one shard's segments."""
    return decide(config(**sections), state, [prepared(0, values)], FENCE)


# -- A pure function --------------------------------------------------------------------------------


@given(values=st.lists(squares, min_size=1, max_size=30), shards=st.integers(1, 6), seed=st.integers(0, 2**32))
def test_neither_the_spread_of_segments_nor_the_order_of_reports_matters(
    values: list[float], shards: int, seed: int
) -> None:
    rng = random.Random(seed)
    spread: list[list[float]] = [[] for _ in range(shards)]
    for value in rng.sample(values, len(values)):
        rng.choice(spread).append(value)
    reports = [prepared(shard, mine, rng.sample(REPORTS, len(REPORTS))) for shard, mine in enumerate(spread)]
    rng.shuffle(reports)
    assert decide(config(), STATE, reports, FENCE) == decide_on(*values)


@given(values=st.lists(squares, min_size=1, max_size=30))
def test_the_norm_is_that_of_the_exact_sum(values: list[float]) -> None:
    total = sum(map(Fraction, values))
    if total < Fraction(10) ** 305:
        assert decide_on(*values).gradient_norm == math.sqrt(float(total)) / SCALE


def test_the_report_of_the_first_shard_gives_the_loss() -> None:
    """Where two shards heard of a contribution from two lives of a device that does not repeat its bits."""
    other = (REPORTS[0], replace(REPORTS[1], loss_sum=7.5000001))
    reports = [prepared(1, [1.0], other), prepared(0, [1.0])]
    assert decide(config(), STATE, reports, FENCE).loss == decide(config(), STATE, reports[::-1], FENCE).loss == 2.5


def test_what_a_decision_says_of_a_committed_step() -> None:
    decision = decide_on((3.0 * SCALE) ** 2, (4.0 * SCALE) ** 2, optimizer={"clip_norm": 0})
    assert (decision.fence, decision.step, decision.version) == (FENCE, 10, 11)
    assert (decision.skip, decision.applied, decision.skipped) == (False, 9, 2)
    assert decision.gradient_norm == 5.0
    assert decision.loss == (2.5 + 7.5) / 4
    assert decision.tokens == 128
    assert decision.loss_scale == SCALE
    assert decision.gradient_multiplier == 1 / SCALE


def test_the_state_after_a_decision_is_in_the_decision() -> None:
    decision = decide_on(math.inf)
    assert after(STATE, decision) == TrainingState(11, 8, 3, LossScaler(SCALE, 1, 10))
    assert after(after(STATE, decision), replace(decide_on(1.0), step=11)).version == 12


# -- Skip -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [[math.inf], [math.nan], [math.inf, math.nan], [1e308, 1e308, 1e308]])
@pytest.mark.parametrize("where", [0, 1, 2])
def test_one_segment_that_is_not_finite_skips_the_step_everywhere(bad: list[float], where: int) -> None:
    reports = [prepared(shard, [1.0, *(bad if shard == where else [])]) for shard in range(3)]
    decision = decide(config(), STATE, reports, FENCE)
    assert decision.skip
    assert (decision.applied, decision.skipped, decision.version) == (8, 3, 11)
    assert not math.isfinite(decision.gradient_norm)
    assert decision.gradient_multiplier == 0.0
    assert math.isfinite(decision.loss)
    assert (decision.next_loss_scale, decision.next_hysteresis, decision.next_last_overflow) == (SCALE, 1, 10)
    again = decide(config(), STATE, reports[::-1], FENCE)
    assert same_content(decision, again), "NaN must equal NaN here"


def test_the_largest_finite_sum_is_no_overflow() -> None:
    assert not decide_on(1e308, 7e307).skip


def test_a_skip_moves_neither_schedule_nor_bias_correction() -> None:
    skipped = decide_on(math.inf)
    committed = decide_on(1.0, state=after(STATE, skipped))
    straight = decide_on(1.0)
    assert committed.applied == straight.applied
    assert committed.groups == straight.groups
    assert (committed.bias_correction1, committed.bias_correction2) == (
        straight.bias_correction1,
        straight.bias_correction2,
    )


def test_only_fp16_on_the_wire_moves_the_scale() -> None:
    state = replace(STATE, scaler=LossScaler(1.0, 1, -1))
    decision = decide_on(math.inf, state=state, precision={"wire": "fp32"})
    assert decision.skip
    assert decision.next_loss_scale == 1.0


# -- Clip -------------------------------------------------------------------------------------------


def torch_clip_coefficient(norm: float, clip_norm: float) -> float:
    """As torch.nn.utils.clip_grad_norm_ and DeepSpeed have it."""
    return min(1.0, clip_norm / (norm + 1e-6))


@pytest.mark.parametrize("clip_norm", [0.5, 1.0, 7.0])
@pytest.mark.parametrize("norm", [0.0, 0.1, 0.9999995, 1.0, 4.0, 1e6])
def test_the_norm_is_clipped_as_torch_does(norm: float, clip_norm: float) -> None:
    decision = decide_on((norm * SCALE) ** 2, optimizer={"clip_norm": clip_norm})
    assert decision.gradient_norm == pytest.approx(norm, rel=1e-15)
    assert decision.gradient_multiplier * SCALE == pytest.approx(torch_clip_coefficient(norm, clip_norm), rel=1e-15)
    assert decision.gradient_multiplier * SCALE * norm <= clip_norm


def test_zero_never_clips() -> None:
    assert decide_on((1e9 * SCALE) ** 2, optimizer={"clip_norm": 0}).gradient_multiplier == 1 / SCALE


# -- Scalars of the update --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adamw", "adam"])
@pytest.mark.parametrize("applied", [0, 1, 9999, 10**6])
def test_bias_corrections_count_committed_steps(name: str, applied: int) -> None:
    state = replace(STATE, applied=applied)
    decision = decide_on(1.0, state=state, optimizer={"name": name, "betas": [0.9, 0.95]})
    assert decision.applied == applied + 1
    assert decision.bias_correction1 == 1.0 - 0.9 ** (applied + 1)
    assert decision.bias_correction2 == 1.0 - 0.95 ** (applied + 1)


def test_sgd_and_a_skipped_first_step_have_no_bias_correction() -> None:
    sgd = decide_on(1.0, optimizer={"name": "sgd"})
    first = decide_on(math.nan, state=TrainingState.start(config()))
    assert (sgd.bias_correction1, sgd.bias_correction2) == (1.0, 1.0)
    assert (first.bias_correction1, first.bias_correction2) == (1.0, 1.0)


def test_the_second_group_does_not_decay_and_both_follow_the_schedule() -> None:
    decision = decide_on(
        1.0,
        optimizer={"lr": 0.5, "weight_decay": 0.25},
        schedule={"name": "linear", "warmup_steps": 0, "min_ratio": 0.0},
        training={"steps": 17},
    )
    # 8 of the 16 parts of the way down are gone.
    assert [group.lr for group in decision.groups] == [0.25, 0.25]
    assert [group.weight_decay for group in decision.groups] == [0.25, 0.0]


# -- Snapshots --------------------------------------------------------------------------------------


def test_a_snapshot_is_due_every_so_many_steps_and_at_the_end() -> None:
    chosen = config(training={"steps": 10}, checkpoint={"every_steps": 4})
    assert [version for version in range(1, 11) if is_snapshot_due(chosen, version)] == [4, 8, 10]
    stopping = config(training={"steps": 10, "stop_at": 7}, checkpoint={"every_steps": 0})
    assert stopping.training.end == 7
    assert [version for version in range(1, 8) if is_snapshot_due(stopping, version)] == [7]
    assert decide_on(1.0, training={"steps": 11}).snapshot
    assert not decide_on(1.0, training={"steps": 12}).snapshot
