"""A role's tie to its launcher: a pipe that only the launcher can write to.

The launcher keeps the write end and never writes. When it dies, however it dies, the kernel closes
the pipe, every role reads the end of file and goes. It needs no heartbeat and no parent's pid.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass

#: Names the descriptor of the pipe's read end. Absent: nobody launched this process.
ENVIRONMENT = "WINDLASS_LIFELINE"
#: What a role has to end by itself, once its launcher is gone.
GRACE_S = 3.0


@dataclass(frozen=True)
class Lifeline:
    """The read end of the launcher's pipe."""

    fd: int

    @classmethod
    def from_environment(cls) -> Lifeline | None:
        """Take over the descriptor that the launcher named; nothing that this process starts inherits it."""
        named = os.environ.pop(ENVIRONMENT, None)
        if named is None:
            return None
        try:
            os.set_inheritable(int(named), False)
        except (ValueError, OSError):
            return None  # A leftover of another process: there is no such pipe here.
        return cls(int(named))

    def watch(self, on_end: Callable[[], None]) -> threading.Thread:
        """Call `on_end` when the launcher is gone; `GRACE_S` later, end the process if it is still there."""
        return watch(self.fd, on_end)


def watch(fd: int, on_end: Callable[[], None], grace_s: float = GRACE_S) -> threading.Thread:
    """Wait, in a thread, for the end of file on `fd`.

    Args:
        fd: read end of a pipe.
        on_end: asks the process to end; runs in the thread.
        grace_s: seconds from then on until the process is ended the hard way.
    """

    def wait() -> None:
        while os.read(fd, 4096):
            pass
        # Armed first: whatever `on_end` does, or if it fails, it cannot keep the process alive.
        timer = threading.Timer(grace_s, os._exit, (1,))
        timer.daemon = True
        timer.start()
        on_end()

    thread = threading.Thread(target=wait, name="lifeline", daemon=True)
    thread.start()
    return thread
