"""The live view of a run on a terminal, drawn from the launcher's loop."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import TextIO

from rich.console import Console, RenderableType
from rich.live import Live

from ps.wire.security import PLAIN, Security
from workers.launch.metrics import Progress, Record, evaluation_line
from workers.launch.progress import Display
from workers.launch.snapshot import MemberSnapshot, Snapshot, starting
from workers.launch.view import render
from workers.launch.watch import Watcher

#: Drawn so often: numbers that change faster cannot be read.
DRAW_EVERY_S = 0.25
#: Lines that are printed again after the terminal was resized.
KEPT_LINES = 20


class Screen:
    """The lower part of a terminal, drawn in place, and lines that scroll above it.

    Args:
        stream: the terminal. One that is gone is not an error.
    """

    def __init__(self, stream: TextIO) -> None:
        self._console = Console(file=stream, highlight=False)
        # Drawn from the caller's loop: a terminal that is gone must not fail in a thread of rich's.
        self._live = Live(console=self._console, auto_refresh=False, transient=True)
        self._size = self._console.size
        self._said: deque[str] = deque(maxlen=KEPT_LINES)
        self._drawn_at = 0.0

    def say(self, text: str) -> None:
        """Print a line above what is drawn."""
        self._said.append(text)
        self._guard(lambda: self._print(text))

    def open(self) -> None:
        self._guard(self._live.start)

    def is_due(self) -> bool:
        """Whether to draw now; asking more often costs nothing."""
        return time.monotonic() - self._drawn_at >= DRAW_EVERY_S

    def draw(self, make: Callable[[int, int], RenderableType]) -> None:
        """Draw what `make(width, height)` returns in place of what is there."""
        self._drawn_at = time.monotonic()
        size = self._console.size
        if size != self._size:
            self._size = size
            self._guard(self._begin_again)
        self._guard(lambda: self._live.update(make(size.width, size.height), refresh=True))

    def close(self) -> None:
        """Take away what is drawn; `say` still works."""
        self._live.update("")
        self._guard(self._live.stop)

    def _begin_again(self) -> None:
        """A resized terminal has broken the lines anew, so nobody knows where the drawing begins."""
        self._console.clear()
        for text in self._said:
            self._print(text)

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)

    @staticmethod
    def _guard(draw: Callable[[], None]) -> None:
        with suppress(OSError):
            draw()


class LiveDisplay(Display):
    """For a terminal: the whole cluster, several times a second.

    Args:
        stream: the terminal.
        run_dir: the run folder, for the title.
        security: what the coordinator is asked with.
    """

    def __init__(self, stream: TextIO, run_dir: str, security: Security = PLAIN) -> None:
        self._security = security
        self._screen = Screen(stream)
        self._run_dir = run_dir
        self._progress: Progress | None = None
        self._watcher: Watcher | None = None
        #: The processes that were started, by (role, rank): pid, when, and how often before.
        self._started: dict[tuple[str, int], tuple[int, float, int]] = {}

    def say(self, text: str) -> None:
        self._screen.say(text)

    def open(self, progress: Progress) -> None:
        self._progress = progress
        self._screen.open()

    def started(self, role: str, rank: int, pid: int) -> None:
        before = self._started.get((role, rank))
        self._started[role, rank] = (pid, time.monotonic(), before[2] + 1 if before else 0)

    def reachable(self, address: str) -> None:
        if self._watcher is not None:
            self._watcher.close()
        self._watcher = Watcher(address, self._security)

    def show(self, record: Record, progress: Progress) -> None:  # noqa: ARG002
        if record.get("kind") == "evaluation":
            self.say(f"held-out at step {record['version']}: {evaluation_line(record)}")

    def refresh(self) -> None:
        if self._progress is not None and self._screen.is_due():
            snapshot = self._snapshot(self._progress)
            self._screen.draw(lambda width, height: render(snapshot, width, height))

    def close(self) -> None:
        if self._watcher is not None:
            self._watcher.close()
        self._screen.close()
        if self._progress is not None and self._progress.version:
            self.say(str(self._progress))

    def _snapshot(self, progress: Progress) -> Snapshot:
        latest = self._watcher.latest() if self._watcher is not None else None
        return with_started(latest or starting(progress, self._run_dir), self._started, time.monotonic())


def with_started(snapshot: Snapshot, started: dict[tuple[str, int], tuple[int, float, int]], now: float) -> Snapshot:
    """Add what only the launcher knows: processes that the coordinator has not met, and how often each was started.

    Args:
        snapshot: what the coordinator says.
        started: by role and rank: the pid, when it was started, and how often before.
        now: the clock of `started`.
    """
    known = {(member.role, member.rank): member for member in snapshot.members}
    members = dict(known)
    for (role, rank), (pid, at, restarts) in started.items():
        member = known.get((role, rank))
        if member is None or member.pid != pid:
            members[role, rank] = MemberSnapshot(role, rank, "starting", now - at, pid=pid, restarts=restarts)
        else:
            members[role, rank] = replace(member, restarts=restarts)
    return replace(snapshot, members=tuple(members.values()))
