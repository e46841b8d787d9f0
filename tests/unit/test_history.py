"""What the journal says is what was done: replayed, it gives the same history."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import pytest

from ps.coordinator import history as module
from ps.coordinator.history import History, fold
from ps.errors import MismatchError
from ps.types import Decision, Fence, GroupScalars, ParameterTable, TensorSpec
from ps.wire.proto import to_record
from tests.support.fake_run import FakeRun, make_config

TABLE = ParameterTable((TensorSpec("a", (3, 4)), TensorSpec("b", (5,), 1)))


def decision(step: int, **changes: Any) -> Decision:
    made = Decision(
        fence=Fence(1, 1),
        step=step,
        skip=False,
        applied=step + 1,
        skipped=0,
        loss=2.0,
        tokens=10,
        gradient_norm=math.nan,
        loss_scale=1024.0,
        gradient_multiplier=0.001,
        groups=(GroupScalars(0.1, 0.01), GroupScalars(0.1, 0.0)),
        bias_correction1=0.1,
        bias_correction2=0.05,
        next_loss_scale=1024.0,
        next_hysteresis=2,
        next_last_overflow=-1,
        snapshot=False,
    )
    return replace(made, **changes)


def record(made: Decision) -> dict[str, Any]:
    return {"type": "decision", **to_record(made), "counted": [[[0], [[0, 0, 5], [1, 0, 5]]]]}


def replay(*records: dict[str, Any]) -> History:
    """As the journal gives them back."""
    return History("run", 2, [msgpack.unpackb(msgpack.packb(r)) for r in records])


def test_a_journal_is_replayed() -> None:
    first = History("run", 2, [])
    model = first.set_model("worker 0", TABLE, "digest", 3)
    assert model is not None
    history = replay(
        {"type": "run", "run": "run", "contributions": 2},
        model,
        {"type": "epoch", "epoch": 1, "term": 1, "shards": [5]},
        record(decision(0)),
        {"type": "applied", "step": 0, "hashes": [1]},
        record(decision(1)),
        {"type": "evaluation", "version": 2, "loss": 3.0},
        {"type": "checkpoint", "version": 0, "name": "step-00000000"},
        {"type": "member", "role": "worker", "rank": 0, "life": 5},
    )
    assert history.table == TABLE
    assert (history.data_digest, history.evaluation_parts, history.epoch) == ("digest", 3, 1)
    assert repr(history.last_decision) == repr(decision(1))
    assert list(history.recorded) == [0]
    assert history.evaluations == {2: {"version": 2, "loss": 3.0}}
    assert history.next_epoch() == 2


def test_a_rollback_takes_decisions_back() -> None:
    records = [record(decision(step)) for step in range(5)]
    applied = [{"type": "applied", "step": step, "hashes": []} for step in range(5)]
    evaluations = [{"type": "evaluation", "version": v, "loss": 1.0} for v in (2, 3, 4)]
    history = replay(*records, *applied, *evaluations, {"type": "rollback", "epoch": 2, "version": 3})
    assert sorted(history.decisions) == [0, 1, 2]
    assert sorted(history.superseded) == [3, 4]
    assert list(history.recorded) == [0, 1, 2]
    assert sorted(history.evaluations) == [2, 3]
    # Made again after it, they count again.
    again = replay(*records, {"type": "rollback", "epoch": 2, "version": 3}, record(decision(3, fence=Fence(1, 2))))
    assert again.last_decision is not None
    assert again.last_decision.fence == Fence(1, 2)


def test_a_line_of_a_decision_that_was_lost_is_written_again() -> None:
    history = replay(record(decision(0)), {"type": "applied", "step": 0}, {"type": "applied", "step": 1})
    assert list(history.recorded) == [0]


def test_adopting_what_a_shard_heard() -> None:
    history = replay(record(decision(0)), record(decision(1)))
    # The same under another fence, or with another wish for a snapshot, is the same decision; NaN is NaN.
    assert history.adopt(decision(1, fence=Fence(0, 7), snapshot=True))
    assert history.adopt(decision(0))
    for conflicting in (decision(1, gradient_multiplier=0.002), decision(0, skip=True), decision(1, loss=2.1)):
        assert not history.adopt(conflicting)
    assert history.last_decision is not None
    assert history.last_decision.step == 1
    assert history.adopt(decision(2))
    assert history.last_decision.step == 2
    assert not history.adopt(decision(2, loss_scale=1.0))
    # A later one says everything that those before it do.
    assert history.adopt(decision(7))
    assert history.last_decision.step == 7
    # One from before the journal's memory changes nothing.
    assert History("run", 2, []).adopt(decision(4))
    assert history.adopt(decision(5))
    assert history.last_decision.step == 7


def test_only_the_last_decisions_are_kept_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEEP", 3)
    history = History("run", 2, [])
    for step in range(20):
        history.note(decision(step))
        assert len(history.decisions) <= 6
        assert all(previous in history.decisions for previous in range(max(0, step - 2), step + 1))


def test_later_workers_have_the_first_ones_model() -> None:
    history = History("run", 2, [])
    assert history.set_model("worker 0", TABLE, "digest", 2) is not None
    assert history.set_model("worker 1", TABLE, "digest", 2) is None
    other = ParameterTable((*TABLE.tensors, TensorSpec("c", (1,))))
    with pytest.raises(MismatchError, match=r"worker 1 has other parameters.*3 tensors with 18 elements.*2 with 17"):
        history.set_model("worker 1", other, "digest", 2)
    with pytest.raises(MismatchError, match=r"worker 1 has other data.*give every worker the same files"):
        history.set_model("worker 1", TABLE, "other", 2)


def test_the_lines_of_a_long_run_stay_confirmed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the newest decisions are kept in memory; the lines of all steps are."""
    monkeypatch.setattr(module, "KEEP", 4)
    records: list[dict[str, Any]] = []
    for number in range(30):
        records += [record(decision(number)), {"type": "applied", "step": number, "hashes": []}]
    history = replay(*records)
    assert len(history.decisions) < 30
    assert list(history.recorded) == list(range(30))


def test_what_records_amount_to_stands_for_them(tmp_path: Path) -> None:
    """Wherever the journal of a run is cut: its summary and the rest say what all of it does."""
    run = FakeRun(make_config(tmp_path, training={"steps": 12}, evaluation={"every_steps": 4}))
    run.everybody()
    run.run_to(7)
    run.kill_worker(0)
    run.step(1.0)
    run.join_shard(0)
    run.run()
    records = [msgpack.unpackb(msgpack.packb(r)) for r in run.records]
    assert {r["type"] for r in records} >= {"decision", "applied", "evaluation", "rollback", "gone", "live", "epoch"}
    whole = History("run", 2, records).packed()
    for cut in range(len(records) + 1):
        of = msgpack.unpackb(msgpack.packb(fold(records[:cut])), strict_map_key=False)
        again = History("", 0, [{"type": "summary", "of": of}, *records[cut:]])
        again.run, again.contributions = "run", 2
        assert repr(again.packed()) == repr(whole), cut
