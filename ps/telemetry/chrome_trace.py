"""Spans of all roles as one Chrome trace, which Perfetto and chrome://tracing show. Pure.

Source: the Trace Event Format's JSON object, with complete (X) and metadata (M) events.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from ps.telemetry.trace import COMPUTE, Span

_ROLES = ("coordinator", "shard", "worker")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

Event = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """The spans of one life of a role."""

    role: str
    rank: int
    pid: int
    host: str
    spans: Sequence[Span]
    #: Added to its clock's times it makes them the coordinator's, to within the uncertainty.
    offset_ns: int = 0
    uncertainty_ns: int = 0
    #: Spans that found no room.
    dropped: int = 0

    @property
    def name(self) -> str:
        return self.role if self.role == "coordinator" else f"{self.role} {self.rank}"


def render(parts: Iterable[Part], wall_ns: int, about: dict[str, Any]) -> bytes:
    """Write the file.

    Args:
        parts: of all roles.
        wall_ns: added to the coordinator's monotonic clock it makes it Unix time.
        about: what else the file says of itself.
    """
    ordered = sorted(parts, key=lambda part: (_ROLES.index(part.role), part.rank))
    began_ns = min((span.start_ns + part.offset_ns for part in ordered for span in part.spans), default=0)
    began = _EPOCH + timedelta(microseconds=(began_ns + wall_ns) // 1000)
    tracks = _numbers()
    events = [event for pid, part in enumerate(ordered, 1) for event in _process(pid, part, began_ns, tracks)]
    left_out = {part.name: part.dropped for part in ordered if part.dropped}
    said = {**about, "began": began.isoformat(), **({"spans_left_out": left_out} if left_out else {})}
    document = {"displayTimeUnit": "ms", "otherData": said, "traceEvents": events}
    return json.dumps(document, separators=(",", ":")).encode()


def _numbers() -> Iterator[int]:
    """Numbers of tracks: no two in a file are the same, whatever the process."""
    number = 1000
    while True:
        yield number
        number += 1


def _process(pid: int, part: Part, began_ns: int, tracks: Iterator[int]) -> Iterator[Event]:
    clock = f", clock within {part.uncertainty_ns / 1000:.0f} us" if part.uncertainty_ns else ""
    yield _metadata(pid, 0, "process_name", name=part.name)
    yield _metadata(pid, 0, "process_sort_index", sort_index=pid)
    yield _metadata(pid, 0, "process_labels", labels=f"pid {part.pid} on {part.host}{clock}")
    tids = {}
    for track in sorted({span.track for span in part.spans}, key=_natural):
        tid = tids[track] = next(tracks)
        yield _metadata(pid, tid, "thread_name", name=track)
        yield _metadata(pid, tid, "thread_sort_index", sort_index=tid)
    for span in sorted(part.spans, key=lambda span: (span.start_ns, -span.duration_ns)):
        numbers = {"step": span.step, "contribution": span.contribution, "chunk": span.chunk}
        yield {
            "ph": "X",
            "name": span.name,
            "cat": span.category,
            "pid": pid,
            "tid": tids[span.track],
            "ts": (span.start_ns + part.offset_ns - began_ns) / 1000,
            "dur": span.duration_ns / 1000,
            "args": {name: number for name, number in numbers.items() if number >= 0},
        }


def _metadata(pid: int, tid: int, name: str, /, **args: Any) -> Event:
    return {"ph": "M", "name": name, "pid": pid, "tid": tid, "args": args}


def _natural(track: str) -> tuple[bool, list[int | str]]:
    """Whoever computes comes first; worker 10 comes after worker 9."""
    return track != COMPUTE, [int(word) if word.isdigit() else word for word in re.split(r"(\d+)", track)]
