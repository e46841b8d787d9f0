"""The coordinator's state machine where two things go wrong at once."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from protos.ps.v1 import coordinator_pb2 as pb
from ps.coordinator import service
from ps.coordinator.actions import (
    Configure,
    Control,
    Dismiss,
    PrepareCheckpoint,
    Record,
    TellDeal,
    TellDecision,
    TellSnapshot,
    WriteManifest,
)
from ps.coordinator.dealing import Dealing
from ps.coordinator.members import MemberState
from ps.coordinator.recorder import Recorder
from ps.coordinator.timings import Spent
from ps.errors import CheckpointWriteFailed, DecisionRejected, MismatchError, PeerUnavailable, StaleFence
from ps.types import Fence, Role
from ps.wire.proto import to_proto
from tests.support.fake_run import FakeRun, make_config


@pytest.fixture
def run(tmp_path: Path) -> FakeRun:
    """2 shards, 2 workers, C = 2, 6 steps, a checkpoint every 3."""
    return FakeRun(make_config(tmp_path))


def recorded(run: FakeRun) -> list[int]:
    """The steps that metrics.jsonl has lines of."""
    return [line["step"] for line in run.lines() if line["kind"] == "step"]


def loading(run: FakeRun) -> list[Configure]:
    """Calls of LOAD so far."""
    return [call for call in run.of(Configure) if call.control is Control.LOAD]


@pytest.mark.parametrize("error", [PeerUnavailable("gone"), StaleFence("older")])
def test_a_shard_that_dies_while_it_loads_does_not_condemn_the_checkpoint(
    run: FakeRun, error: PeerUnavailable | StaleFence
) -> None:
    """Only what the checkpoint itself is to blame for is a reason to go back to an older one."""
    run.everybody()
    run.run_to(2)
    carry_out, failures = run._configure, [error]

    def configure(action: Configure) -> None:
        if action.control is Control.LOAD and action.shard == 1 and failures:
            failed = failures.pop()
            run.machine.serving.configure_failed(1, action.fence, Control.LOAD, failed, False)
        else:
            carry_out(action)

    run._configure = configure  # type: ignore[method-assign]
    run.join_shard(1)
    run.run()
    assert run.end.ok, run.end
    assert {call.checkpoint for call in loading(run) if call.checkpoint} == {"step-00000000"}
    assert run.machine.snapshots.rejected == []


def test_an_evaluation_that_is_not_a_number_can_be_recorded(tmp_path: Path) -> None:
    """A run that has diverged goes on to its end; JSON has no NaN."""
    run = FakeRun(make_config(tmp_path, evaluation={"every_steps": 2}))
    run.evaluation_loss = math.nan
    run.everybody()
    run.run()
    assert run.end.ok
    lines = [action.line for action in run.of(Record) if action.line["kind"] == "evaluation"]
    assert [line["version"] for line in lines] == [2, 4, 6]
    assert {line["loss"] for line in lines} == {line["bits_per_byte"] for line in lines} == {None}
    recorder = Recorder(tmp_path, "run")
    for line in lines:
        recorder.record(line)
    assert len([json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]) == 3


@pytest.mark.parametrize("role", [Role.WORKER, Role.SHARD])
def test_a_life_that_was_replaced_cannot_come_back(run: FakeRun, role: Role) -> None:
    """Stopped past its lease, replaced, woken up: it would throw out its successor, and that one it."""
    run.everybody()
    run.run_to(2)
    old = run.member(role, 1)
    if role is Role.SHARD:
        run.join_shard(1)
    else:
        run.join_worker(1)
    run.step()
    new = run.member(role, 1)
    assert new.incarnation != old.incarnation
    with pytest.raises(MismatchError, match=f"{role} 1 was replaced"):
        run.machine.register(old, run.now)
    assert run.member(role, 1) is new
    run.run()
    assert run.end.ok


@pytest.mark.parametrize("connected", [True, False], ids=["connected", "registered"])
def test_the_registration_of_a_dead_life_that_is_heard_late_throws_nobody_out(run: FakeRun, connected: bool) -> None:
    """It was on its way when its process was killed; the next life of it was faster."""
    run.everybody()
    run.run_to(2)
    run.kill_worker(1)
    run.step(run.config.membership.lease_s)
    new = run.join_worker(1) if connected else run.register_worker(1)
    run.machine.register(MemberState(Role.WORKER, 1, 7), run.now)
    assert new.incarnation not in [action.life for action in run.step() if isinstance(action, Dismiss)]
    if not connected:
        run.connect(Role.WORKER, 1, new.incarnation)
    assert run.member(Role.WORKER, 1).incarnation == new.incarnation
    assert run.member(Role.WORKER, 1).connected


def test_of_those_who_register_for_a_seat_the_one_that_connects_has_it(run: FakeRun) -> None:
    """Whoever registered before it, and did not connect, is too late; the one that held it hears of it."""
    run.everybody()
    run.run_to(2)
    old = run.member(Role.WORKER, 1)
    lives = [run.register_worker(1).incarnation for _ in range(3)]
    assert run.member(Role.WORKER, 1) is old
    run.connect(Role.WORKER, 1, lives[1])
    assert [action.life for action in run.step() if isinstance(action, Dismiss)] == [old.incarnation]
    assert run.member(Role.WORKER, 1).incarnation == lives[1]
    for late in (old.incarnation, lives[0]):
        assert run.machine.members.find(Role.WORKER, 1, late) is None
        with pytest.raises(MismatchError, match="worker 1 was replaced"):
            run.machine.register(MemberState(Role.WORKER, 1, late), run.now)
    # Nor does it wait for ever where nobody holds the seat any more.
    run.machine.disconnect(run.member(Role.WORKER, 1), run.now)
    run.workers[1].idle = True
    run.step(run.config.membership.lease_s / 2)
    run.step()
    assert run.member(Role.WORKER, 1).incarnation == lives[2]


def test_overdue_work_is_given_to_somebody_else() -> None:
    """Who has not done it for so long is the last to get it again."""
    dealing = Dealing(2)
    assert dealing.deal([0, 1], 0.0) == {0: [0], 1: [1]}
    dealing.finish(1)
    assert dealing.overdue(31.0, 30.0) == [0]
    assert dealing.deal([0, 1], 31.0) == {1: [0]}
    # Nobody else is there: then it is.
    assert dealing.overdue(62.0, 30.0) == [0]
    assert dealing.deal([1], 62.0) == {1: [0]}


def test_a_stuck_worker_of_the_lowest_rank_does_not_stop_the_run(tmp_path: Path) -> None:
    run = FakeRun(make_config(tmp_path, training={"steps": 6, "step_timeout_s": 30.0}))
    run.everybody()
    run.run_to(2)
    run.workers[0].idle = True
    member = run.member(Role.WORKER, 0)
    for _ in range(40):
        run.machine.seen(member, run.now + 1.0)
        run.step(1.0)
        run.work()
    assert run.machine.state.version > 2
    dealt = [deal for deal in run.of(TellDeal) if deal.state.version == 2 and deal.contributions]
    assert (dealt[-1].worker, dealt[-1].contributions) == (1, (0,))


def test_a_coordinator_that_dies_between_loading_and_the_rollback(tmp_path: Path) -> None:
    """What was loaded is one decision behind the journal, as if it had only not heard of the last one.

    It cannot carry that decision out: the gradients are gone.
    """
    run = FakeRun(make_config(tmp_path, checkpoint={"every_steps": 1}))
    run.everybody()
    run.run_to(3)
    run.disk = None
    run.run_to(4)
    run.settle(1)
    run.join_shard(1)
    while not loading(run)[2:]:
        run.step()
    assert {call.checkpoint for call in loading(run)[2:]} == {"step-00000003"}
    assert [shard.version for shard in run.shards.values()] == [3, 3]
    assert run.journal("rollback")[1:] == []
    new = run.restart()
    for shard in range(2):
        new.join_shard(shard, again=True)
    for rank in range(2):
        new.join_worker(rank)
    new.run(lambda: bool(new.of(TellDecision)))
    assert [call.checkpoint for call in loading(new)] == ["step-00000003"] * 2
    assert new.of(TellDecision)[0].decision.step == 3
    assert new.journal("rollback")[-1]["version"] == 3
    new.run()
    assert new.end.ok


def test_a_new_coordinator_without_checkpoints_saves_what_every_shard_has_applied(run: FakeRun) -> None:
    """A shard that is still updating could not write the version, and would not be asked again."""
    run.everybody()
    run.run_to(2)
    run.shards[1].slow = True
    run.run_to(3)
    assert [shard.version for shard in run.shards.values()] == [3, 2]
    run.checkpoints.clear()
    new = run.restart()
    for shard in range(2):
        new.join_shard(shard, again=True)
    for rank in range(2):
        # They wait for the weights.
        new.join_worker(rank).idle = True
    for _ in range(5):
        new.step()
        new.work()
    assert [told.shard for told in new.of(TellDecision)] == [1]
    assert new.of(TellSnapshot) == []
    new.shards[1].slow = False
    new.apply(new.shards[1])
    for worker in new.workers.values():
        worker.idle = False
    new.run()
    assert new.end.ok
    assert new.prepared_checkpoints() == [3, 6]


def test_asked_to_stop_while_a_shard_is_gone_for_good(run: FakeRun) -> None:
    """What it held cannot be saved, and nobody may bring it back."""
    run.everybody()
    run.run_to(2)
    run.machine.disconnect(run.member(Role.SHARD, 1), run.now)
    run.step(0.5)
    run.machine.stop("asked to stop")
    run.run(lambda: run.ended or run.now > 30.0, tick=0.1)
    assert run.ended
    assert not run.end.ok
    assert "shard 1" in run.end.reason
    assert "step-00000000" in run.end.reason
    assert run.now > run.config.membership.lease_s


def test_asked_to_stop_while_a_shard_is_away_for_a_moment(run: FakeRun) -> None:
    run.everybody()
    run.run_to(2)
    run.machine.disconnect(run.member(Role.SHARD, 1), run.now)
    run.step(0.5)
    run.machine.stop("asked to stop")
    for _ in range(5):
        run.step(1.0)
    run.join_shard(1, again=True)
    run.run()
    assert run.end.ok
    assert run.prepared_checkpoints() == [0, 2]


def test_a_contribution_that_was_complete_before_a_rollback_is_not_complete_after_it(run: FakeRun) -> None:
    """A worker's word about it may come late; taken for the present one, the step would wait for its time-out."""
    run.everybody()
    run.run_to(2)
    steps, old = run.machine.steps, run.machine.fence
    step = run.machine.state.version
    before = steps.outstanding(0)[0]
    assert before
    steps.contributed(0, Fence(old.term, old.epoch - 1), Spent(step, before[0], 0.1, 0.1, 0.1, 0.0), run.now)
    assert steps.outstanding(0)[0] == before
    assert steps.contributed(0, old, Spent(step, before[0], 0.1, 0.1, 0.1, 0.0), run.now)
    assert steps.outstanding(0)[0] == before[1:]


def test_a_contribution_that_is_told_again_counts_once(run: FakeRun) -> None:
    """After a reconnect a worker tells again what every shard holds."""
    run.everybody()
    run.run_to(2)
    steps, step = run.machine.steps, run.machine.state.version
    spent = Spent(step, 0, 1.0, 0.5, 0.25, 0.0)
    assert steps.contributed(0, run.machine.fence, spent, run.now)
    assert not steps.contributed(0, run.machine.fence, spent, run.now)
    assert steps._timings._by_rank[0] == [1.0, 0.5, 0.25, 0.0]


def test_nonsense_in_a_members_words_goes_no_further(run: FakeRun) -> None:
    run.everybody()
    run.run_to(2)
    member = run.member(Role.WORKER, 0)
    fence, step = run.machine.fence, run.machine.state.version
    told = pb.Contributed(step=step, contribution=0, compute_s=math.nan, push_s=math.inf, pull_s=-1.0, wait_s=2.0)
    told.fence.CopyFrom(to_proto(fence))
    service._contributed(run.machine, member, told, run.now)
    assert run.machine.steps._timings._by_rank[0] == [0.0, 0.0, 0.0, 2.0]
    assert service._printable("step 3\x1b]0;evil\x07") == "step 3?]0;evil?"


def test_a_file_of_a_checkpoint_that_an_earlier_coordinator_asked_for_does_not_count(tmp_path: Path) -> None:
    """The shards tell again what they wrote for the coordinator that died; the new one has emptied the folder since."""
    first = FakeRun(make_config(tmp_path))
    first.everybody()
    first.disk = None
    first.run(lambda: bool(first.of(PrepareCheckpoint)))
    asked_under = first.machine.fence
    run = first.restart()
    run.disk = None
    run.everybody()
    run.run(lambda: bool(run.of(PrepareCheckpoint)))
    for shard in (0, 1):
        run.machine.snapshot_written(asked_under, shard, 0, (f"shard-{shard}", "0" * 64, 10), "")
    run.step()
    assert not run.of(WriteManifest), "these files went with the folder"
    for shard in (0, 1):
        run.machine.snapshot_written(run.machine.fence, shard, 0, (f"shard-{shard}", "0" * 64, 10), "")
    run.step()
    assert run.of(WriteManifest)


def test_the_last_checkpoint_is_written_where_a_damaged_one_of_that_version_was(tmp_path: Path) -> None:
    """Its manifest is read anew by a coordinator that does not know yet that a file of it is damaged."""
    run = FakeRun(make_config(tmp_path, workers=1, training={"steps": 6}))
    run.everybody()
    run.run()
    assert run.end.ok
    assert "step-00000006" in run.checkpoints
    resumed = run.restart()
    resumed.shards = {}
    resumed.damaged = {"step-00000006"}
    resumed.everybody()
    resumed.run_to(4)
    assert resumed.journal("rollback")[-1]["version"] == 3
    # The coordinator dies, the shards live on.
    last = resumed.restart()
    last.everybody()
    last.disk = None
    last.run_to(6)
    last.settle()
    assert last.prepared_checkpoints() == [6]
    assert not last.ended, "it ended before its last checkpoint was written"


def test_a_shard_of_another_past_leads_back_to_a_checkpoint(run: FakeRun) -> None:
    """A process that was taken for dead comes back with a version that fits by its number alone."""
    run.everybody()
    run.run_to(2)
    carry_out, refusals = run._configure, [DecisionRejected("shard 1 holds version 1 of another past")]

    def configure(action: Configure) -> None:
        if action.control is Control.SERVE and action.shard == 1 and refusals:
            run.machine.serving.configure_failed(1, action.fence, Control.SERVE, refusals.pop(), False)
        else:
            carry_out(action)

    run._configure = configure  # type: ignore[method-assign]
    run.machine.serving.gather("a new coordinator")
    before = len(loading(run))
    run.run()
    assert run.end.ok, run.end
    assert [call.checkpoint for call in loading(run)[before:]] == ["step-00000000"] * 2


@pytest.mark.parametrize("served", [True, False])
def test_a_full_disk_ends_no_run_that_has_served(run: FakeRun, served: bool) -> None:
    """A recovery writes a nonce first; at a start somebody watches, and should be told at once."""
    carry_out = run._configure
    full = not served

    def configure(action: Configure) -> None:
        if action.control is Control.LOAD and full:
            error = CheckpointWriteFailed("No space left on device")
            run.machine.serving.configure_failed(action.shard, action.fence, Control.LOAD, error, True)
        else:
            carry_out(action)

    run._configure = configure  # type: ignore[method-assign]
    run.everybody()
    if served:
        run.run_to(2)
        full = True
        run.join_shard(1)
        run.settle()
        assert not run.ended
        assert run.machine.snapshots.rejected == []
        full = False
    run.run()
    run.step()
    assert run.end.ok is served


def test_a_step_whose_checkpoint_is_all_that_is_left_of_it_has_its_line(run: FakeRun) -> None:
    """Its shards wrote the checkpoint, and one died before the coordinator heard that the decision was carried out."""
    run.everybody()
    run.run_to(3)
    run.step()
    assert "step-00000003" in run.checkpoints
    assert recorded(run) == [0, 1]
    run.join_shard(1)
    run.run()
    assert run.end.ok, run.end
    assert recorded(run) == list(range(6))
