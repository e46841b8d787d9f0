"""A program on a terminal: a pseudo-terminal, and enough of an emulator to know what its user sees."""

from __future__ import annotations

import codecs
import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

_ESCAPE = re.compile(r"\x1b\[([?0-9;]*)([A-Za-z])")


class Emulator:
    """The lines of a terminal, those that have scrolled away included; it wraps, and knows what rich sends."""

    def __init__(self, columns: int, rows: int) -> None:
        self.columns = columns
        self.rows = rows
        self.lines: list[str] = [""]
        self._row = 0
        self._column = 0
        #: Lines before this one have scrolled away.
        self._top = 0

    @property
    def screen(self) -> list[str]:
        """What is visible."""
        return self.lines[self._top :]

    def feed(self, text: str) -> None:
        """Take output."""
        at = 0
        while at < len(text):
            escape = _ESCAPE.match(text, at)
            if escape:
                self._control(escape[1], escape[2])
                at = escape.end()
                continue
            self._put(text[at])
            at += 1

    def _control(self, argument: str, command: str) -> None:
        count = int(argument) if argument.isdigit() else 1
        if command == "A":
            self._row = max(self._top, self._row - count)
        elif command == "K":
            self.lines[self._row] = ""
        elif command == "J":
            self.lines[self._top :] = [""]
            self._row, self._column = self._top, 0
        elif command == "H":
            self._row, self._column = self._top, 0
        else:
            assert command in "mhl", f"ESC[{argument}{command} is not known here"

    def _put(self, character: str) -> None:
        if character == "\n":
            self._down()
        elif character == "\r":
            self._column = 0
        else:
            if self._column == self.columns:
                self._down()
                self._column = 0
            line = self.lines[self._row].ljust(self._column)
            self.lines[self._row] = line[: self._column] + character + line[self._column + 1 :]
            self._column += 1

    def _down(self) -> None:
        self._row += 1
        if self._row == len(self.lines):
            self.lines.append("")
        self._top = max(self._top, self._row - self.rows + 1)


class Terminal:
    """A process and the terminal that it runs on."""

    def __init__(self, process: subprocess.Popen[bytes], master: int, columns: int, rows: int) -> None:
        self.process = process
        self.emulator = Emulator(columns, rows)
        self._master = master
        self._decoder = codecs.getincrementaldecoder("utf-8")()

    def resize(self, columns: int, rows: int) -> None:
        """What a user does with the mouse; the lines that are there stay as they are."""
        _set_size(self._master, columns, rows)
        self.emulator.columns, self.emulator.rows = columns, rows

    def read(self, timeout_s: float) -> bool:
        """Take what comes; False: the program has closed its terminal."""
        if not select.select([self._master], [], [], timeout_s)[0]:
            return True
        try:
            data = os.read(self._master, 65_536)
        except OSError:
            return False
        self.emulator.feed(self._decoder.decode(data))
        return bool(data)

    def until(self, predicate: Callable[[list[str]], object], timeout_s: float, what: str) -> None:
        """Read on until `predicate(screen)` holds.

        Raises:
            AssertionError: it does not hold in time, or never will.
        """
        deadline = time.monotonic() + timeout_s
        while not predicate(self.emulator.screen):
            shown = "\n".join(self.emulator.lines)
            assert time.monotonic() < deadline, f"after {timeout_s:.0f} s still no {what}; the terminal shows:\n{shown}"
            assert self.read(0.2), f"the program ended before {what}; the terminal shows:\n{shown}"

    def finish(self, timeout_s: float) -> int:
        """Read to the end; returns the exit code."""
        deadline = time.monotonic() + timeout_s
        while self.read(0.2):
            assert time.monotonic() < deadline, "the program does not end"
        return self.process.wait(10.0)


@contextmanager
def on_terminal(command: Sequence[str], columns: int = 120, rows: int = 30) -> Iterator[Terminal]:
    """Start a program on a new terminal; it is killed at the end if it is still there."""
    master, slave = pty.openpty()
    _set_size(slave, columns, rows)
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES", "NO_COLOR")}
    process = subprocess.Popen(
        list(command),
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env={**environment, "TERM": "xterm-256color"},
        start_new_session=True,
    )
    os.close(slave)
    try:
        yield Terminal(process, master, columns, rows)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(10.0)
        os.close(master)


def _set_size(descriptor: int, columns: int, rows: int) -> None:
    fcntl.ioctl(descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
