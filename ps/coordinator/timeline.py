"""RUN/trace.json: what all roles did during the traced steps, by the coordinator's clock."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from protos.ps.v1 import coordinator_pb2 as pb
from ps.coordinator.actions import Action, Configure, Journal, Record, TellDeal
from ps.coordinator.members import Members, MemberState
from ps.errors import StorageError
from ps.storage.files import write_atomic
from ps.telemetry.chrome_trace import Part, render
from ps.telemetry.trace import MAX_SPANS, Recorder, Span
from ps.types import Role

log = logging.getLogger(__name__)

#: The file, in the run folder.
TRACE_NAME = "trace.json"
_TRACK = "steps"


class Timeline:
    """The coordinator's own spans, and the parts that members hand in."""

    def __init__(self, run_dir: Path, run: str, steps: range, myself: MemberState) -> None:
        """
        Args:
            steps: which are traced.
        """
        self._path = run_dir / TRACE_NAME
        self._about = {"run": run, "steps": f"{steps.start}:{steps.stop}"}
        self._self = myself
        self._recorder = Recorder(steps)
        #: Since when the open step is dealt, or the one before it closed; None: no step is open.
        self._began_ns: int | None = None
        self._decided_ns = 0
        self._parts: dict[tuple[Role, int, int], Part] = {}
        self._lock = threading.Lock()
        #: Held while the file is written.
        self._writing = threading.Lock()
        self._written = 0

    # -- The loop's thread ----------------------------------------------------------------------

    def note(self, actions: Sequence[Action], began: float) -> None:
        """See what the state machine asked for, and what was carried out since `began` (by the monotonic clock)."""
        if not self._recorder.on:
            return
        began_ns, now_ns = int(began * 1e9), time.monotonic_ns()
        for action in actions:
            if isinstance(action, Record) and action.line["kind"] == "step":
                self._closed(action.line["step"], began_ns)
            elif isinstance(action, Journal) and action.record["type"] == "decision":
                self._decided(action.record["step"], began_ns, now_ns)
            elif isinstance(action, TellDeal) and action.contributions and self._began_ns is None:
                self._began_ns = began_ns
            elif isinstance(action, Configure):
                # The cluster is made to serve (again).
                self._began_ns = None

    def _decided(self, step: int, began_ns: int, now_ns: int) -> None:
        if self._began_ns is not None and self._began_ns < began_ns:
            self._recorder.add("wait for the shards' reports", "wait", step, self._began_ns, began_ns, track=_TRACK)
        self._recorder.add("decide", "decide", step, began_ns, now_ns, track=_TRACK)
        self._decided_ns = now_ns

    def _closed(self, step: int, now_ns: int) -> None:
        if self._began_ns is not None:
            self._recorder.add("wait until all have applied it", "wait", step, self._decided_ns, now_ns, track=_TRACK)
            self._recorder.add(f"step {step}", "step", step, self._began_ns, now_ns, track=_TRACK)
        self._began_ns = now_ns

    def take(self, life: MemberState, part: Part, members: Members) -> bool:
        """Take a member's part; True when everybody who is there has handed one in."""
        with self._lock:
            self._parts[_key(life)] = part
            return all(
                _key(member) in self._parts
                for role in (Role.SHARD, Role.STANDBY, Role.WORKER)
                for member in members.of(role)
                if member.live
            )

    # -- Any thread -----------------------------------------------------------------------------

    def write(self) -> None:
        """Write the file, if there is anything that it does not hold yet."""
        with self._writing:
            with self._lock:
                parts = list(self._parts.values())
            if len(parts) == self._written or not any(part.spans for part in parts):
                return
            mine = self._recorder
            own = Part(str(Role.COORDINATOR), 0, self._self.pid, self._self.host, mine.spans(), dropped=mine.dropped)
            try:
                write_atomic(self._path, render([own, *parts], time.time_ns() - time.monotonic_ns(), self._about))
            except StorageError as error:
                log.error("there is no timeline: %s", error.message)
                return
            self._written = len(parts)
        log.info("the timeline of the steps %s is in %s", self._about["steps"], self._path)


def part_of(request: pb.TraceRequest) -> Part:
    """What a member has handed in."""
    spans = [
        Span(
            _printable(span.name),
            _printable(span.category),
            _printable(span.track),
            span.start_ns,
            span.duration_ns,
            span.step,
            span.chunk,
            span.contribution,
        )
        for span in request.spans[:MAX_SPANS]
    ]
    who = request.member
    return Part(
        who.role,
        who.rank,
        who.pid,
        _printable(who.host),
        spans,
        request.offset_ns,
        request.uncertainty_ns,
        request.dropped,
    )


def _key(member: MemberState) -> tuple[Role, int, int]:
    return member.role, member.rank, member.incarnation


def _printable(text: str) -> str:
    """What a member says is shown by other programs: no control characters, and not without end."""
    return "".join(letter if letter.isprintable() else "?" for letter in text[:100])
