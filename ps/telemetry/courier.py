"""Takes a role's spans to the coordinator, by whose clock all roles of a timeline are aligned."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Protocol

from protos.ps.v1 import coordinator_pb2 as pb
from ps.errors import AccessDenied, MismatchError, PsError
from ps.telemetry.trace import Recorder, clock_name

log = logging.getLogger(__name__)

#: The clocks' difference is estimated from the quickest of so many answers.
ATTEMPTS = 8
#: A coordinator that could not take the spans is asked again after this.
RETRY_S = 1.0
#: How long a role that ends waits for its spans to be taken.
LAST_S = 5.0


class Coordinator(Protocol):
    """What the courier asks of a session. Both raise PsError."""

    def clock(self) -> pb.ClockResponse:
        """Read the coordinator's clock."""

    def trace(self, part: pb.TraceRequest) -> None:
        """Hand over a part of a timeline."""


class Courier:
    """Waits beside a role until its spans are complete, and hands them over once."""

    def __init__(self, coordinator: Coordinator, recorder: Recorder) -> None:
        self._coordinator = coordinator
        self._recorder = recorder
        self._ending = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to wait; without steps to be traced there is nothing to wait for."""
        if self._recorder.on:
            self._thread = threading.Thread(target=self._run, name="trace", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """The role ends, while its session still stands: hand over what there is."""
        if self._thread is not None:
            self._ending.set()
            self._recorder.end()
            self._thread.join(LAST_S)

    def _run(self) -> None:
        self._recorder.over.wait()
        while True:
            try:
                self._hand_over()
                return
            except PsError as error:
                if self._ending.is_set() or isinstance(error, MismatchError | AccessDenied):
                    log.warning("this process is not in the trace: %s", error.message)
                    return
            self._ending.wait(RETRY_S)

    def _hand_over(self) -> None:
        offset_ns, uncertainty_ns = estimate_offset(self._coordinator.clock)
        spans = [
            pb.Span(
                name=span.name,
                category=span.category,
                track=span.track,
                start_ns=span.start_ns,
                duration_ns=span.duration_ns,
                step=span.step,
                chunk=span.chunk,
                contribution=span.contribution,
            )
            for span in self._recorder.spans()
        ]
        self._coordinator.trace(
            pb.TraceRequest(
                offset_ns=offset_ns, uncertainty_ns=uncertainty_ns, dropped=self._recorder.dropped, spans=spans
            )
        )


def estimate_offset(read: Callable[[], pb.ClockResponse]) -> tuple[int, int]:
    """Compare this process's monotonic clock with the coordinator's.

    Returns:
        What makes this clock's times the coordinator's, and by how much that may be wrong, in nanoseconds: half a
        round trip. Processes that share a clock need no estimate.

    Raises:
        PsError: the coordinator did not answer.

    Source: RFC 5905, section 8: the difference in the middle of the quickest round trip.
    """
    mine = clock_name()
    best: tuple[int, int] | None = None
    for _ in range(ATTEMPTS):
        asked_ns = time.monotonic_ns()
        answer = read()
        round_trip_ns = time.monotonic_ns() - asked_ns
        if answer.name == mine:
            return 0, 0
        if best is None or round_trip_ns < best[1]:
            best = int(answer.now_ns) - asked_ns - round_trip_ns // 2, round_trip_ns
    assert best is not None
    return best[0], best[1] // 2 + 1
