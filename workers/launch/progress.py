"""Showing how a run goes: a bar on a terminal, else a line every few steps."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as Bar

from workers.launch.metrics import Progress, Record, evaluation_line


class Display:
    """What the launcher tells the user. A terminal that is gone, or a closed pipe, does not stop a run."""

    def say(self, text: str) -> None:
        """Print a line."""
        raise NotImplementedError

    def open(self, progress: Progress) -> None:
        """The roles start, at this progress."""

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


class BarDisplay(Display):
    """For a terminal.

    Args:
        stream: the terminal.
    """

    def __init__(self, stream: TextIO) -> None:
        self._bar = Bar(
            BarColumn(bar_width=24),
            TextColumn("{task.description}", markup=False),
            console=Console(file=stream, highlight=False),
            # Drawn from the launcher's loop: a terminal that is gone must not fail in a thread of rich's.
            auto_refresh=False,
        )
        self._task: TaskID | None = None

    def say(self, text: str) -> None:
        self._draw(lambda: self._bar.console.print(text, markup=False, soft_wrap=True))

    def open(self, progress: Progress) -> None:
        self._task = self._bar.add_task("starting", total=progress.steps, completed=progress.version)
        self._draw(self._bar.start)

    def show(self, record: Record, progress: Progress) -> None:  # noqa: ARG002
        self._update(progress)

    def went_back(self, progress: Progress) -> None:
        super().went_back(progress)
        self._update(progress)

    def refresh(self) -> None:
        self._draw(self._bar.refresh)

    def close(self) -> None:
        self._draw(self._bar.stop)

    def _update(self, progress: Progress) -> None:
        if self._task is not None:
            self._bar.update(self._task, completed=progress.version, description=str(progress))

    @staticmethod
    def _draw(draw: Callable[[], None]) -> None:
        with suppress(OSError):
            draw()


def choose_display(stream: TextIO, every_steps: int) -> Display:
    """A bar if somebody watches, else lines."""
    return BarDisplay(stream) if stream.isatty() else LineDisplay(stream, every_steps)
