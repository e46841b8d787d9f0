"""Signals as events: the main loop waits for them and for a child's end, and no handler does any work."""

from __future__ import annotations

import select
import signal
import socket
import time
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any, Self

ASKS_TO_STOP = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def _wake(signum: int, frame: FrameType | None) -> None:
    """Exists so that the signal is delivered; its number arrives through the wake-up descriptor."""


class AskedToStop(Exception):
    """A signal asks the process to end."""

    def __init__(self, signum: signal.Signals) -> None:
        super().__init__(signum.name)
        self.signum = signum


class Signals:
    """Collects SIGINT, SIGTERM, SIGHUP and SIGCHLD while it is entered; main thread only.

    A SIGHUP that was ignored (nohup) stays ignored.
    """

    def __enter__(self) -> Self:
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        self._before: dict[signal.Signals, Any] = {}
        self._fd_before = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for signum in (*ASKS_TO_STOP, signal.SIGCHLD):
            if signum is not signal.SIGHUP or signal.getsignal(signum) is not signal.SIG_IGN:
                self._before[signum] = signal.signal(signum, _wake)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        signal.set_wakeup_fd(self._fd_before)
        self._reader.close()
        self._writer.close()

    def wait(self, timeout_s: float) -> list[signal.Signals]:
        """Wait until a signal comes or a child ends; return the signals that ask to stop."""
        select.select([self._reader], [], [], timeout_s)
        try:
            received = self._reader.recv(4096)
        except BlockingIOError:
            return []
        return [signal.Signals(number) for number in received if number in ASKS_TO_STOP]

    def pause(self, seconds: float) -> None:
        """Sleep.

        Raises:
            AskedToStop: a signal came before the time was up, or earlier.
        """
        until = time.monotonic() + seconds
        while True:
            if asked := self.wait(max(until - time.monotonic(), 0.0)):
                raise AskedToStop(asked[0])
            if time.monotonic() >= until:
                return


class Requests(Signals):
    """The same for a launcher that runs in a thread: what asks it to stop is another thread, not a signal."""

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Hear nothing more. Idempotent."""
        self._reader.close()
        self._writer.close()

    def ask(self, signum: signal.Signals) -> None:
        """Have `wait` return the signal if it asks to stop, and wake it in any case. From any thread."""
        # A launcher that has ended listens no more.
        with suppress(OSError):
            self._writer.send(bytes([signum]))
