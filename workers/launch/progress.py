"""Showing how a run goes: a live view on a terminal (`workers.launch.live`), else a line every few steps."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TextIO

from ps.wire.security import PLAIN, Security
from workers.launch.metrics import Progress, Record, evaluation_line


class Display:
    """What the launcher tells the user. A terminal that is gone, or a closed pipe, does not stop a run."""

    def say(self, text: str) -> None:
        """Print a line."""
        raise NotImplementedError

    def open(self, progress: Progress) -> None:
        """The roles start, at this progress."""

    def started(self, role: str, rank: int, pid: int) -> None:
        """A process was started, perhaps in the place of one that has ended."""

    def reachable(self, address: str) -> None:
        """The coordinator serves at this host:port; it may be started again there."""

    def show(self, record: Record, progress: Progress) -> None:
        """A record has come, and this is the progress with it."""

    def went_back(self, progress: Progress) -> None:
        """Steps were taken back."""
        self.say(f"went back to step {progress.version}")

    def refresh(self) -> None:
        """Called several times a second."""

    def close(self) -> None:
        """Nothing more is shown; `say` still works."""


class LineDisplay(Display):
    """For logs and pipes: a line every so many steps, and one per evaluation.

    Args:
        stream: where to.
        every_steps: how often.
    """

    def __init__(self, stream: TextIO, every_steps: int) -> None:
        self._stream = stream
        self._every_steps = every_steps

    def say(self, text: str) -> None:
        with suppress(OSError):
            print(text, file=self._stream, flush=True)

    def show(self, record: Record, progress: Progress) -> None:
        if record.get("kind") == "evaluation":
            self.say(f"held-out at step {record['version']}: {evaluation_line(record)}")
        elif progress.version % self._every_steps == 0 or progress.version == progress.steps:
            self.say(str(progress))


def choose_display(stream: TextIO, every_steps: int, run_dir: str, security: Security = PLAIN) -> Display:
    """A live view if somebody watches, else lines."""
    if stream.isatty() and os.environ.get("TERM", "") not in ("", "dumb"):
        from workers.launch.live import LiveDisplay

        return LiveDisplay(stream, run_dir, security)
    return LineDisplay(stream, every_steps)
