"""The coordinator's state machine where steps are eager: what is foregone, overflows, stops and new lives."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ps.config import RunConfig
from ps.coordinator.actions import (
    Configure,
    Control,
    Journal,
    TellDecision,
    TellForegone,
    TellSnapshot,
)
from ps.coordinator.decision import same_content
from ps.coordinator.history import History
from ps.coordinator.recovery import Inspection, can_complete
from ps.coordinator.run import Phase
from ps.types import Role
from tests.support.fake_run import FakeRun, make_config


def eager_config(run_dir: Path, **sections: Any) -> RunConfig:
    """2 shards, 2 workers, C = 2, 6 steps, a checkpoint every 3; nothing is clipped."""
    config = make_config(run_dir, **{"precision": {"wire": "bf16"}, "optimizer": {"clip_norm": 0.0}, **sections})
    assert config.is_eager
    return config


#: Of the 6 steps. The first one's reports are there before its checkpoint is, and so it is decided at once.
FORESEEN = [1, 2, 3, 4, 5]


@pytest.fixture
def run(tmp_path: Path) -> FakeRun:
    return FakeRun(eager_config(tmp_path))


def without(config: RunConfig) -> RunConfig:
    """The same job, decided."""
    return config.model_copy(update={"training": config.training.model_copy(update={"eager": False})})


def decided(config: RunConfig, overflows: set[int] = frozenset()) -> FakeRun:  # type: ignore[assignment]
    """A whole run of the same job, decided."""
    run = FakeRun(without(config))
    run.everybody()
    finish(run, overflows)
    return run


def finish(run: FakeRun, overflows: set[int] = frozenset()) -> None:  # type: ignore[assignment]
    """Go on to the end; these steps overflow whenever they are made."""
    while not run.ended:
        run.step()
        run.square_sum = math.inf if run.machine.state.version in overflows else 1.0
        run.work()
        assert run.now < 120.0, run.machine.waiting_for(run.now)


def foreseen(run: FakeRun) -> list[int]:
    """The steps of which something was foregone, in order, for the last shard."""
    return [told.decision.step for told in run.of(TellForegone) if told.shard == 1]


def loads(run: FakeRun) -> list[str]:
    return [call.checkpoint for call in run.of(Configure) if call.control is Control.LOAD and call.shard == 0]


def middle(run: FakeRun, version: int = 2, ahead: bool = True) -> None:
    """Go to the middle of a step: one contribution is held, nobody computes, and chunks are updated or not."""
    run.everybody()
    run.run_to(version)
    for worker in run.workers.values():
        worker.idle = True
        worker.deals.clear()
    run.settle(2)
    run.contribute(run.workers[0], version, 0)
    if ahead:
        for shard in run.shards.values():
            shard.get_ahead()
            assert shard.updated_by is not None


# -- What is foregone ---------------------------------------------------------------------------


def test_every_step_is_foregone_and_then_decided_to_the_same(run: FakeRun, tmp_path: Path) -> None:
    run.everybody()
    run.run()
    assert run.end.ok
    assert foreseen(run) == FORESEEN
    told = {tell.decision.step: tell.decision for tell in run.of(TellForegone)}
    for decision in run.decisions()[1:]:
        assert decision.updates_as(told[decision.step])
        assert decision.loss != told[decision.step].loss
    other = decided(eager_config(tmp_path))
    assert other.of(TellForegone) == []
    assert all(map(same_content, run.decisions(), other.decisions()))
    assert [line["step"] for line in run.lines() if line["kind"] == "step"] == list(range(6))


def test_it_is_told_once_per_step_and_shard(run: FakeRun) -> None:
    run.everybody()
    run.run_to(2)
    run.settle(1)
    for worker in run.workers.values():
        worker.idle = True
    run.settle(20)
    assert [(told.shard, told.decision.step) for told in run.of(TellForegone)] == [
        (shard, step) for step in range(1, run.machine.state.version + 1) for shard in range(2)
    ]


def test_before_the_first_checkpoint_nothing_is_foregone(run: FakeRun) -> None:
    """There would be nothing to go back to."""
    run.disk = None
    run.everybody()
    run.settle()
    assert run.machine.phase is Phase.RUNNING
    assert run.of(TellForegone) == []
    assert all(shard.updated_by is None for shard in run.shards.values())
    run.disk = True
    for shard in run.shards.values():
        run._write(shard, 0)
    run.run()
    assert run.end.ok
    assert foreseen(run) == FORESEEN


def test_before_an_evaluation_is_complete_nothing_is_foregone(tmp_path: Path) -> None:
    """It may end the run, and it is of the version that an update would take away in the end."""
    run = FakeRun(eager_config(tmp_path, evaluation={"every_steps": 2}, training={"steps": 6, "target_loss": 2.0}))
    run.everybody()
    run.run_to(2)
    for worker in run.workers.values():
        worker.idle = True
    run.settle(5)
    assert run.machine.steps.evaluation is not None
    assert foreseen(run) == [1]
    run.evaluation_loss = 1.0
    for worker in run.workers.values():
        worker.idle = False
    run.run()
    assert run.end.ok
    assert "reached its target after 2 steps" in run.end.reason
    assert foreseen(run) == [1]


def test_at_the_end_nothing_is_foregone(tmp_path: Path) -> None:
    run = FakeRun(eager_config(tmp_path, training={"steps": 6, "stop_at": 4}))
    run.everybody()
    run.run()
    assert run.end.ok
    assert foreseen(run) == [1, 2, 3]


def test_a_shard_that_connects_again_is_told_after_the_last_decision(run: FakeRun) -> None:
    middle(run)
    run.machine.disconnect(run.member(Role.SHARD, 1), run.now)
    start = len(run.log)
    run.connect(Role.SHARD, 1)
    run.step()
    told = [a for a in run.log[start:] if isinstance(a, TellDecision | TellForegone)]
    assert [(type(action), action.shard, action.decision.step) for action in told] == [
        (TellDecision, 1, run.machine.state.version - 1),
        (TellForegone, 1, run.machine.state.version),
    ]
    for rank in range(2):
        run.join_worker(rank)
    run.run()
    assert run.end.ok


def test_after_a_new_fence_it_is_told_again(run: FakeRun) -> None:
    middle(run)
    run.join_shard(0)
    run.settle(30)
    told = run.of(TellForegone)[-1].decision
    assert (told.fence, told.step) == (run.machine.fence, 0)
    assert loads(run)[-1] == "step-00000000"


# -- Overflow -----------------------------------------------------------------------------------


@pytest.mark.parametrize("overflows", [{0}, {1}, {3}, {4}, {5}, {1, 2}, {2, 4}, {0, 1, 2, 3, 4, 5}])
def test_a_step_that_overflows_is_skipped_as_if_it_had_been_decided(
    run: FakeRun, tmp_path: Path, overflows: set[int]
) -> None:
    run.everybody()
    finish(run, overflows)
    assert run.end.ok, run.end
    other = decided(eager_config(tmp_path), overflows)
    found, expected = run.decisions(), other.decisions()
    assert [decision.skip for decision in found] == [step in overflows for step in range(6)]
    assert all(map(same_content, found, expected))
    assert [shard.version for shard in run.shards.values()] == [6, 6]
    steps = [line["step"] for line in run.lines() if line["kind"] == "step"]
    assert steps[-1] == 5
    # Of steps between two checkpoints one at most is paid for with going back.
    windows = {step // 3 for step in overflows if step}
    assert bool(windows) <= len(run.journal("overflow")) <= len(windows)


def test_an_overflow_is_journaled_before_anything_goes_back(run: FakeRun) -> None:
    run.everybody()
    run.run_to(4)
    run.square_sum = math.inf
    run.run(lambda: bool(run.journal("rollback")[1:]))
    kinds = [record["type"] for record in run.records]
    assert kinds.index("overflow") < len(kinds) - 1 - kinds[::-1].index("epoch")
    assert run.records[kinds.index("overflow")] == {"type": "overflow", "step": 4}
    (overflow,) = [a for a in run.of(Journal) if a.record["type"] == "overflow"]
    assert overflow.sync
    assert run.journal("rollback")[-1]["version"] == 3
    assert not [told for told in run.of(TellDecision) if told.decision.step == 4]
    run.square_sum = 1.0
    run.run()
    assert run.end.ok
    # The checkpoint that it went back to is before the overflow, so that 3 and 4 are decided, and 5 as well.
    assert foreseen(run) == [1, 2, 3, 4]


def test_steps_are_eager_again_after_a_checkpoint_beyond_the_overflow(tmp_path: Path) -> None:
    run = FakeRun(eager_config(tmp_path, training={"steps": 12}))
    run.everybody()
    finish(run, {4})
    assert run.end.ok
    assert foreseen(run)[:4] == [1, 2, 3, 4]
    assert set(foreseen(run)[4:]) >= {8, 9, 10, 11}
    assert not {3, 4, 5} & set(foreseen(run)[4:]), "they are before the next checkpoint"


@pytest.mark.parametrize("journaled", [True, False])
@pytest.mark.parametrize("loaded", [0, 1])
def test_the_coordinator_dies_after_an_overflow(run: FakeRun, tmp_path: Path, journaled: bool, loaded: int) -> None:
    """With its record or without; with a shard that has gone back already or not. The shards live on, ahead."""
    run.everybody()
    run.run_to(4)
    for worker in run.workers.values():
        worker.idle = True
    run.settle(2)
    for contribution in range(2):
        run.contribute(run.workers[0], 4, contribution)
    run.shards[0].get_ahead()
    assert run.shards[0].updated_by is not None
    if journaled:
        run.records.append({"type": "overflow", "step": 4})
    if journaled and loaded:
        checkpoint = run.checkpoints["step-00000003"]
        run.shards[0].version, run.shards[0].has_state, run.shards[0].updated_by = checkpoint.state.version, False, None
        run.shards[0].last_decision, run.shards[0].held, run.shards[0].loaded = None, set(), True
    new = run.restart()
    new.everybody()
    new.square_sum = math.inf
    finish(new, {4})
    assert new.end.ok, new.end
    assert loads(new) == ["step-00000003"]
    assert [record["step"] for record in new.journal("overflow")] == [4]
    other = decided(eager_config(tmp_path), {4})
    assert all(map(same_content, new.decisions(), other.decisions()[3:]))
    assert new.machine.state.skipped == 1


def test_a_chunk_that_was_not_foregone_can_overflow_without_going_back(run: FakeRun) -> None:
    """A coordinator with a record of the overflow, and shards that hold the step without being ahead."""
    middle(run, version=4, ahead=False)
    run.records.append({"type": "overflow", "step": 4})
    new = run.restart()
    new.everybody()
    finish(new, {4})
    assert new.end.ok
    assert loads(new) == []
    assert new.journal("rollback")[1:] == []
    assert new.machine.state.skipped == 1


def test_the_last_overflow_is_what_the_journal_says() -> None:
    assert History("run", 2, []).last_overflow == -1
    records: list[dict[str, Any]] = [
        {"type": "overflow", "step": 3},
        {"type": "rollback", "epoch": 2, "version": 1},
        {"type": "overflow", "step": 7},
    ]
    assert History("run", 2, records).last_overflow == 7


# -- Stopping -----------------------------------------------------------------------------------


def stop(run: FakeRun) -> int:
    """Ask to stop; returns the epoch before."""
    before = run.machine.fence.epoch
    run.machine.stop("asked to stop")
    return before


def test_a_stop_does_not_wait_for_a_step_that_is_not_begun(run: FakeRun) -> None:
    """Under a new fence nothing is foregone, and no shard is ahead: no worker is needed."""
    middle(run, ahead=False)
    before = stop(run)
    run.run()
    assert run.end.ok
    assert "stopped at step 2" in run.end.reason
    assert run.prepared_checkpoints() == [0, 2]
    assert run.machine.fence.epoch == before + 1
    assert loads(run) == [""]
    assert run.of(TellForegone)[-1].decision.fence.epoch == before


def test_a_stop_completes_a_step_that_is_begun(run: FakeRun) -> None:
    middle(run)
    stop(run)
    run.settle(20)
    assert not run.ended
    assert run.of(TellSnapshot)[-1].version == 0, "no shard is asked for what it does not hold"
    assert "contribution" in run.machine.waiting_for(run.now)
    for worker in run.workers.values():
        worker.idle = False
    run.run()
    assert run.end.ok
    assert "stopped at step 3" in run.end.reason
    assert run.prepared_checkpoints() == [0, 3]


def test_a_stop_when_all_has_come_only_waits_for_the_decision(run: FakeRun) -> None:
    middle(run)
    run.contribute(run.workers[1], 2, 1)
    for shard in run.shards.values():
        run.report(shard)
    before = stop(run)
    run.run()
    assert run.end.ok
    assert "stopped at step 3" in run.end.reason
    assert run.machine.fence.epoch == before


def test_a_stop_in_a_step_that_nobody_is_left_to_complete(run: FakeRun) -> None:
    middle(run)
    for rank in run.workers:
        run.kill_worker(rank)
    stop(run)
    began = run.now
    run.run(seconds=60.0, tick=0.1)
    assert not run.end.ok
    assert run.end.reason == (
        "asked to stop, but step 2 is half done and no worker is left; the last checkpoint is step-00000000"
    )
    assert run.now - began > run.config.membership.lease_s
    assert run.of(TellSnapshot)[-1].version == 0


def test_a_worker_that_comes_back_completes_it(run: FakeRun) -> None:
    middle(run)
    for rank in run.workers:
        run.kill_worker(rank)
    stop(run)
    for _ in range(20):
        run.step(0.2)
    assert not run.ended
    run.join_worker(0)
    run.run()
    assert run.end.ok
    assert "stopped at step 3" in run.end.reason


def test_a_stop_in_a_step_that_overflows_saves_what_it_goes_back_to(run: FakeRun) -> None:
    middle(run, version=4)
    stop(run)
    run.square_sum = math.inf
    for worker in run.workers.values():
        worker.idle = False
    run.run()
    assert run.end.ok
    assert "stopped at step 3" in run.end.reason
    assert loads(run) == ["", "step-00000003"]


@pytest.mark.parametrize("ahead", [True, False])
def test_a_stop_while_a_shard_dies(run: FakeRun, ahead: bool) -> None:
    """What it held cannot be saved; the message says what is left."""
    middle(run, ahead=ahead)
    stop(run)
    run.machine.disconnect(run.member(Role.SHARD, 1), run.now)
    run.run(seconds=60.0, tick=0.1)
    assert not run.end.ok
    assert "shard 1" in run.end.reason
    assert "step-00000000" in run.end.reason


def test_a_shard_that_comes_anew_while_the_run_stops(run: FakeRun) -> None:
    """It dies between the question whether the step is begun and its answer."""
    middle(run)
    stop(run)
    carry_out = run._configure
    died = []

    def configure(action: Configure) -> None:
        if action.shard == 1 and not died:
            died.append(action)
            run.machine.disconnect(run.member(Role.SHARD, 1), run.now)
        carry_out(action)

    run._configure = configure  # type: ignore[method-assign]
    for _ in range(10):
        run.step(0.1)
    assert died
    assert not run.ended
    run._configure = carry_out  # type: ignore[method-assign]
    run.join_shard(1)
    run.run()
    assert run.end.ok
    assert "stopped at step 0" in run.end.reason


def test_a_shard_that_comes_anew_later_ends_a_run_that_stops(run: FakeRun) -> None:
    """As always: only what was made to serve anew in order to save it is waited for."""
    run.everybody()
    run.run_to(1)
    run.square_sum = math.inf
    run.run(lambda: run.machine.history.last_overflow == 1)
    run.square_sum = 1.0
    run.run_to(2)
    run.machine.stop("asked to stop")
    run.join_shard(1)
    run.step()
    assert run.ended


# -- A coordinator's new life -------------------------------------------------------------------


def test_a_new_coordinator_goes_on_with_a_step_that_is_begun(run: FakeRun, tmp_path: Path) -> None:
    middle(run)
    before = [shard.updated_by for shard in run.shards.values()]
    new = run.restart()
    new.everybody()
    new.run()
    assert new.end.ok
    assert loads(new) == []
    told = new.of(TellForegone)[0].decision
    assert (told.step, told.fence.term) == (2, 2)
    assert all(told.updates_as(updated_by) for updated_by in before if updated_by is not None)
    other = decided(eager_config(tmp_path))
    assert all(map(same_content, new.decisions(), other.decisions()[2:]))


def test_a_new_coordinator_that_is_asked_to_stop_completes_what_is_begun(run: FakeRun) -> None:
    middle(run)
    new = run.restart()
    new.everybody()
    new.run(lambda: new.machine.phase is Phase.RUNNING)
    new.machine.stop("asked to stop")
    new.run()
    assert new.end.ok
    assert "stopped at step 3" in new.end.reason
    assert loads(new) == []


def test_a_shard_that_has_not_heard_the_last_decision_is_not_ahead_in_the_open_step(run: FakeRun) -> None:
    run.everybody()
    run.run_to(2)
    run.settle(1)
    run.shards[1].slow = True
    run.run(lambda: bool(run.shards[1].waiting))
    run.shards[1].waiting = []
    assert (run.machine.state.version, run.shards[1].version) == (3, 2)
    assert run.shards[1].updated_by is not None
    for worker in run.workers.values():
        worker.idle = True
    new = run.restart()
    new.shards[1].slow = False
    for index in range(2):
        new.join_shard(index, again=True)
    for rank in range(2):
        new.join_worker(rank).idle = True
    new.run(lambda: new.machine.phase is Phase.OPENING)
    new.machine.stop("asked to stop")
    new.run()
    assert [told.shard for told in new.of(TellDecision)] == [1]
    assert new.end.ok
    assert "stopped at step 3" in new.end.reason
    assert loads(new) == []


@pytest.mark.parametrize(
    "training", [{"steps": 60}, {"steps": 6, "eager": False}], ids=["another schedule", "not eager"]
)
def test_a_new_coordinator_with_another_job_goes_back(run: FakeRun, training: dict[str, Any]) -> None:
    """It would decide otherwise than the step was begun: some chunks would be of one job and some of the other."""
    middle(run, version=4)
    new = run.restart(run.config.model_copy(update={"training": run.config.training.model_copy(update=training)}))
    new.everybody()
    new.run_to(5)
    assert loads(new) == ["step-00000003"]


def test_a_new_coordinator_that_is_to_end_before_goes_to_the_steps_end(run: FakeRun) -> None:
    middle(run, version=4)
    sooner = run.config.model_copy(update={"training": run.config.training.model_copy(update={"stop_at": 4})})
    new = run.restart(sooner)
    new.everybody()
    new.run()
    assert new.end.ok
    assert loads(new) == []
    assert new.machine.state.version == 5


# -- What can be completed ----------------------------------------------------------------------


def test_what_can_be_completed(run: FakeRun) -> None:
    run.everybody()
    run.run_to(3)
    last, foregone = run.machine.last_decision, run.machine.steps.foregone(run.machine.state)
    assert last is not None
    assert foregone is not None
    other = replace(foregone, gradient_multiplier=0.5)
    behind, level = Inspection(True, 2, None, last), Inspection(True, 3, last, foregone)
    assert can_complete([], None, None)
    assert can_complete([Inspection(True, 3, last)] * 2, last, None)
    assert can_complete([behind, level], last, foregone)
    assert can_complete([behind], last, None)
    assert not can_complete([behind, level], last, None)
    assert not can_complete([level], last, other)
    assert not can_complete([behind], replace(last, skip=True), foregone)
