"""What a process records of the traced steps, and how it gets to the coordinator."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from protos.ps.v1 import coordinator_pb2 as pb
from ps.errors import MismatchError, PeerUnavailable
from ps.telemetry import courier as courier_module
from ps.telemetry import trace
from ps.telemetry.courier import Courier, estimate_offset
from ps.telemetry.trace import OFF, Recorder, Span, clock_name
from tests.support.eventually import eventually


def test_without_steps_a_span_is_one_test(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("nothing is looked at but whether something is traced")

    monkeypatch.setattr(Recorder, "_wants", never)
    monkeypatch.setattr(time, "monotonic_ns", never)
    for recorder in (OFF, Recorder(range(0)), Recorder(range(5, 5))):
        assert not recorder.on
        first = recorder.span("apply", "apply", 3)
        with first, recorder.span("reduce", "reduce", 10**6) as inside:
            assert inside is None
        # No object is made either.
        assert recorder.span("apply", "apply", 4) is first
        recorder.add("decide", "decide", 3, 0)
        recorder.since_last("receive", "pull", 3)
        assert recorder.spans() == []


def test_only_the_traced_steps_are_recorded() -> None:
    recorder = Recorder(range(2, 4))
    for step in range(5):
        with recorder.span("apply", "apply", step, chunk=7):
            pass
        recorder.add("decide", "decide", step, 5, 8, track="steps")
    spans = recorder.spans()
    assert [span.step for span in spans] == [2, 2, 3, 3]
    assert spans[1] == Span("decide", "decide", "steps", 5, 3, 2)
    assert (spans[0].chunk, spans[0].contribution) == (7, -1)


def test_spans_of_a_thread_follow_or_hold_each_other() -> None:
    recorder = Recorder(range(1))
    before = time.monotonic_ns()
    with recorder.span("compute", "compute", 0), recorder.span("forward", "compute", 0, contribution=1):
        pass
    after = time.monotonic_ns()
    inner, outer = recorder.spans()
    assert (inner.name, outer.name) == ("forward", "compute")
    assert before <= outer.start_ns <= inner.start_ns
    assert inner.start_ns + inner.duration_ns <= outer.start_ns + outer.duration_ns <= after


def test_a_span_that_ends_with_an_error_is_recorded() -> None:
    recorder = Recorder(range(1))
    with pytest.raises(ValueError), recorder.span("forward", "compute", 0):
        raise ValueError
    assert [span.name for span in recorder.spans()] == ["forward"]


def test_a_track_is_the_thread_unless_it_is_named() -> None:
    recorder = Recorder(range(1))

    def work() -> None:
        with recorder.span("apply", "apply", 0):
            pass
        with recorder.span("send", "pull", 0, track="stream to worker 1"):
            pass

    thread = threading.Thread(target=work, name="kernel_0")
    thread.start()
    thread.join()
    assert [span.track for span in recorder.spans()] == ["kernel 0", "stream to worker 1"]


def test_what_came_is_recorded_since_the_last_of_the_same_push() -> None:
    recorder = Recorder(range(9))
    recorder.since_last("receive", "push", 0, contribution=0, track="a")
    recorder.add("take", "push", 0, 10, 20, contribution=0, track="a")
    for contribution, track in ((1, "a"), (0, "b")):
        recorder.since_last("receive", "push", 0, contribution=contribution, track=track)
    recorder.since_last("receive", "push", 1, contribution=0, track="a")
    assert [span.name for span in recorder.spans()] == ["take"]
    recorder.since_last("receive", "push", 0, chunk=3, contribution=0, track="a")
    assert recorder.spans()[-1][:4] == ("receive", "push", "a", 20)


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "MAX_SPANS", 3)
    recorder = Recorder(range(1))
    for start_ns in range(5):
        recorder.add("apply", "apply", 0, start_ns, 9)
    assert [span.start_ns for span in recorder.spans()] == [0, 1, 2]
    assert recorder.dropped == 2


def test_it_is_over_when_the_step_after_the_next_begins() -> None:
    """Weights of the last traced step may still arrive while the step after it is computed."""
    recorder = Recorder(range(2, 4))
    recorder.add("compute", "compute", 4, 0, 1)
    assert not recorder.over.is_set()
    recorder.add("decode", "pull", 3, 0, 1)
    recorder.add("compute", "compute", 5, 0, 1)
    assert recorder.over.is_set()
    recorder.add("decode", "pull", 3, 0, 1)
    assert [span.name for span in recorder.spans()] == ["decode"]


# -- Clocks -------------------------------------------------------------------------------------


def test_processes_of_one_host_need_no_estimate() -> None:
    asked = []

    def read() -> pb.ClockResponse:
        asked.append(1)
        return pb.ClockResponse(name=clock_name(), now_ns=5)

    assert estimate_offset(read) == (0, 0)
    assert len(asked) == 1


@pytest.mark.parametrize("apart_ns", [-(10**12), 0, 123_456_789, 10**15])
def test_another_hosts_clock_is_known_to_half_a_round_trip(apart_ns: int) -> None:
    origin_ns = time.monotonic_ns()

    def read() -> pb.ClockResponse:
        return pb.ClockResponse(name="another host", now_ns=max(0, time.monotonic_ns() + apart_ns))

    if origin_ns + apart_ns < 0:
        apart_ns = -origin_ns // 2
    offset_ns, uncertainty_ns = estimate_offset(read)
    assert abs(offset_ns - apart_ns) <= uncertainty_ns


def test_the_quickest_answer_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    # Asked and answered, by this clock; the other one is 1000 ahead and always answers right before the end.
    times = iter([0, 100, 200, 210, *range(300, 10_000, 50)])
    last = [0]

    def now() -> int:
        last[0] = next(times)
        return last[0]

    answers = iter([1099, 1209, *range(1349, 20_000, 100)])
    monkeypatch.setattr(courier_module.time, "monotonic_ns", now)
    offset_ns, uncertainty_ns = estimate_offset(lambda: pb.ClockResponse(name="another host", now_ns=next(answers)))
    assert (offset_ns, uncertainty_ns) == (1004, 6)


# -- To the coordinator -------------------------------------------------------------------------


class _Coordinator:
    """Takes parts, unless it has errors to raise first."""

    def __init__(self, *errors: Exception) -> None:
        self._errors = list(errors)
        self.asked = 0
        self.parts: list[pb.TraceRequest] = []

    def clock(self) -> pb.ClockResponse:
        self.asked += 1
        if self._errors:
            raise self._errors.pop(0)
        return pb.ClockResponse(name="another host", now_ns=10**18)

    def trace(self, part: pb.TraceRequest) -> None:
        self.parts.append(part)


def test_spans_are_handed_over_once_they_are_complete() -> None:
    recorder, coordinator = Recorder(range(1)), _Coordinator()
    courier = Courier(coordinator, recorder)
    courier.start()
    recorder.add("apply", "apply", 0, 5, 8, chunk=2, track="kernel 0")
    assert coordinator.parts == []
    recorder.add("apply", "apply", 2, 5, 8)
    part = eventually(lambda: coordinator.parts, 10.0, "the spans")[0]
    courier.close()
    assert len(coordinator.parts) == 1
    assert part.offset_ns > 10**17
    assert part.uncertainty_ns > 0
    expected = pb.Span(
        name="apply",
        category="apply",
        track="kernel 0",
        start_ns=5,
        duration_ns=3,
        step=0,
        chunk=2,
        contribution=-1,
    )
    assert list(part.spans) == [expected]


def test_a_role_that_ends_hands_over_what_there_is() -> None:
    recorder, coordinator = Recorder(range(100)), _Coordinator()
    courier = Courier(coordinator, recorder)
    courier.start()
    recorder.add("apply", "apply", 0, 5, 8)
    courier.close()
    assert [len(part.spans) for part in coordinator.parts] == [1]
    courier.close()


def test_without_steps_nobody_is_asked() -> None:
    coordinator = _Coordinator()
    courier = Courier(coordinator, Recorder())
    courier.start()
    courier.close()
    assert (coordinator.asked, coordinator.parts) == (0, [])


def test_a_coordinator_that_is_away_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(courier_module, "RETRY_S", 0.01)
    recorder, coordinator = Recorder(range(1)), _Coordinator(PeerUnavailable("away"), PeerUnavailable("still"))
    courier = Courier(coordinator, recorder)
    courier.start()
    recorder.end()
    eventually(lambda: coordinator.parts, 10.0, "the spans")
    courier.close()
    assert len(coordinator.parts) == 1


@pytest.mark.parametrize(
    ("errors", "ends", "asked"),
    [([MismatchError("another run")] * 9, False, 1), ([PeerUnavailable("gone for good")] * 9, True, 1)],
)
def test_it_is_given_up_with_one_line(
    errors: list[Exception], ends: bool, asked: int, caplog: pytest.LogCaptureFixture
) -> None:
    recorder, coordinator = Recorder(range(1)), _Coordinator(*errors)
    courier = Courier(coordinator, recorder)
    courier.start()
    if not ends:
        recorder.end()
        eventually(lambda: coordinator.asked, 10.0, "the coordinator to be asked")
    courier.close()
    assert coordinator.asked == asked
    assert f"this process is not in the trace: {errors[0]}" in caplog.text
