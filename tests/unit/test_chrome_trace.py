"""The file that Perfetto and chrome://tracing read."""

from __future__ import annotations

import json
from typing import Any

from ps.telemetry.chrome_trace import Part, render
from ps.telemetry.trace import Span

SHARD = [
    Span("apply", "apply", "kernel 10", 5_000_000, 2_500, 3, chunk=1),
    Span("apply", "apply", "kernel 9", 4_000_000, 1_000, 3, chunk=0),
]
WORKER = [
    Span("forward", "compute", "compute", 900_500, 10, 3, contribution=0),
    Span("compute", "compute", "compute", 900_500, 1_000, 3, contribution=0),
    Span("send", "push", "a", 901_000, 0, 3),
]
STEPS = [Span("step 3", "step", "steps", 1_000_000, 9_000_000, 3)]


def rendered(*parts: Part) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(render(parts, 1_000_000_000_000_000_000, {"run": "r"}))
    return loaded


def three() -> dict[str, Any]:
    worker = Part("worker", 0, 12, "gpu-1", WORKER, offset_ns=200_000, uncertainty_ns=3_400, dropped=5)
    return rendered(worker, Part("shard", 1, 11, "here", SHARD), Part("coordinator", 0, 10, "here", STEPS))


def metadata(document: dict[str, Any], name: str) -> dict[tuple[int, int], Any]:
    events = [event for event in document["traceEvents"] if event["ph"] == "M" and event["name"] == name]
    return {(event["pid"], event["tid"]): next(iter(event["args"].values())) for event in events}


def spans(document: dict[str, Any]) -> list[dict[str, Any]]:
    return [event for event in document["traceEvents"] if event["ph"] == "X"]


def test_processes_are_the_roles_in_their_order() -> None:
    document = three()
    assert list(metadata(document, "process_name").values()) == ["coordinator", "shard 1", "worker 0"]
    assert [pid for pid, _ in metadata(document, "process_name")] == [1, 2, 3]
    assert list(metadata(document, "process_sort_index").values()) == [1, 2, 3]
    assert list(metadata(document, "process_labels").values()) == [
        "pid 10 on here",
        "pid 11 on here",
        "pid 12 on gpu-1, clock within 3 us",
    ]


def test_tracks_have_names_and_numbers_of_their_own() -> None:
    names = metadata(three(), "thread_name")
    assert list(names.values()) == ["steps", "kernel 9", "kernel 10", "compute", "a"]
    assert len({tid for _, tid in names}) == 5
    assert set(metadata(three(), "thread_sort_index")) == set(names)


def test_spans_are_microseconds_since_the_first_one_on_one_clock() -> None:
    document = three()
    found = {(event["name"], event["pid"]): event for event in spans(document)}
    step = found["step 3", 1]
    # The worker's clock is behind by 200 us, and 900.5 us there is when the coordinator's says 1100.5.
    assert (step["ts"], step["dur"]) == (0.0, 9000.0)
    assert found["compute", 3]["ts"] == 100.5
    assert found["compute", 3]["args"] == {"step": 3, "contribution": 0}
    assert found["apply", 2]["args"] == {"step": 3, "chunk": 1}
    assert found["apply", 2]["cat"] == "apply"
    assert document["otherData"] == {
        "run": "r",
        "began": "2001-09-09T01:46:40.001000+00:00",
        "spans_left_out": {"worker 0": 5},
    }


def test_whoever_holds_another_comes_first() -> None:
    """Of equal beginnings: a reader that builds a stack needs the longer one first."""
    assert [event["name"] for event in spans(three())] == ["step 3", "apply", "apply", "compute", "forward", "send"]


def test_every_event_is_what_the_format_says() -> None:
    for event in three()["traceEvents"]:
        assert {"ph", "name", "pid", "tid", "args"} <= set(event)
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
        # 0 is the kernel's idle process.
        assert event["pid"] > 0
        if event["ph"] == "X":
            assert set(event) == {"ph", "name", "cat", "pid", "tid", "ts", "dur", "args"}
            assert event["ts"] >= 0
            assert event["dur"] >= 0


def test_two_lives_of_a_worker_are_two_processes() -> None:
    document = rendered(Part("worker", 0, 1, "here", WORKER), Part("worker", 0, 2, "here", WORKER))
    assert list(metadata(document, "process_name").values()) == ["worker 0", "worker 0"]
    assert len({event["pid"] for event in spans(document)}) == 2


def test_nothing_is_a_trace_too() -> None:
    assert spans(rendered(Part("coordinator", 0, 1, "here", []))) == []
