"""What a process did during some steps, and when: spans on tracks, kept until they are handed over.

A step's timeline is one thread's spans beside the others'. Spans have the time of the monotonic clock,
which all processes of a host share; `clock_name` tells which one it is.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

from ps.machine import machine_name

#: Spans that a process keeps, at most; they fit one message to the coordinator.
MAX_SPANS = 32_768
#: The track of whoever computes.
COMPUTE = "compute"

_NOTHING = nullcontext()


class Span(NamedTuple):
    """Something that took a while."""

    name: str
    #: compute, push, wait, reduce, decide, apply, pull or step.
    category: str
    #: The thread, or what takes the place of one: spans of one track follow each other, or one holds the other.
    track: str
    #: By the monotonic clock, in nanoseconds.
    start_ns: int
    duration_ns: int
    step: int
    #: -1: it is not about one.
    chunk: int = -1
    contribution: int = -1


class Recorder:
    """The spans of one role. Thread-safe; free of cost but for one test while nothing is traced.

    Weights of version t + 1 are what step t makes, so that pulling them belongs to step t.
    """

    def __init__(self, steps: range = range(0)) -> None:
        """
        Args:
            steps: which are traced.
        """
        #: Something may still have to be recorded.
        self.on = len(steps) > 0
        #: All of the traced steps is in the past, or the process ends.
        self.over = threading.Event()
        #: Spans that found no room.
        self.dropped = 0
        self._steps = steps
        self._spans: list[Span] = []
        #: By track: step and contribution of its last span, and when that ended.
        self._last: dict[str, tuple[int, int, int]] = {}

    def span(
        self, name: str, category: str, step: int, *, chunk: int = -1, contribution: int = -1, track: str = ""
    ) -> AbstractContextManager[None]:
        """Record what happens inside.

        Args:
            name: what it is.
            category: as in `Span`.
            step: to which step it belongs; only traced ones count.
            track: as in `Span`; empty: the thread's name.
        """
        if not self.on or not self._wants(step):
            return _NOTHING
        return self._open(name, category, step, chunk, contribution, track)

    def add(
        self,
        name: str,
        category: str,
        step: int,
        start_ns: int,
        stop_ns: int | None = None,
        *,
        chunk: int = -1,
        contribution: int = -1,
        track: str = "",
    ) -> None:
        """Record what has happened between two times of the monotonic clock; by default until now."""
        if self.on and self._wants(step):
            self._keep(name, category, step, start_ns, stop_ns, chunk, contribution, track)

    def since_last(
        self, name: str, category: str, step: int, *, chunk: int = -1, contribution: int = -1, track: str = ""
    ) -> None:
        """Record what has happened since the track's last span, if that was of the same step and contribution."""
        if self.on and self._wants(step):
            track = track or _thread()
            *last, start_ns = self._last.get(track, (-1, -1, 0))
            if last == [step, contribution]:
                self._keep(name, category, step, start_ns, None, chunk, contribution, track)

    def spans(self) -> list[Span]:
        """All that was recorded."""
        return list(self._spans)

    def end(self) -> None:
        """Nothing more is recorded."""
        self.on = False
        self.over.set()

    def _wants(self, step: int) -> bool:
        if step > self._steps.stop:
            # Beyond the step after the last one: before it began, all weights that the last one made were there.
            self.end()
        return step in self._steps

    @contextmanager
    def _open(self, name: str, category: str, step: int, chunk: int, contribution: int, track: str) -> Iterator[None]:
        start_ns = time.monotonic_ns()
        try:
            yield
        finally:
            self._keep(name, category, step, start_ns, None, chunk, contribution, track)

    def _keep(
        self,
        name: str,
        category: str,
        step: int,
        start_ns: int,
        stop_ns: int | None,
        chunk: int,
        contribution: int,
        track: str,
    ) -> None:
        if stop_ns is None:
            stop_ns = time.monotonic_ns()
        track = track or _thread()
        self._last[track] = (step, contribution, stop_ns)
        if len(self._spans) >= MAX_SPANS:
            self.dropped += 1
            return
        self._spans.append(Span(name, category, track, start_ns, stop_ns - start_ns, step, chunk, contribution))


#: Of those whom nobody traces.
OFF = Recorder()


def clock_name() -> str:
    """Which monotonic clock this process has: that of its host since the last boot, and of its time namespace."""
    machine = machine_name()
    try:
        return f"{machine} {Path('/proc/self/ns/time').readlink()}"
    except OSError:
        # The kernel is older than time namespaces.
        return machine


def _thread() -> str:
    return threading.current_thread().name.replace("_", " ")
