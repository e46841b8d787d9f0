"""The coordinator's state machine, where shards come back with what they have written down."""

from __future__ import annotations

from pathlib import Path

import pytest

from ps.coordinator.actions import Configure, Control, TellDecision, TellSnapshot
from tests.support.fake_run import FakeRun, FakeShard, make_config


@pytest.fixture
def run(tmp_path: Path) -> FakeRun:
    """2 shards, 2 workers, C = 2, 6 steps, a checkpoint every 3."""
    return FakeRun(make_config(tmp_path))


def come_back(run: FakeRun, index: int, behind: int = 0) -> FakeShard:
    """A shard dies, and comes back with its journal but for so many decisions."""
    before = run.shards[index]
    after = run.join_shard(index)
    after.has_state, after.version = True, before.version - behind
    after.last_decision = None if behind else before.last_decision
    return after


def rollbacks(run: FakeRun) -> list[int]:
    return [record["version"] for record in run.journal("rollback")]


@pytest.mark.parametrize("shards", [(1,), (0, 1)])
@pytest.mark.parametrize("behind", [0, 1])
def test_shards_that_hold_their_state_again_lose_no_step(run: FakeRun, shards: tuple[int, ...], behind: int) -> None:
    run.everybody()
    run.run_to(2)
    for shard in shards:
        come_back(run, shard, behind)
    run.run()
    assert run.end.ok, run.end
    assert rollbacks(run) == [0]
    assert [decision.step for decision in run.decisions()] == list(range(6))
    assert [line["step"] for line in run.lines() if line["kind"] == "step"] == list(range(6))


def test_a_decision_is_not_told_to_a_shard_that_cannot_carry_it_out(run: FakeRun) -> None:
    """Its host lost power: it would refuse, come back, and be told again, for ever."""
    run.everybody()
    run.run_to(2)
    come_back(run, 1, behind=1).reduced = False
    told = len(run.of(TellDecision))
    run.run(lambda: len(rollbacks(run)) == 2)
    loaded = [call.checkpoint for call in run.of(Configure) if call.control is Control.LOAD]
    assert loaded[-1] == "step-00000000"
    assert rollbacks(run) == [0, 0]
    assert run.of(TellDecision)[told:] == []
    run.run()
    assert run.end.ok, run.end


def test_a_checkpoint_that_a_shard_died_over_is_written_when_it_is_of_the_present_version(run: FakeRun) -> None:
    run.everybody()
    run.run_to(2)
    run.disk = None
    run.run_to(3)
    assert run.machine.snapshots.pending() == [3]
    run.disk = True
    come_back(run, 1)
    run.run(lambda: run.machine.snapshots.exists(3))
    assert [tell.version for tell in run.of(TellSnapshot)][-2:] == [3, 3]
    assert rollbacks(run) == [0]


def test_a_checkpoint_of_an_older_version_that_a_shard_died_over_is_given_up(run: FakeRun) -> None:
    run.everybody()
    run.run_to(2)
    run.disk = None
    run.run_to(4)
    assert run.machine.snapshots.pending() == [3]
    run.disk = True
    come_back(run, 1)
    assert run.machine.snapshots.pending() == []
    assert "shard 1 died before its part was written" in run.machine.snapshots.failure(3)
    run.run()
    assert run.end.ok, run.end
    assert rollbacks(run) == [0]
