"""Who may take over for a shard, and what a step waits for because of it."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from protos.ps.v1.common_pb2 import Member
from ps.coordinator.actions import Dismiss, Follow, TellDecision
from ps.coordinator.members import MemberState
from ps.coordinator.run import Phase
from ps.coordinator.standbys import REJOIN_S
from ps.coordinator.status import status
from ps.errors import MismatchError, PeerUnavailable
from ps.types import Role
from tests.support.fake_run import FakeRun, FakeShard, make_config
from tests.support.standby_run import StandbyRun


@pytest.fixture
def run(tmp_path: Path) -> StandbyRun:
    config = make_config(tmp_path, cluster={"shards": 2, "workers": 2, "standbys": 1}, training={"steps": 1000})
    made = StandbyRun(config)
    made.everybody()
    made.run_to(2)
    return made


def test_the_second_process_of_a_shard_stands_by(run: StandbyRun) -> None:
    member = run.join_process(0)
    assert (member.role, member.name) == (Role.STANDBY, "standby 0")
    assert run.in_sync() == 0
    run.await_standby()
    assert run.in_sync() == member.incarnation
    assert run.journal("standby") == [{"type": "standby", "shard": 0, "life": member.incarnation}]
    with pytest.raises(MismatchError, match="shard 0 and its standby are there already"):
        run.join_process(0)


def test_two_processes_that_register_at_once_take_both_seats(tmp_path: Path) -> None:
    """Neither has connected yet: the second one must not throw the first one out."""
    run = StandbyRun(make_config(tmp_path, cluster={"shards": 1, "workers": 1, "standbys": 1}))
    for life in (1, 2):
        run.machine.register(MemberState(Role.SHARD, 0, life, ready=True), run.now)
    found = [run.machine.members.find(Role.SHARD, 0, life) for life in (1, 2)]
    assert [member.role for member in found if member is not None] == [Role.SHARD, Role.STANDBY]
    with pytest.raises(PeerUnavailable):
        run.machine.register(MemberState(Role.SHARD, 0, 3, ready=True), run.now)


def test_the_run_does_not_end_before_the_last_step_is_recorded(tmp_path: Path) -> None:
    config = make_config(tmp_path, cluster={"shards": 2, "workers": 2, "standbys": 1}, training={"steps": 6})
    run = StandbyRun(config)
    run.everybody()
    run.join_process(0)
    run.await_standby()
    run.run_to(5)
    run.unsaid = []
    run.run_to(6)
    run.settle(20)
    assert not run.ended
    assert run.recorded() == list(range(5))
    for report in run.unsaid:
        run.machine.standbys.applied(report)
    run.run(lambda: run.ended)
    assert run.recorded() == list(range(6))


def test_nothing_is_decided_that_the_standby_does_not_hold(run: StandbyRun) -> None:
    run.join_process(0)
    run.await_standby()
    run.cut_off.add(0)
    # What was reported before is decided still.
    run.settle(5)
    before = run.machine.state.version
    run.settle(50)
    assert run.machine.state.version == before
    run.cut_off.clear()
    run.run_to(before + 2)


def test_a_standby_that_its_shard_cannot_reach_is_given_up_after_a_lease(run: StandbyRun) -> None:
    run.join_process(0)
    run.await_standby()
    run.cut_off.add(0)
    before = run.machine.state.version
    run.run(lambda: run.machine.state.version > before + 3, seconds=3 * run.config.membership.lease_s)
    assert run.in_sync() == 0
    assert run.journal("standby")[-1] == {"type": "standby", "shard": 0, "life": 0}


def test_a_standby_takes_over_and_no_step_is_lost(run: StandbyRun, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    standby = run.join_process(0)
    run.await_standby()
    run.run_to(6)
    run.kill_shard(0)
    run.run(lambda: bool(run.promoted()), seconds=0.2)
    assert run.journal("promotion") == [{"type": "promotion", "shard": 0, "life": standby.incarnation, "in_sync": True}]
    assert standby.role is Role.SHARD
    run.run_to(9)
    assert not run.went_back()
    assert [decision.step for decision in run.decisions()] == list(range(9))
    # Whoever was the shard has nothing to say any more; another process may stand by.
    with pytest.raises(MismatchError, match="was replaced by a newer life"):
        run.join_process(0, life=101)
    assert run.join_process(0).role is Role.STANDBY
    run.await_standby()


def test_a_shard_that_dies_after_its_decision_leaves_it_to_the_standby(run: StandbyRun) -> None:
    run.join_process(0)
    run.await_standby()
    # Of the decision neither process of the shard hears.
    standby, shard = run.standbys[0], run.shards[0]
    version = run.machine.state.version
    run.run(lambda: run.machine.state.version == version + 1)
    standby.version, standby.last_decision, standby.held = version, None, {0, 1}
    shard.silent = True
    run.kill_shard(0)
    run.run_to(version + 4)
    assert not run.went_back()


def test_a_standby_whose_state_differs_is_dismissed_and_never_promoted(
    run: StandbyRun, caplog: pytest.LogCaptureFixture
) -> None:
    life = run.join_process(0).incarnation
    run.await_standby()
    run.hash_of_standby = 7
    run.run(lambda: bool(run.of(Dismiss)))
    assert "standby 0 holds another state than shard 0" in caplog.text
    assert (run.in_sync(), run.machine.standbys.diverged) == (0, 1)
    assert run.machine.members.get(Role.STANDBY, 0) is None
    with pytest.raises(MismatchError, match="was replaced"):
        run.join_process(0, life)
    run.run_to(run.machine.state.version + 3)


@pytest.mark.parametrize("first", ["shard", "standby"])
def test_a_standby_whose_state_differs_is_not_promoted_either_while_another_shard_is_late(
    run: StandbyRun, first: str
) -> None:
    """What is known of a pair counts at once: the shard may die before all others have carried the decision out."""
    run.join_process(0)
    run.await_standby()
    run.shards[1].slow = True
    run.hash_of_standby = 7
    if first == "shard":
        run.unsaid = []
    version = run.machine.state.version
    run.run(lambda: run.machine.state.version > version and run.machine.steps.not_applied() == [1])
    for report in run.unsaid or ():
        run.machine.standbys.applied(report)
    run.kill_shard(0)
    run.settle(40)
    assert run.machine.members.missing_shards() == [0]
    assert (run.promoted(), run.in_sync(), run.machine.standbys.diverged) == ([], 0, 1)


def test_whoever_is_replaced_by_its_standby_is_told(run: StandbyRun) -> None:
    run.join_process(0)
    run.await_standby()
    before = run.member(Role.SHARD, 0).incarnation
    run.kill_shard(0)
    run.run(lambda: bool(run.promoted()))
    assert [(end.life, end.reason) for end in run.of(Dismiss)] == [
        (before, "shard 0 was replaced by a newer life of it")
    ]


def test_a_wait_for_a_standby_names_it(run: StandbyRun) -> None:
    run.join_process(0)
    run.await_standby()
    run.unsaid = []
    run.settle(30)
    last = run.machine.state.version - 1
    assert [(w.who, w.what) for w in run.machine.waits(run.now)] == [("standby 0", f"to apply decision {last}")]
    for report in run.unsaid:
        run.machine.standbys.applied(report)
    run.unsaid = None
    run.settle(5)
    run.cut_off.add(0)
    run.settle(30)
    step = run.machine.state.version
    assert run.machine.waiting_for(run.now).startswith(
        f"step {step}: waiting for standby 0 (to hold step {step}: its shard does not reach it) since 0."
    )


def test_status_says_which_standby_may_take_over(run: StandbyRun) -> None:
    def in_sync() -> dict[str, bool]:
        members = status(run.machine, Member(), run.now, 0.0).members
        return {f"{found.member.role} {found.member.rank}": found.in_sync for found in members}

    run.join_process(0)
    assert not any(in_sync().values())
    run.await_standby()
    assert [name for name, holds in in_sync().items() if holds] == ["standby 0"]


def test_a_standby_that_holds_too_little_is_not_promoted_while_the_shard_may_come_back(run: StandbyRun) -> None:
    run.join_process(0)
    run.cut_off.add(0)
    run.settle(5)
    run.kill_shard(0)
    run.settle(100)
    assert run.machine.phase is Phase.GATHERING or run.machine.members.missing_shards() == [0]
    assert not run.promoted()
    # A new life of it takes its own seat.
    run.cut_off.clear()
    assert run.join_process(0).role is Role.SHARD


def test_a_lost_standby_does_not_hold_the_run_up(run: StandbyRun) -> None:
    member = run.join_process(0)
    run.await_standby()
    run.machine.disconnect(member, run.now)
    del run.standbys[0]
    before = run.machine.state.version
    run.run(lambda: run.machine.state.version > before + 2, seconds=2.0)
    assert run.in_sync() == 0


def test_both_sit_where_they_sat_after_a_restart_of_the_coordinator(run: StandbyRun) -> None:
    standby = run.join_process(0)
    run.await_standby()
    again = StandbyRun(run.config, run.records, list(run.checkpoints.values()), [], 2, {}, run.now + 1.0)
    for index, shard in run.shards.items():
        again.shards[index] = shard
    again.standbys = run.standbys
    # The standby first.
    assert again.join_process(0, standby.incarnation).role is Role.STANDBY
    assert again.in_sync() == standby.incarnation
    for index in (0, 1):
        assert again.join_process(index, run.shards[index].incarnation).role is Role.SHARD
    again.join_worker(0)
    again.run_to(run.machine.state.version + 3)
    assert not again.went_back()
    assert again.in_sync() == standby.incarnation


def test_a_shard_that_died_with_the_coordinator_is_replaced_by_its_standby(run: StandbyRun) -> None:
    standby = run.join_process(0)
    run.await_standby()
    again = StandbyRun(run.config, run.records, list(run.checkpoints.values()), [], 2, {}, run.now + 1.0)
    again.shards[1], again.standbys = run.shards[1], run.standbys
    again.join_process(0, standby.incarnation)
    # A process that starts anew does not take the seat of a shard that may be about to come back.
    with pytest.raises(PeerUnavailable, match="may be about to come back"):
        again.join_process(0)
    again.join_process(1, run.shards[1].incarnation)
    again.join_worker(0)
    again.run(lambda: bool(again.promoted()), seconds=REJOIN_S + 0.5)
    again.run_to(run.machine.state.version + 3)
    assert not again.went_back()


def test_a_run_goes_on_without_the_standbys_that_it_had(tmp_path: Path) -> None:
    """Everything was killed, and is resumed with cluster.standbys=0; the shard comes back with its journal."""
    one = {"shards": 1, "workers": 1, "standbys": 1}
    run = StandbyRun(make_config(tmp_path, cluster=one, training={"steps": 1000}, durability="journal"))
    run.everybody()
    run.run_to(2)
    run.join_process(0)
    run.await_standby()
    run.run_to(5)
    held = run.shards[0]
    reborn = FakeShard(0, 4711, has_state=True, version=held.version, last_decision=held.last_decision)
    without = make_config(tmp_path, cluster={**one, "standbys": 0}, training={"steps": 1000}, durability="journal")
    after = FakeRun(without, run.records, list(run.checkpoints.values()), [], 2, {0: reborn}, run.now + 1.0)
    after.everybody()
    after.run_to(8)
    assert after.journal("standby")[-1]["life"] == 0


def test_an_old_report_does_not_let_a_standby_take_over_that_begins_anew(run: StandbyRun) -> None:
    """Its session broke for too long; the shard says again what it said of what the standby held before."""
    standby = run.join_process(0)
    run.await_standby()
    # The open step waits for the other shard.
    run.shards[1].silent = True
    run.settle()
    told = run.prepared_of(run.shards[0])
    assert told.standby == standby.incarnation
    run.machine.disconnect(standby, run.now)
    run.run(lambda: run.in_sync() == 0)
    run.join_process(0, standby.incarnation)
    run.run(lambda: not run.standbys[0].has_state)
    run.machine.steps.prepared(told)
    assert run.in_sync() == 0


def test_a_standby_that_nothing_waits_for_begins_anew_when_it_was_away(run: StandbyRun) -> None:
    """It may have missed more than the decision that is told again."""
    run.cut_off.add(0)
    standby = run.join_process(0)
    run.run(lambda: bool(run.of(Follow)))
    run.machine.disconnect(standby, run.now)
    run.join_process(0, standby.incarnation)
    run.run(lambda: len(run.of(Follow)) == 2)
    assert not run.of(Follow)[-1].keep


def test_a_standby_in_sync_that_was_away_is_told_the_last_decision_again(run: StandbyRun) -> None:
    standby = run.join_process(0)
    run.await_standby()
    run.machine.disconnect(standby, run.now)
    told = len(run.of(TellDecision))
    run.join_process(0, standby.incarnation)
    run.step(0.0)
    assert [action.standby for action in run.of(TellDecision)[told:]][:1] == [True]
    assert run.in_sync() == standby.incarnation


def test_a_standby_does_not_take_over_before_it_is_known_to_hold_the_same(run: StandbyRun) -> None:
    """The shard has said what it holds, and died before its standby had carried the decision out."""
    run.join_process(0)
    run.await_standby()
    run.unsaid, run.hash_of_standby = [], 7
    run.run(lambda: bool(run.unsaid))
    run.settle()
    run.kill_shard(0)
    run.run(lambda: not run.member(Role.SHARD, 0).live)
    run.settle()
    assert run.promoted() == []
    for report in run.unsaid:
        run.machine.standbys.applied(report)
    run.settle()
    assert run.promoted() == []
    assert run.machine.standbys.diverged == 1


def test_the_place_of_a_shard_is_not_given_away_while_its_standby_is_there(run: StandbyRun) -> None:
    """Coordinator and shard died together; the shard's new process asks at the very moment in which it may."""
    standby = run.join_process(0)
    run.await_standby()
    began = run.now + 1.0
    again = StandbyRun(run.config, run.records, list(run.checkpoints.values()), [], 2, {1: run.shards[1]}, began)
    again.standbys = {0: run.standbys[0]}
    again.join_process(0, standby.incarnation)
    again.join_process(1, run.shards[1].incarnation)
    again.join_worker(0)
    again.step()
    again.now = began + REJOIN_S
    with pytest.raises(PeerUnavailable):
        again.join_process(0)
    again.run(lambda: bool(again.promoted()), seconds=1.0)
    assert again.went_back() == []


def test_a_standby_that_holds_nothing_waits_for_its_shard_as_long_as_anybody_would(tmp_path: Path) -> None:
    """The coordinator died; the shard, which alone holds the state, needs 3 s to come back."""
    config = make_config(tmp_path, cluster={"shards": 2, "workers": 2, "standbys": 1}, training={"steps": 1000})
    run = StandbyRun(config)
    run.everybody()
    run.run_to(5)
    began = run.now + 1.0
    again = StandbyRun(config, run.records, list(run.checkpoints.values()), [], 2, dict(run.shards), began)
    again.join_process(1, run.shards[1].incarnation)
    assert again.join_process(0).role is Role.STANDBY
    again.join_worker(0)
    while again.now < began + REJOIN_S + 1.0:
        again.step(0.05)
    again.join_process(0, run.shards[0].incarnation)
    again.run_to(7)
    assert again.went_back() == []


def test_after_a_rollback_nobody_is_in_sync_whatever_the_journal_still_gets(run: StandbyRun) -> None:
    run.join_process(0)
    run.await_standby()
    records = [*run.records, {"type": "rollback", "epoch": 9, "version": 0}]
    again = StandbyRun(run.config, records, list(run.checkpoints.values()), [], 2, {}, run.now + 1.0)
    assert again.in_sync() == 0
