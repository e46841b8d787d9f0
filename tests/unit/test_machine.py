"""The coordinator's state machine, driven by a scripted cluster (tests/support/fake_run.py)."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ps.coordinator.actions import (
    Configure,
    Control,
    End,
    Journal,
    PrepareCheckpoint,
    Record,
    Rewind,
    TellCluster,
    TellDeal,
    TellDecision,
    TellSnapshot,
    WriteManifest,
)
from ps.coordinator.decision import same_content
from ps.coordinator.recovery import Candidate
from ps.coordinator.run import Phase
from ps.errors import ConfigError, MismatchError
from ps.types import Applied, Decision, Fence, ParameterTable, Role, TensorSpec
from tests.support.fake_run import DATA, TABLE, FakeRun, make_config


@pytest.fixture
def run(tmp_path: Path) -> FakeRun:
    """2 shards, 2 workers, C = 2, 6 steps, a checkpoint every 3."""
    return FakeRun(make_config(tmp_path))


def indices(run: FakeRun, wanted: Any) -> list[int]:
    """Where in the log the actions are that `wanted` holds for."""
    return [index for index, action in enumerate(run.log) if wanted(action)]


def is_record(kind: str) -> Any:
    return lambda action: isinstance(action, Journal) and action.record["type"] == kind


def record_at(run: FakeRun, index: int) -> dict[str, Any]:
    action = run.log[index]
    assert isinstance(action, Journal)
    return action.record


# -- A whole run --------------------------------------------------------------------------------


def test_from_nothing_to_the_end(run: FakeRun) -> None:
    run.everybody()
    run.run()
    assert run.end == End(True, "finished: 6 steps")
    assert [decision.step for decision in run.decisions()] == list(range(6))
    assert run.prepared_checkpoints() == [0, 3, 6]
    assert sorted(run.checkpoints) == ["step-00000000", "step-00000003", "step-00000006"]
    assert [line["step"] for line in run.lines() if line["kind"] == "step"] == list(range(6))
    assert [line["version"] for line in run.lines() if line["kind"] == "evaluation"] == [6]
    controls = [action.control for action in run.of(Configure)]
    assert controls == [Control.INSPECT] * 2 + [Control.LOAD] * 2 + [Control.SERVE] * 2
    assert {action.fence for action in run.of(Configure)} == {Fence(1, 1)}
    assert [deal.worker for deal in run.of(TellDeal) if deal.initialize] == [0]


def test_the_order_of_actions(run: FakeRun) -> None:
    """A record is in the journal before anybody hears of what it says."""
    run.everybody()
    run.run()
    for step in range(6):
        (at,) = [index for index in indices(run, is_record("decision")) if record_at(run, index)["step"] == step]
        told = indices(run, lambda a, step=step: isinstance(a, TellDecision) and a.decision.step == step)
        assert len(told) == 2
        assert min(told) > at
        if step in (2, 5):
            (prepared,) = indices(run, lambda a, step=step: a == PrepareCheckpoint(step + 1))
            assert at < prepared < min(told)
    (epoch,) = indices(run, is_record("epoch"))
    assert epoch < min(indices(run, lambda action: isinstance(action, Configure)))
    assert run.log[epoch].sync  # type: ignore[union-attr]
    (model,) = indices(run, is_record("model"))
    assert run.log[model].sync  # type: ignore[union-attr]
    # What was applied is recorded once it was.
    for record in run.journal("applied"):
        assert record["hashes"] == [1001 + record["step"]] * 2


def test_decisions_follow_each_other(run: FakeRun) -> None:
    run.everybody()
    run.run_to(2)
    run.square_sum = math.inf
    run.run_to(3)
    run.square_sum = 1.0
    run.run()
    decisions = run.decisions()
    assert [decision.skip for decision in decisions] == [False, False, True, False, False, False]
    assert [decision.applied for decision in decisions] == [1, 2, 2, 3, 4, 5]
    assert [decision.skipped for decision in decisions] == [0, 0, 1, 1, 1, 1]
    assert decisions[2].gradient_multiplier == 0.0
    assert not math.isfinite(decisions[2].gradient_norm)
    for before, after in itertools.pairwise(decisions):
        assert after.loss_scale == before.next_loss_scale
    assert decisions[0].loss == 2.0
    assert decisions[0].tokens == 200
    line = [line for line in run.lines() if line["kind"] == "step"][2]
    assert line["skipped"] is True
    assert line["gradient_norm"] is None


# -- What a decision waits for ------------------------------------------------------------------


def test_nothing_is_decided_before_checkpoint_0(run: FakeRun) -> None:
    run.disk = None
    run.everybody()
    run.settle()
    assert run.machine.phase is Phase.RUNNING
    assert all(shard.held == {0, 1} for shard in run.shards.values())
    assert run.of(TellDecision) == []
    assert run.machine.waiting_for(run.now).startswith("step 0: waiting for shard 0 (to write checkpoint 0) since ")
    for index, shard in run.shards.items():
        run.disk = True
        run._write(shard, 0)
        assert run.of(TellDecision) == []
        run.step()
        assert bool(run.of(WriteManifest)) == (index == 1)
    run.run()
    assert run.end.ok


def test_a_first_checkpoint_that_cannot_be_written_ends_the_run(run: FakeRun) -> None:
    """Nothing could be decided without it: the run would wait for ever."""
    run.disk = False
    run.everybody()
    run.run(seconds=5.0)
    assert run.end == End(False, "the first checkpoint could not be written: shard 0: No space left on device")
    # Whatever comes now, it stays over.
    run.join_shard(1)
    run.settle(30)
    assert run.ended
    assert len(run.of(End)) == 1


def test_nothing_is_decided_before_all_have_applied(run: FakeRun) -> None:
    run.everybody()
    run.run_to(1)
    slow = run.shards[1]
    slow.slow = True
    run.run_to(2)
    run.settle()
    # Shard 0 is at version 2 and has all of step 2; shard 1 says nothing of decision 1.
    assert (run.shards[0].version, slow.version) == (2, 1)
    # Even a report of shard 1, if it came, would not do.
    run.machine.steps.prepared(replace(run.prepared_of(slow), step=2))
    run.machine.steps.prepared(replace(run.prepared_of(run.shards[0]), step=2))
    run.settle(5)
    assert run.machine.state.version == 2
    slow.slow = False
    run.apply(slow)
    slow.held = {0, 1}
    run.run()
    assert run.end.ok


def test_nothing_is_decided_from_a_part_of_the_reports(run: FakeRun) -> None:
    run.everybody()
    run.run_to(2)
    silent = run.shards[1]
    silent.silent = True
    run.settle()
    assert run.machine.state.version == 2
    silent.silent = False
    run.run_to(3)


@pytest.mark.parametrize(
    "change", [{"step": 1}, {"step": 3}, {"fence": Fence(1, 0)}, {"fence": Fence(0, 1)}, {"fence": Fence(1, 2)}]
)
def test_a_stale_report_does_not_count(run: FakeRun, change: dict[str, Any]) -> None:
    run.everybody()
    run.run_to(2)
    silent = run.shards[1]
    silent.silent = True
    run.settle()
    run.machine.steps.applied(Applied(Fence(1, 1), 1, 1, 5))
    run.machine.steps.prepared(replace(run.prepared_of(silent), **{"step": 2, **change}))
    run.settle(5)
    assert run.machine.state.version == 2
    run.machine.steps.prepared(replace(run.prepared_of(silent), step=2))
    run.settle(2)
    assert run.machine.state.version == 3


def test_an_acknowledgement_of_another_fence_or_step_does_not_count(run: FakeRun) -> None:
    run.everybody()
    run.run_to(1)
    slow = run.shards[1]
    slow.slow = True
    run.run_to(2)
    run.settle(5)
    run.machine.steps.prepared(replace(run.prepared_of(slow), step=2))
    for fence, step in ((Fence(1, 1), 0), (Fence(1, 0), 1), (Fence(2, 1), 1), (Fence(1, 1), 2)):
        run.machine.steps.applied(Applied(fence, step, 1, 5))
        run.step()
        assert run.machine.state.version == 2
    run.machine.steps.applied(Applied(Fence(1, 1), 1, 1, 5))
    run.step()
    assert run.machine.state.version == 3


def test_nothing_is_decided_while_an_evaluation_is_running(tmp_path: Path) -> None:
    run = FakeRun(make_config(tmp_path, evaluation={"every_steps": 2}))
    run.everybody()
    run.run_to(2)
    for worker in run.workers.values():
        worker.idle = True
    for shard in run.shards.values():
        shard.held = {0, 1}
    run.settle(10)
    assert run.machine.state.version == 2
    assert run.machine.steps.evaluation is not None
    for worker in run.workers.values():
        worker.idle = False
    run.run()
    assert [line["version"] for line in run.lines() if line["kind"] == "evaluation"] == [2, 4, 6]


# -- Workers come and go ------------------------------------------------------------------------


def dealt(run: FakeRun, step: int) -> list[tuple[int, tuple[int, ...]]]:
    deals = [deal for deal in run.of(TellDeal) if deal.state.version == step]
    return [(deal.worker, deal.contributions) for deal in deals if deal.contributions]


def test_a_dead_workers_contributions_are_dealt_again_whole(run: FakeRun) -> None:
    run.everybody()
    run.run_to(2)
    run.workers[1].idle = True
    run.settle(5)
    assert dealt(run, 2) == [(0, (0,)), (1, (1,))]
    run.kill_worker(1)
    run.step(0.2)
    assert dealt(run, 2) == [(0, (0,)), (1, (1,))], "it may be back within the grace"
    run.step(0.2)
    assert dealt(run, 2)[2:] == [(0, (1,))]
    assert run.machine.fence == Fence(1, 1)
    run.run()
    assert run.end.ok
    assert dealt(run, 4) == [(0, (0, 1))]


def test_what_a_dead_worker_finished_stays(run: FakeRun) -> None:
    run.everybody()
    run.run_to(2)
    run.workers[0].idle = True
    run.settle(5)
    assert run.machine.steps.dealing.done == {1}
    run.kill_worker(1)
    run.settle(60)
    assert dealt(run, 2) == [(0, (0,)), (1, (1,))]


def test_a_worker_that_is_back_within_the_grace_keeps_its_work(run: FakeRun) -> None:
    run.everybody()
    run.run_to(2)
    run.workers[1].idle = True
    run.settle(5)
    run.kill_worker(1)
    run.step(0.2)
    run.connect(Role.WORKER, 1)
    run.machine.model(run.member(Role.WORKER, 1), run.now, TABLE, DATA, 2)
    run.workers[1].idle = False
    actions = run.step(0.2)
    assert [a for a in actions if isinstance(a, TellCluster)] == [TellCluster(1, Fence(1, 1), run.machine.state)]
    assert [a.contributions for a in actions if isinstance(a, TellDeal)] == [(1,)]
    assert dealt(run, 2)[:2] == [(0, (0,)), (1, (1,))]
    run.run()
    assert run.end.ok


def test_a_silent_worker_is_dead_after_its_lease(run: FakeRun) -> None:
    run.everybody()
    run.run_to(2)
    run.workers[1].idle = True
    run.step(9.0)
    assert len(dealt(run, 2)) == 2
    run.step(2.0)
    assert dealt(run, 2)[2:] == [(0, (1,))]


def test_work_that_is_overdue_is_dealt_again(tmp_path: Path) -> None:
    run = FakeRun(make_config(tmp_path, training={"steps": 6, "step_timeout_s": 30.0}))
    run.everybody()
    run.run_to(2)
    # It sends heartbeats and does nothing.
    stuck, run.workers[1].idle = run.workers[1], True
    member = run.member(Role.WORKER, 1)
    for _ in range(29):
        run.machine.seen(member, run.now + 1.0)
        run.step(1.0)
    assert len(dealt(run, 2)) == 2
    for _ in range(3):
        run.machine.seen(member, run.now + 1.0)
        run.step(1.0)
        run.work()
    assert dealt(run, 2)[2][1] == (1,)
    assert stuck.idle


def test_a_new_life_of_a_worker_gets_its_work(run: FakeRun) -> None:
    run.everybody()
    run.run_to(2)
    run.workers[1].idle = True
    run.settle(3)
    run.join_worker(1)
    run.run()
    assert run.end.ok
    assert run.machine.fence == Fence(1, 1)


def test_a_late_joiner_is_welcomed_and_gets_work(run: FakeRun) -> None:
    run.join_shard(0)
    run.join_shard(1)
    run.join_worker(0)
    run.run_to(2)
    late = run.join_worker()
    assert late.rank == 1
    actions = run.step()
    assert TellCluster(1, Fence(1, 1), run.machine.state) in actions
    run.run_to(4)
    assert dealt(run, 3) == [(0, (0,)), (1, (1,))]
    run.run()
    assert run.end.ok


def test_with_more_workers_than_contributions_the_rest_waits(tmp_path: Path) -> None:
    run = FakeRun(make_config(tmp_path, workers=4))
    run.everybody()
    run.run_to(2)
    assert {deal.worker for deal in run.of(TellDeal) if deal.state.version == 1} == {0, 1, 2, 3}
    assert [worker for worker, _ in dealt(run, 1)] == [0, 1]


def test_a_worker_that_leaves_is_not_dealt_to(run: FakeRun) -> None:
    run.everybody()
    run.run_to(2)
    run.workers[1].idle = True
    run.settle(2)
    member = run.member(Role.WORKER, 1)
    run.machine.leave(member, run.now)
    # Heartbeats may still be on their way.
    run.machine.seen(member, run.now)
    run.settle(3)
    assert run.machine.members.live_workers() == [0]
    assert dealt(run, 2)[2:] == [(0, (1,))]
    run.run()
    assert run.end.ok


def test_workers_without_a_rank_get_one_each(run: FakeRun) -> None:
    """They register before either of them is connected."""
    run.join_shard(0)
    run.join_shard(1)
    first, second = run.register_worker(), run.register_worker()
    assert (first.rank, second.rank) == (0, 1)
    # One that never came leaves its number to another.
    run.step(11.0)
    assert run.register_worker().rank == 0


def test_a_model_of_fewer_chunks_than_shards_is_refused(run: FakeRun) -> None:
    with pytest.raises(ConfigError, match=r"cluster\.shards"):
        run.join_worker(0, table=ParameterTable((TensorSpec("a", (10,)),)))
    run.workers.pop(0)
    run.everybody()
    run.run_to(1)


def test_a_worker_with_another_model_or_data_is_refused(run: FakeRun) -> None:
    run.everybody()
    run.run_to(1)
    other = ParameterTable((TensorSpec("a", (100, 101)), TensorSpec("b", (200_000,))))
    with pytest.raises(MismatchError, match="worker 2 has other parameters"):
        run.join_worker(2, table=other)
    with pytest.raises(MismatchError, match="worker 3 has other data"):
        run.join_worker(3, data="e" * 64)
    for rank in (2, 3):
        run.workers.pop(rank)
    run.settle(3)
    assert run.machine.members.live_workers() == [0, 1]
    run.run()
    assert run.end.ok
    assert {worker for step in range(6) for worker, _ in dealt(run, step)} == {0, 1}


def test_parts_of_an_evaluation_are_dealt_again(tmp_path: Path) -> None:
    run = FakeRun(make_config(tmp_path, evaluation={"every_steps": 2}))
    run.everybody()
    run.run(lambda: run.machine.steps.evaluation is not None)
    run.workers[1].idle = True
    run.settle(3)
    assert run.machine.steps.evaluation is not None
    assert run.machine.steps.evaluation.dealing.outstanding(1) == [1]
    run.kill_worker(1)
    run.settle(60)
    (line,) = [line for line in run.lines() if line["kind"] == "evaluation"][:1]
    assert (line["version"], line["tokens"], line["loss"]) == (2, 20, 3.0)
    assert line["bits_per_byte"] == pytest.approx(60 / math.log(2) / 40)


# -- Shards die ---------------------------------------------------------------------------------


def test_a_shard_in_a_new_life_takes_the_cluster_back_to_a_checkpoint(run: FakeRun) -> None:
    run.everybody()
    run.run_to(5)
    first = {decision.step: decision for decision in run.decisions()}
    run.join_shard(1)
    start = len(run.log)
    run.run()
    assert run.end.ok
    after = run.log[start:]
    controls = [(a.control, a.checkpoint) for a in after if isinstance(a, Configure)]
    assert controls == [
        *[(Control.INSPECT, "")] * 2,
        *[(Control.LOAD, "step-00000003")] * 2,
        *[(Control.SERVE, "")] * 2,
    ]
    assert {a.fence for a in after if isinstance(a, Configure)} == {Fence(1, 2)}
    assert {"type": "rollback", "epoch": 2, "version": 3} in run.records
    assert Rewind(3) in after
    assert [a.fence for a in after if isinstance(a, TellCluster)][:2] == [Fence(1, 2)] * 2
    # Made again, the decisions are the same; steps 3 and on have a second line.
    again = {a.decision.step: a.decision for a in after if isinstance(a, TellDecision)}
    assert sorted(again) == [3, 4, 5]
    for step in (3, 4):
        assert same_content(again[step], first[step])
        assert again[step].fence == Fence(1, 2)
    lines = [a.line["step"] for a in after if isinstance(a, Record) and a.line["kind"] == "step"]
    assert lines == [3, 4, 5]
    # The rollback is in the journal after the loading, and before the first new decision.
    records = [a.record["type"] for a in after if isinstance(a, Journal)]
    assert records.index("epoch") < records.index("rollback") < records.index("decision")


def test_a_shard_that_dies_before_there_is_a_checkpoint(run: FakeRun) -> None:
    run.disk = None
    run.everybody()
    run.settle(10)
    run.disk = True
    run.join_shard(0)
    run.run()
    assert run.end.ok
    assert len([deal for deal in run.of(TellDeal) if deal.initialize]) == 2


def test_a_checkpoint_on_its_way_at_a_rollback_is_forgotten(run: FakeRun) -> None:
    run.everybody()
    run.run_to(1)
    run.disk = None
    run.run_to(4)
    assert run.machine.snapshots.pending() == [3]
    run.join_shard(1)
    run.run(lambda: run.machine.phase is Phase.RUNNING)
    assert run.machine.state.version == 0
    # The other shard tells of its file of before, which will be written again.
    for shard in (0, 1):
        run.machine.snapshot_written(run.machine.fence, shard, 3, (f"shard-{shard}", "0" * 64, 10), "")
    run.step()
    assert [a.state.version for a in run.of(WriteManifest)] == [0]
    run.disk = True
    run.run()
    assert sorted(run.checkpoints) == ["step-00000000", "step-00000003", "step-00000006"]


def test_only_a_worker_that_is_missed_is_worth_a_warning(run: FakeRun, caplog: pytest.LogCaptureFixture) -> None:
    def warned() -> list[str]:
        return [record.message for record in caplog.records if record.levelname == "WARNING"]

    run.everybody()
    run.run_to(2)
    run.machine.leave(run.member(Role.WORKER, 0), run.now)
    assert warned() == []
    run.join_worker(0)
    run.kill_worker(1)
    run.settle(5)
    run.step(1.0)
    assert warned() == ["worker 1 broke its connection"]
    run.disk = None
    run.machine.stop("asked to stop")
    run.kill_worker(0)
    run.step(1.0)
    assert not run.member(Role.WORKER, 0).live
    assert len(warned()) == 1


def test_damaged_checkpoints_are_named_and_the_one_before_is_used(
    run: FakeRun, caplog: pytest.LogCaptureFixture
) -> None:
    run.everybody()
    run.run_to(5)
    run.damaged = {"step-00000003"}
    run.join_shard(1)
    run.run()
    assert run.end.ok
    assert "step-00000003 cannot be loaded by shard 0" in caplog.text
    loads = [a.checkpoint for a in run.of(Configure) if a.control is Control.LOAD]
    assert loads[2:] == ["step-00000003"] * 2 + ["step-00000000"] * 2
    assert {"type": "rollback", "epoch": 3, "version": 0} in run.records
    assert [a.control for a in run.of(Configure)].count(Control.INSPECT) == 6


def test_with_no_checkpoint_left_the_run_ends_with_the_reason(run: FakeRun) -> None:
    run.everybody()
    run.run_to(5)
    run.damaged = {"step-00000000", "step-00000003"}
    run.join_shard(1)
    run.run()
    assert not run.end.ok
    for words in ("step-00000003, step-00000000", str(run.config.checkpoint_dir), "restore one"):
        assert words in run.end.reason


def test_a_shard_that_is_away_is_waited_for(run: FakeRun) -> None:
    run.everybody()
    run.run_to(2)
    member = run.member(Role.SHARD, 1)
    run.machine.disconnect(member, run.now)
    run.step(0.5)
    run.settle(5)
    assert run.machine.state.version == 2
    assert run.machine.waiting_for(run.now).startswith("step 2: waiting for shard 1 (to come back) since 0.")
    # The same life comes back: nothing is lost, nothing is loaded, and the decision is told again.
    before = len(run.of(Configure))
    run.join_shard(1, again=True)
    told = [a for a in run.step() if isinstance(a, TellDecision)]
    assert [(a.shard, a.decision.step) for a in told][:1] == [(1, 1)]
    run.run()
    assert run.end.ok
    assert len(run.of(Configure)) == before


def test_a_shard_that_dies_in_the_middle_of_a_recovery(run: FakeRun) -> None:
    run.everybody()
    run.run_to(4)
    run.join_shard(1)
    run.now += 1.0
    run.machine.advance(run.now)
    # The calls of this recovery are on their way when the other shard dies as well.
    stale = [action for action in run.machine.drain() if isinstance(action, Configure)]
    assert run.machine.phase is Phase.INSPECTING
    run.join_shard(0)
    run.run(lambda: run.machine.phase is Phase.RUNNING)
    for action in stale:
        run._configure(action)
    run.run()
    assert run.end.ok
    assert run.machine.fence == Fence(1, 3)


def test_a_shard_that_does_not_belong_here_is_refused(run: FakeRun) -> None:
    with pytest.raises(MismatchError, match=r"shard 2: this run has shards 0\.\.1"):
        run.join_shard(2)


# -- The coordinator dies -----------------------------------------------------------------------


def test_a_new_coordinator_goes_on_without_loading(run: FakeRun) -> None:
    run.everybody()
    run.run_to(4)
    version = run.machine.state.version
    second = run.restart()
    assert second.machine.history.contributions == 2
    second.everybody()
    second.run()
    assert second.end == End(True, "finished: 6 steps")
    assert [a.control for a in second.of(Configure)] == [Control.INSPECT] * 2 + [Control.SERVE] * 2
    assert {a.fence for a in second.of(Configure)} == {Fence(2, 2)}
    assert second.journal("rollback") == run.journal("rollback")
    assert [decision.step for decision in second.decisions()] == list(range(version, 6))
    lines = [line["step"] for line in [*run.lines(), *second.lines()] if line["kind"] == "step"]
    assert lines == list(range(6))


def test_what_was_decided_is_told_to_the_shard_that_did_not_hear_it(run: FakeRun) -> None:
    run.everybody()
    run.run_to(3)
    run.shards[1].slow = True
    run.run_to(4)
    # Decision 3 is journaled and shard 0 has carried it out; it never reached shard 1.
    run.settle(3)
    run.shards[1].waiting, run.shards[1].slow = [], False
    assert [run.shards[0].version, run.shards[1].version] == [4, 3]
    second = run.restart()
    second.everybody()
    second.run(lambda: second.machine.phase is Phase.RUNNING)
    first_told = second.of(TellDecision)[0]
    assert (first_told.shard, first_told.decision.step, first_told.decision.fence) == (1, 3, Fence(2, 2))
    second.run()
    assert second.end.ok
    assert [a.control for a in second.of(Configure)].count(Control.LOAD) == 0


def test_a_decision_that_only_the_journal_knows_is_told_to_all(run: FakeRun) -> None:
    run.everybody()
    run.run_to(3)
    for shard in run.shards.values():
        shard.slow = True
    run.run_to(4)
    for shard in run.shards.values():
        shard.waiting, shard.slow = [], False
    second = run.restart()
    second.everybody()
    second.run()
    assert second.end.ok
    assert [(a.shard, a.decision.step) for a in second.of(TellDecision)][:2] == [(0, 3), (1, 3)]


@pytest.mark.parametrize("lost", [1, 2])
@pytest.mark.parametrize("lagging", [None, 0, 1])
def test_a_decision_that_the_journal_lost_is_taken_over_from_the_shards(
    run: FakeRun, lost: int, lagging: int | None
) -> None:
    """The journal is synced in the background: its host may have died with the last records."""
    run.everybody()
    run.run_to(4)
    if lagging is not None:
        run.shards[lagging].slow = True
        run.run_to(5)
    version = run.machine.state.version
    if lagging is not None:
        run.shards[lagging].waiting, run.shards[lagging].slow = [], False
    steps = sorted(record["step"] for record in run.journal("decision"))[-lost:]
    run.records = [r for r in run.records if not (r["type"] in ("decision", "applied") and r["step"] in steps)]
    second = run.restart()
    second.everybody()
    second.run(lambda: second.machine.phase is Phase.RUNNING)
    assert second.machine.state.version == version
    assert [a.control for a in second.of(Configure)].count(Control.LOAD) == 0
    # A third coordinator finds in the journal whatever a shard knew.
    known = {version - 1, version - 1 if lagging is None else version - 2}
    assert known <= {record["step"] for record in second.journal("decision")}
    second.run()
    assert second.end.ok


def test_shards_that_are_at_different_versions_load_a_checkpoint(run: FakeRun) -> None:
    """The coordinator died in the middle of a rollback: one shard has loaded already, the other has not."""
    run.everybody()
    run.run_to(5)
    loaded = run.shards[1]
    loaded.version, loaded.last_decision, loaded.held = 3, None, set()
    second = run.restart()
    second.everybody()
    second.run()
    assert second.end.ok
    assert [a.checkpoint for a in second.of(Configure) if a.control is Control.LOAD] == ["step-00000003"] * 2


def test_conflicting_decisions_stop_the_run(run: FakeRun) -> None:
    run.everybody()
    run.run_to(4)
    last = run.shards[0].last_decision
    assert last is not None
    run.shards[0].last_decision = replace(last, gradient_multiplier=0.5)
    second = run.restart()
    second.everybody()
    second.run()
    assert not second.end.ok
    assert "two decisions of step" in second.end.reason
    assert second.of(TellDecision) == []


def test_a_new_coordinator_of_a_run_that_is_over(run: FakeRun) -> None:
    run.everybody()
    run.run()
    second = run.restart()
    second.everybody()
    second.run()
    assert second.end == End(True, "finished: 6 steps")
    assert second.decisions() == []


def test_a_coordinator_that_died_before_its_last_checkpoint_was_complete(run: FakeRun) -> None:
    run.everybody()
    run.run_to(5)
    run.disk = False
    run.run_to(6)
    for name in [name for name in run.checkpoints if name == "step-00000006"]:
        del run.checkpoints[name]
    second = run.restart()
    second.everybody()
    second.run()
    assert second.end.ok
    assert "step-00000006" in second.checkpoints
    assert second.of(TellSnapshot)[0].version == 6


def test_everything_died(run: FakeRun) -> None:
    run.everybody()
    run.run_to(5)
    second = run.restart()
    second.shards.clear()
    second.everybody()
    second.run()
    assert second.end.ok
    loads = [a.checkpoint for a in second.of(Configure) if a.control is Control.LOAD]
    assert loads == ["step-00000003"] * 2
    for decision in second.decisions():
        if decision.step in (3, 4):
            (before,) = [d for d in run.decisions() if d.step == decision.step]
            assert same_content(before, decision)


def test_everything_died_and_the_disk_has_lost_its_checkpoints(run: FakeRun) -> None:
    run.everybody()
    run.run_to(5)
    second = FakeRun(run.config, run.records, [], ["step-00000003"], 2)
    second.everybody()
    second.run()
    assert not second.end.ok
    assert "(step-00000003)" in second.end.reason
    third = FakeRun(run.config, run.records, [], [], 2)
    third.everybody()
    third.run()
    assert "(none was found)" in third.end.reason


def test_a_rolled_back_decision_is_not_believed_by_a_later_coordinator(run: FakeRun) -> None:
    run.everybody()
    run.run_to(5)
    run.join_shard(1)
    run.run(lambda: run.machine.phase is Phase.RUNNING)
    assert run.machine.state.version == 3
    second = run.restart()
    assert second.machine.history.last_decision is not None
    assert second.machine.history.last_decision.step == 2
    second.everybody()
    second.run()
    assert second.end.ok
    assert [a.control for a in second.of(Configure)].count(Control.LOAD) == 0


# -- The end ------------------------------------------------------------------------------------


def test_asked_to_stop_it_saves_and_ends(run: FakeRun) -> None:
    run.everybody()
    run.run_to(2)
    run.machine.stop("asked to stop (SIGTERM)")
    run.run()
    version = run.machine.state.version
    assert run.end == End(True, f"stopped at step {version}: asked to stop (SIGTERM)")
    assert f"step-{version:08d}" in run.checkpoints
    (manifest,) = indices(run, lambda a: isinstance(a, WriteManifest) and a.state.version == version)
    (end,) = indices(run, lambda a: isinstance(a, End))
    assert manifest < end


def test_asked_to_stop_before_it_served(run: FakeRun) -> None:
    run.join_shard(0)
    run.step()
    run.machine.stop("asked to stop (SIGINT)")
    run.step()
    assert run.end == End(True, "asked to stop (SIGINT)")


def test_asked_to_stop_while_initial_values_are_awaited(run: FakeRun) -> None:
    run.everybody()
    run.workers[0].idle = run.workers[1].idle = True
    run.run(lambda: run.machine.phase is Phase.INITIALIZING)
    run.machine.stop("asked to stop")
    run.step()
    assert run.end.ok


def test_a_shard_that_is_asked_to_go_has_the_state_saved(run: FakeRun) -> None:
    run.everybody()
    run.run_to(2)
    run.machine.leave(run.member(Role.SHARD, 1), run.now)
    run.run()
    assert run.end.ok
    assert "shard 1 was asked to stop" in run.end.reason
    assert max(run.checkpoints) == f"step-{run.machine.state.version:08d}"


def test_stop_at(tmp_path: Path) -> None:
    run = FakeRun(make_config(tmp_path, training={"steps": 6, "stop_at": 4}))
    run.everybody()
    run.run()
    assert run.end == End(True, "stopped at step 4 as asked (training.stop_at)")
    assert max(run.checkpoints) == "step-00000004"
    straight = FakeRun(make_config(tmp_path))
    straight.everybody()
    straight.run()
    # Resumed in new processes, the rest is decided as in a run that was not interrupted.
    second = run.restart(make_config(tmp_path))
    second.shards.clear()
    second.everybody()
    second.run()
    assert second.end == End(True, "finished: 6 steps")
    both = {d.step: d for d in [*run.decisions(), *second.decisions()]}
    for decision in straight.decisions():
        assert same_content(decision, both[decision.step])


def test_target_loss(tmp_path: Path) -> None:
    config = make_config(tmp_path, training={"steps": 6, "target_loss": 2.5}, evaluation={"every_steps": 2})
    run = FakeRun(config)
    run.everybody()
    run.run_to(3)
    run.evaluation_loss = 2.0
    run.run()
    assert run.end == End(True, "the held-out loss reached its target after 4 steps")
    assert max(run.checkpoints) == "step-00000004"


def test_the_last_checkpoint_fails(run: FakeRun) -> None:
    run.everybody()
    run.run_to(4)
    run.disk = False
    run.run()
    assert not run.end.ok
    assert "the last checkpoint could not be written: shard 0: No space left on device" in run.end.reason


def test_a_checkpoint_on_the_way_that_fails_stops_nothing(run: FakeRun) -> None:
    run.everybody()
    run.run_to(2)
    run.disk = False
    run.run_to(3)
    run.settle(1)
    run.disk = True
    run.run()
    assert run.end.ok
    assert sorted(run.checkpoints) == ["step-00000000", "step-00000006"]


def test_nobody_came_in_time(tmp_path: Path) -> None:
    run = FakeRun(make_config(tmp_path, membership={"start_timeout_s": 5.0}))
    run.join_shard(0)
    run.step(4.0)
    assert not run.ended
    run.step(2.0)
    assert run.end == End(
        False,
        "gathering: waiting for shard 1 (to come) since 6.0 s, never seen; any worker (to come) since 6.0 s; "
        "membership.start_timeout_s is over",
    )


# -- What is waited for -------------------------------------------------------------------------


def test_every_wait_names_what_it_waits_for(run: FakeRun) -> None:
    assert run.machine.waiting_for(1.0) == (
        "gathering: waiting for shard 0 (to come) since 1.0 s, never seen; shard 1 (to come) since 1.0 s, never seen; "
        "any worker (to come) since 1.0 s"
    )
    run.join_shard(0)
    run.join_shard(1)
    run.step(2.0)
    assert run.machine.waiting_for(run.now) == "gathering: waiting for any worker (to come) since 2.0 s"
    run.join_worker(0)
    run.join_worker(1)
    run.run_to(2)
    run.workers[1].idle = True
    run.settle(10)
    run.step(4.0)
    assert run.machine.waiting_for(run.now) == (
        f"step 2: waiting for worker 1 (contribution 1) since 4.1 s, "
        f"last seen {run.now - run.member(Role.WORKER, 1).last_seen:.1f} s ago"
    )
    run.machine.disconnect(run.member(Role.SHARD, 0), run.now)
    run.step(1.5)
    assert run.machine.waiting_for(run.now) == (
        "step 2: waiting for shard 0 (to come back) since 0.0 s, last seen 1.5 s ago"
    )


def test_an_unknown_candidate_is_never_chosen_over_a_newer_one(tmp_path: Path, run: FakeRun) -> None:
    run.everybody()
    run.run()
    candidates: list[Candidate] = list(run.checkpoints.values())
    for order in (candidates, candidates[::-1]):
        second = FakeRun(make_config(tmp_path, training={"steps": 9}), run.records, order, [], 2)
        second.everybody()
        second.run()
        assert second.end.ok
        first: Decision = second.decisions()[0]
        assert first.step == 6
