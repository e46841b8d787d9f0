"""The coordinator's part of a timeline, and the file of all parts."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from protos.ps.v1 import coordinator_pb2 as pb
from protos.ps.v1.common_pb2 import Member
from ps.coordinator.actions import Action, Configure, Control, Journal, Record, TellDeal
from ps.coordinator.decision import TrainingState
from ps.coordinator.loss_scaler import LossScaler
from ps.coordinator.members import Members, MemberState
from ps.coordinator.timeline import Timeline, part_of
from ps.telemetry.chrome_trace import Part
from ps.telemetry.trace import Span
from ps.types import Fence, Role

FENCE = Fence(1, 1)
STATE = TrainingState(0, 0, 0, LossScaler(1.0, 2, -1))
NS = 10**9


def deal(*contributions: int) -> Action:
    return TellDeal(0, FENCE, STATE, contributions)


def decided(step: int) -> Action:
    return Journal({"type": "decision", "step": step})


def closed(step: int) -> Action:
    return Record({"kind": "step", "step": step})


OTHERS = [Journal({"type": "applied", "step": 1}), Record({"kind": "evaluation", "version": 1})]


def member(role: Role, rank: int, incarnation: int = 1, live: bool = True) -> MemberState:
    return MemberState(role, rank, incarnation, pid=100 + rank, host="here", live=live)


def part(*spans: Span) -> Part:
    return Part("shard", 0, 100, "here", spans)


SPAN = Span("apply", "apply", "kernel 0", 5, 3, 1)


class Rig:
    def __init__(self, run_dir: Path, steps: range = range(1, 3)) -> None:
        self.file = run_dir / "trace.json"
        self.timeline = Timeline(run_dir, "run-1", steps, MemberState(Role.COORDINATOR, 0, 0, pid=99, host="here"))
        self.members = Members(10.0, 0.3, 1)

    def join(self, *members: MemberState) -> None:
        for one in members:
            self.members.admit(one, 0.0)

    def take(self, who: MemberState, *spans: Span) -> bool:
        return self.timeline.take(who, part(*spans), self.members)

    def spans(self) -> list[tuple[str, float, float]]:
        """The coordinator's own, with start and end in seconds of the clock."""
        recorded = self.timeline._recorder.spans()
        return [(span.name, span.start_ns / NS, (span.start_ns + span.duration_ns) / NS) for span in recorded]

    def document(self) -> dict[str, Any]:
        loaded: dict[str, Any] = json.loads(self.file.read_text())
        return loaded


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)


# -- The coordinator's own spans ----------------------------------------------------------------


def clock(monkeypatch: pytest.MonkeyPatch, now_s: float) -> None:
    monkeypatch.setattr(time, "monotonic_ns", lambda: int(now_s * NS))


def test_a_step_is_waited_for_decided_and_waited_for_again(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    clock(monkeypatch, 10.5)
    rig.timeline.note([deal(0)], 10.0)
    rig.timeline.note([decided(0), deal(0)], 12.0)
    clock(monkeypatch, 16.5)
    rig.timeline.note([*OTHERS, closed(0)], 14.0)
    rig.timeline.note([decided(1), deal(0)], 16.0)
    rig.timeline.note([closed(1)], 17.0)
    assert rig.spans() == [
        ("wait for the shards' reports", 14.0, 16.0),
        ("decide", 16.0, 16.5),
        ("wait until all have applied it", 16.5, 17.0),
        ("step 1", 14.0, 17.0),
    ]


def test_the_first_step_begins_when_it_is_dealt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(tmp_path, range(1))
    clock(monkeypatch, 21.0)
    rig.timeline.note([deal()], 5.0)
    rig.timeline.note([deal(0)], 10.0)
    rig.timeline.note([deal(1)], 11.0)
    rig.timeline.note([decided(0)], 20.0)
    rig.timeline.note([closed(0)], 22.0)
    assert rig.spans()[0] == ("wait for the shards' reports", 10.0, 20.0)
    assert rig.spans()[-1] == ("step 0", 10.0, 22.0)


def test_after_a_recovery_a_step_begins_anew(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    clock(monkeypatch, 40.0)
    rig.timeline.note([closed(0)], 10.0)
    rig.timeline.note([Configure(0, Control.INSPECT, FENCE)], 20.0)
    rig.timeline.note([deal(0)], 30.0)
    rig.timeline.note([decided(1)], 39.0)
    assert rig.spans()[0] == ("wait for the shards' reports", 30.0, 39.0)


def test_a_step_that_closes_and_the_next_that_is_decided_at_once(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    clock(monkeypatch, 11.0)
    rig.timeline.note([closed(0), decided(1)], 10.0)
    rig.timeline.note([closed(1)], 12.0)
    assert rig.spans() == [
        ("decide", 10.0, 11.0),
        ("wait until all have applied it", 11.0, 12.0),
        ("step 1", 10.0, 12.0),
    ]


def test_without_steps_nothing_is_looked_at(tmp_path: Path) -> None:
    rig = Rig(tmp_path, range(0))
    rig.timeline.note([closed(0), decided(1)], 10.0)
    assert rig.timeline._began_ns is None
    rig.timeline.write()
    assert not rig.file.exists()


# -- The file -----------------------------------------------------------------------------------


def test_the_file_is_due_when_everybody_has_handed_in(rig: Rig) -> None:
    shard, first, second = member(Role.SHARD, 0), member(Role.WORKER, 0), member(Role.WORKER, 1)
    gone = member(Role.WORKER, 2, live=False)
    rig.join(shard, first, second, gone)
    assert not rig.take(shard, SPAN)
    assert not rig.take(first, SPAN)
    # What was handed in twice, as its answer was lost, is one part.
    assert not rig.take(first, SPAN)
    assert rig.take(second)
    rig.timeline.write()
    names = [e["args"]["name"] for e in rig.document()["traceEvents"] if e["name"] == "process_name"]
    assert names == ["coordinator", "shard 0", "shard 0", "shard 0"]
    assert rig.document()["otherData"]["steps"] == "1:3"
    assert rig.document()["otherData"]["run"] == "run-1"


def test_a_new_life_hands_in_a_part_of_its_own(rig: Rig) -> None:
    before, after = member(Role.WORKER, 0, 1), member(Role.WORKER, 0, 2)
    rig.join(before)
    assert rig.take(before, SPAN)
    rig.join(after)
    assert rig.take(after, SPAN)
    rig.timeline.write()
    assert len([e for e in rig.document()["traceEvents"] if e["ph"] == "X"]) == 2


def test_what_comes_late_is_written_too_and_nothing_twice(rig: Rig) -> None:
    shard, worker = member(Role.SHARD, 0), member(Role.WORKER, 0)
    rig.join(shard)
    rig.take(shard, SPAN)
    rig.timeline.write()
    first = rig.file.stat().st_ino
    rig.timeline.write()
    assert rig.file.stat().st_ino == first
    rig.join(worker)
    rig.take(worker, SPAN)
    rig.timeline.write()
    assert len([e for e in rig.document()["traceEvents"] if e["ph"] == "X"]) == 2


def test_a_run_that_goes_on_behind_the_steps_leaves_the_file_as_it_is(rig: Rig) -> None:
    rig.file.write_text("of before")
    shard = member(Role.SHARD, 0)
    rig.join(shard)
    assert rig.take(shard)
    rig.timeline.write()
    assert rig.file.read_text() == "of before"


def test_a_file_that_cannot_be_written_ends_nothing(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    rig.file.mkdir()
    shard = member(Role.SHARD, 0)
    rig.join(shard)
    rig.take(shard, SPAN)
    rig.timeline.write()
    assert "there is no timeline" in caplog.text


def test_a_part_is_what_the_member_said_without_what_harms() -> None:
    who = Member(role="worker", rank=3, incarnation=9, pid=7, host="a\x1bb")
    spans = [pb.Span(name="x" * 500, category="wait", track="a\nb", start_ns=5, duration_ns=6, step=2, chunk=-1)]
    assert part_of(pb.TraceRequest(member=who, offset_ns=-4, uncertainty_ns=3, dropped=2, spans=spans)) == Part(
        "worker", 3, 7, "a?b", [Span("x" * 100, "wait", "a?b", 5, 6, 2, -1, 0)], -4, 3, 2
    )
