"""Every wait, in every phase, names whom it is for, what is missing, since when, and when it was last seen."""

from __future__ import annotations

import math
import time
from pathlib import Path

import pytest

from protos.ps.v1.common_pb2 import Member
from ps.coordinator.actions import Configure, Control
from ps.coordinator.members import MemberState
from ps.coordinator.run import Phase
from ps.coordinator.since import Since
from ps.coordinator.status import status
from ps.coordinator.waiting import Wait
from ps.types import Role
from tests.support.fake_run import FakeRun, FakeShard, make_config


class Deaf(FakeRun):
    """A cluster whose shard 1 does not answer one of the calls that make it serve."""

    deaf_to: Control | None = None

    def _configure(self, action: Configure) -> None:
        if action.shard != 1 or action.control is not self.deaf_to:
            super()._configure(action)


@pytest.fixture
def run(tmp_path: Path) -> Deaf:
    """2 shards, 2 workers, C = 2, 6 steps, a checkpoint every 3."""
    return Deaf(make_config(tmp_path))


def waits(run: FakeRun) -> list[tuple[str, str]]:
    return [(wait.who, wait.what) for wait in run.machine.waits(run.now)]


def reach(run: FakeRun, version: int) -> None:
    """Go on until a version is decided and applied; of the step that is open then nothing is done."""
    run.run_to(version)
    for shard in run.shards.values():
        run.report(shard)
    run.step()


def test_gathering_names_the_shards_and_workers_that_have_not_come(run: Deaf) -> None:
    run.join_shard(0)
    run.step(3.0)
    assert waits(run) == [("shard 1", "to come"), ("any worker", "to come")]
    assert [(wait.since_s, wait.last_seen_s) for wait in run.machine.waits(run.now)] == [(3.0, None)] * 2
    run.register_worker(5)
    run.connect(Role.WORKER, 5)
    run.step(1.0)
    assert waits(run) == [("shard 1", "to come"), ("worker 5", "to say what its model and data are")]
    assert run.machine.waits(run.now)[0].since_s == 4.0
    run.join_shard(1)
    run.join_worker(5)
    run.settle(8)
    assert run.machine.phase is Phase.RUNNING


def register_shard(run: FakeRun, index: int, life: int) -> MemberState:
    run.machine.register(MemberState(Role.SHARD, index, life, ready=True), run.now)
    return run.member(Role.SHARD, index)


def test_a_shard_in_its_first_life_starts_and_what_else_is_waited_for_comes_first(run: Deaf) -> None:
    member = register_shard(run, 0, 11)
    run.register_worker(3)
    run.step(2.0)
    assert waits(run) == [
        ("shard 1", "to come"),
        ("worker 3", "to load its data and model"),
        ("shard 0", "to start"),
    ]
    # Its session stands, and it compiles: nothing can be asked of it yet.
    run.machine.connect(member, run.now, starting=True)
    run.machine.seen(member, run.now, "compiling kernels")
    run.join_shard(1)
    run.join_worker(3)
    run.settle(5)
    assert waits(run) == [("shard 0", "to start; it says: compiling kernels")]
    assert (run.machine.phase, member.live) == (Phase.GATHERING, False)
    described = {m.member.rank: m.state for m in status(run.machine, Member(), run.now, 0.0).members[:2]}
    assert described == {0: "starting", 1: "live"}
    run.shards[0] = FakeShard(0, 11)
    run.machine.started(member, run.now)
    run.settle(8)
    assert (run.machine.phase, member.live) == (Phase.RUNNING, True)


def test_a_shard_that_was_live_is_to_come_back_also_in_a_new_life(run: Deaf) -> None:
    run.everybody()
    reach(run, 2)
    run.machine.disconnect(run.member(Role.SHARD, 1), run.now)
    register_shard(run, 1, 12)
    run.step(run.config.membership.lease_s)
    member = run.member(Role.SHARD, 1)
    assert member.incarnation == 12
    assert waits(run) == [("shard 1", "to come back")]
    run.machine.connect(member, run.now, starting=True)
    run.settle(3)
    assert waits(run) == [("shard 1", "to come back")]


@pytest.mark.parametrize(
    ("control", "phase", "what"),
    [
        (Control.INSPECT, "inspecting", "to say what it holds"),
        (Control.LOAD, "loading", "to load no checkpoint: there is none"),
        (Control.SERVE, "opening", "to open"),
    ],
)
def test_a_shard_that_does_not_answer_is_named(run: Deaf, control: Control, phase: str, what: str) -> None:
    run.deaf_to = control
    run.everybody()
    run.settle(5)
    assert waits(run) == [("shard 1", what)]
    began = run.now - run.machine.waits(run.now)[0].since_s
    run.step(2.0)
    assert run.machine.waiting_for(run.now) == (
        f"{phase}: waiting for shard 1 ({what}) since {run.now - began:.1f} s, last seen 0.0 s ago"
    )


def test_loading_names_the_checkpoint(run: Deaf, tmp_path: Path) -> None:
    run.everybody()
    run.run()
    again = Deaf(make_config(tmp_path, training={"steps": 9}), run.records, list(run.checkpoints.values()), term=2)
    again.deaf_to = Control.LOAD
    again.everybody()
    again.settle(5)
    assert waits(again) == [("shard 1", "to load step-00000006")]


def test_initializing_names_the_worker_that_sends_the_values(run: Deaf) -> None:
    for index in (0, 1):
        run.join_shard(index)
    run.join_worker(0)
    run.workers[0].idle = True
    run.settle(5)
    assert run.machine.phase is Phase.INITIALIZING
    assert waits(run) == [("worker 0", "initial values of shards 0, 1")]
    run.shards[0].has_state = True
    run.settle(5)
    assert waits(run) == [("worker 0", "initial values of shard 1")]


def test_a_step_names_each_worker_with_what_it_has_not_done(run: Deaf) -> None:
    run.everybody()
    reach(run, 2)
    for worker in run.workers.values():
        worker.idle = True
    run.step()
    assert waits(run) == [("worker 0", "contribution 0"), ("worker 1", "contribution 1")]
    run.step(2.0)
    run.contribute(run.workers[1], 2, 1)
    run.step(0.5)
    (wait,) = run.machine.waits(run.now)
    assert (wait.who, wait.what) == ("worker 0", "contribution 0")
    assert wait.since_s == pytest.approx(2.5, abs=0.06)
    # Dealt to somebody else, the wait for them begins now.
    run.kill_worker(0)
    run.step(1.0)
    (wait,) = run.machine.waits(run.now)
    assert (wait.who, wait.since_s) == ("worker 1", 0.0)
    run.kill_worker(1)
    run.step(1.0)
    assert waits(run) == [("any worker", "contribution 0")]


def test_a_new_step_is_a_new_wait(run: Deaf) -> None:
    run.everybody()
    reach(run, 2)
    run.step(0.1)
    run.step(5.0)
    assert run.machine.waits(run.now)[0].since_s >= 5.0
    reach(run, 3)
    run.step(0.1)
    assert run.machine.waits(run.now)[0].since_s <= 0.2


def test_a_shard_that_has_not_reduced_or_applied_a_step_is_named(run: Deaf) -> None:
    run.everybody()
    reach(run, 2)
    run.shards[1].silent = True
    run.settle(5)
    assert waits(run) == [("shard 1", "to reduce the step")]
    run.machine.seen(run.member(Role.SHARD, 1), run.now, "step 2: reducing 3/6")
    assert waits(run) == [("shard 1", "to reduce the step; it says: reducing 3/6")]
    # A heartbeat that speaks of another step says nothing about this one.
    run.machine.seen(run.member(Role.SHARD, 1), run.now, "step 1: reducing 5/6")
    assert waits(run) == [("shard 1", "to reduce the step")]
    run.shards[1].silent = False
    run.shards[1].slow = True
    run.run_to(3)
    run.settle(5)
    assert waits(run)[0] == ("shard 1", "to apply decision 2")


def test_an_evaluation_names_its_parts(run: Deaf) -> None:
    run.everybody()
    reach(run, 5)
    run.workers[1].idle = True
    run.contribute(run.workers[1], 5, 1)
    reach(run, 6)
    run.settle(3)
    assert waits(run)[0] == ("worker 1", "evaluation part 1")


def test_a_checkpoint_names_the_shards_that_have_not_written(run: Deaf) -> None:
    run.everybody()
    reach(run, 2)
    run.disk = None
    reach(run, 3)
    assert waits(run)[-2:] == [("shard 0", "to write checkpoint 3"), ("shard 1", "to write checkpoint 3")]
    run.machine.snapshot_written(run.machine.fence, 1, 3, ("shard-1", "0" * 64, 10), "")
    assert waits(run)[-1] == ("shard 0", "to write checkpoint 3")
    run.machine.snapshot_written(run.machine.fence, 0, 3, ("shard-0", "0" * 64, 10), "")
    assert waits(run)[-1] == ("the coordinator", "to complete checkpoint 3")


def test_who_is_asked_to_stop_waits_for_no_work(run: Deaf) -> None:
    run.everybody()
    reach(run, 2)
    run.workers[0].idle = run.workers[1].idle = True
    run.disk = None
    run.machine.stop("asked to stop")
    run.step()
    assert waits(run) == [("shard 0", "to write checkpoint 2"), ("shard 1", "to write checkpoint 2")]


def test_a_message_names_some_and_counts_the_rest(tmp_path: Path) -> None:
    run = FakeRun(make_config(tmp_path, shards=9))
    text = run.machine.waiting_for(1.0)
    assert "shard 3 (to come)" in text
    assert "shard 4" not in text
    assert text.endswith("; and for 6 more")


def test_nobody_in_particular_is_never_last_seen() -> None:
    assert str(Wait(Role.WORKER, None, "to come", 1.25, None)) == "any worker (to come) since 1.2 s"


def test_since_forgets_what_has_come() -> None:
    since = Since()
    since.look(["a", "b"], 1.0)
    since.look(["b"], 2.0)
    since.look(["a", "b"], 3.0)
    assert (since.seconds("a", 4.0), since.seconds("b", 4.0), since.seconds("c", 4.0)) == (1.0, 3.0, 0.0)


# -- The same in the answer to Status -----------------------------------------------------------


def test_status_tells_what_the_view_needs(run: Deaf) -> None:
    myself = Member(role="coordinator", pid=7)
    before = status(run.machine, myself, run.now, time.time())
    assert math.isnan(before.loss)
    for name in ("tokens_per_s", "step_s", "compute_s", "left_s", "checkpoint_age_s", "evaluation_version"):
        assert not before.HasField(name), name
    assert [(wait.role, wait.rank, wait.HasField("last_seen_s")) for wait in before.waits] == [
        ("shard", 0, False),
        ("shard", 1, False),
        ("worker", -1, False),
    ]
    run.everybody()
    reach(run, 4)
    run.step(3.0)
    run.machine.steps.speed.note({**run.lines()[-1], "compute_seconds": 0.1, "push_seconds": None})
    run.kill_worker(1)
    run.step(1.0)
    answer = status(run.machine, myself, run.now, 1000.0)
    assert (answer.version, answer.contributions, answer.slots, answer.skipped) == (4, 2, 4, 0)
    assert answer.coordinator.pid == 7
    assert answer.tokens_per_s > 0
    assert answer.left_s == pytest.approx(2 * answer.step_s, rel=0.5)
    # The last step says nothing of pushing: what it took before stays.
    assert (answer.compute_s, answer.push_s) == (0.1, 0.01)
    shard, lost = answer.members[0], answer.members[3]
    assert not shard.HasField("last")
    assert (lost.live, lost.since_s, lost.restarts) == (False, 0.0, 0)
    assert (lost.last.step, lost.last.compute_s) == (3, 0.1)
    assert [(wait.role, wait.rank, wait.what) for wait in answer.waits] == [("worker", 0, "contributions 0, 1")]
    run.join_worker(1)
    run.step()
    assert status(run.machine, myself, run.now, 1000.0).members[3].restarts == 1
